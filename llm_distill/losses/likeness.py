"""How alike student and teacher are on what the student wrote: figures that the loss does not need, of a few rows.

Where mass and overlap of the top tokens do not grow, the teacher speaks about text on which it has little to say.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_distill.losses.fused.logits import top_tokens
from llm_distill.losses.fused.task import NOTHING
from llm_distill.models import Kept
from llm_distill.signals import AlignedSignal, HiddenSignal, MixtureSignal, Signal, SparseSignal, TokenSignal

ROWS, TOP_K = 8, 20
"""So many rows of a micro-batch are measured, evenly spread over those that the student wrote. Their logits are made
once more: of all rows, that would cost what the loss costs."""


@torch.no_grad()
def measure_likeness(
    student: Kept, signal: Signal, written: Bool[Tensor, " rows"]
) -> dict[str, Float[Tensor, " rows"]]:
    """At temperature 1, NaN where it is not measured: `reverse_kl` = KL(student‖teacher) in nats, where the teacher
    tells its whole distribution; `top_k_mass`, the student's probability of the teacher's TOP_K likeliest tokens, or of
    those that it names; `top_k_overlap`, the share of these that are among as many of the student's likeliest. Nothing
    of a teacher that names single tokens, or others than the student's.
    """
    if isinstance(signal, TokenSignal | AlignedSignal) or (
        isinstance(signal, SparseSignal) and signal.log_tail is None
    ):
        return {}
    own = written.nonzero()[:, 0]
    rows = own[:: max(1, -(-len(own) // ROWS))]
    log_q = student.head(student.hidden[rows]).float().log_softmax(-1).clamp(min=NOTHING)
    figures = {}
    if isinstance(signal, SparseSignal):
        ids, is_named = signal.ids[rows], signal.log_probs[rows].isfinite()
    else:
        log_p = teacher_log_probs(signal, rows)
        figures["reverse_kl"] = (log_q.exp() * (log_q - log_p)).sum(-1)
        ids = top_tokens(log_p, TOP_K).ids
        is_named = torch.ones_like(ids, dtype=torch.bool)
    figures["top_k_mass"] = (log_q.gather(-1, ids).exp() * is_named).sum(-1)
    likeliest = top_tokens(log_q, ids.shape[-1]).ids
    is_shared = (ids[:, :, None] == likeliest[:, None]).any(-1) & is_named
    figures["top_k_overlap"] = is_shared.sum(-1) / is_named.sum(-1)
    nothing = log_q.new_full(written.shape, math.nan)
    return {name: nothing.index_copy(0, rows, values) for name, values in figures.items()}


def teacher_log_probs(
    signal: HiddenSignal | MixtureSignal, rows: Int[Tensor, " few"] | slice
) -> Float[Tensor, "few vocab"]:
    """The teacher's log-probabilities in a few rows, at temperature 1."""
    log_ps = [member.head(member.hidden[rows]).float().log_softmax(-1) for member in signal.members]
    return signal.mix([log_p.clamp(min=NOTHING) for log_p in log_ps], rows)[0].clamp(min=NOTHING)
