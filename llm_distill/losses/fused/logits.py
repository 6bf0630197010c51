"""A head's logits, a chunk of rows at a time, with what makes probabilities of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llm_distill.divergences import ForwardKL
from llm_distill.heads import LMHead
from llm_distill.losses.fused.cpp_backend import Kernels
from llm_distill.losses.fused.head_loss import choose_backend, chunk_rows, opened_projection
from llm_distill.losses.fused.products import chunk_buffers, logits_dtype, multiply
from llm_distill.losses.fused.task import HeadLossTask, TokenChoice, TopTokens

TILE_BYTES = 2**22
"""How many logits are given at a time on a CPU: so many stay in its cache."""


class Logits(NamedTuple):
    """The logits of some rows, with what makes probabilities of them: log p = scores − log_total."""

    rows: slice
    scores: Float[Tensor, "rows vocab"] | TopTokens
    """Logits over T. The next rows are written over them."""
    log_total: Float[Tensor, " rows"]
    entropy: Float[Tensor, " rows"]
    """At temperature 1, in nats."""


@torch.no_grad()
def logits_in_chunks(
    hidden: Float[Tensor, "rows hidden"],
    head: LMHead,
    temperature: float,
    choice: TokenChoice | None = None,
    start: Float[Tensor, " rows"] | None = None,
) -> Iterator[Logits]:
    """One product of the head, one pass for the statistics; nothing of `[rows, vocab]` is kept.

    Args:
        choice: the tokens that are wanted, of the distribution at this temperature (None: all are). They are chosen
            in the pass for the statistics where that is compiled; elsewhere all tokens come nevertheless.
        start: of each row's draw, from 0 to 1; needed where the choice has a threshold.
    """
    device = hidden.device
    if choice is not None:
        choice = choice._replace(most=min(choice.most, head.vocab_size))
    with head.weights() as (weight, bias), torch.autocast(device.type, enabled=False):
        student = opened_projection(head, hidden, weight, bias)
        task = HeadLossTask(student, None, [], ForwardKL(), temperature, 0.0, 1.0, 0.0, None)
        dtype = logits_dtype(student.hidden.dtype, device)
        backend = choose_backend(task)
        size = min(chunk_rows(head.vocab_size, [dtype], device, None), max(len(hidden), 1))
        tile = size if device.type != "cpu" else max(1, TILE_BYTES // (head.vocab_size * dtype.itemsize))
        with chunk_buffers(size, [(head.vocab_size, dtype)], device) as (buffer,):
            for begin in range(0, len(hidden), size):
                all_rows = slice(begin, min(begin + size, len(hidden)))
                part = student.hidden[all_rows]
                raw = buffer[: len(part)]
                multiply(part, student.weight.T, out=raw)
                tokens = None
                if choice is not None and isinstance(backend, Kernels):
                    starts = None if start is None else start[all_rows]
                    statistics, tokens = backend.statistics_and_tokens(task, raw, choice, starts)
                else:
                    statistics = backend.statistics(task, raw)
                log_total = statistics.maximum / temperature + statistics.tempered_log_total
                entropy = statistics.log_total - statistics.mean
                if tokens is not None:
                    yield Logits(all_rows, tokens._replace(values=tokens.values / temperature), log_total, entropy)
                    continue
                for first in range(0, len(part), tile):
                    of = slice(first, first + tile)
                    rows = slice(begin + first, min(begin + first + tile, all_rows.stop))
                    values = raw[of] if head.is_linear and student.bias is None else student.logits(raw[of])
                    values = values if temperature == 1 else values.float() / temperature
                    yield Logits(rows, values, log_total[of], entropy[of])


GROUP = 16
"""Tokens whose maximum is looked at first when the likeliest are sought."""


def top_tokens(scores: Float[Tensor, "rows vocab"], k: int) -> TopTokens:
    """As `scores.topk(k)`, on a CPU in less time: the k largest lie in the k groups of largest maximum."""
    rows, vocab = scores.shape
    groups, k = vocab // GROUP, min(k, vocab)
    if scores.device.type != "cpu" or groups < 4 * k:
        return TopTokens(*scores.topk(k), vocab)
    whole = scores[:, : groups * GROUP].view(rows, GROUP, groups)  # a group's tokens lie far apart: amax is vectorised
    best = whole.amax(1).topk(k, sorted=False).indices
    ids = (best[:, :, None] + groups * torch.arange(GROUP)).flatten(1)
    ids = torch.cat([ids, torch.arange(groups * GROUP, vocab).expand(rows, -1)], -1)
    values, order = scores.gather(-1, ids).topk(k)
    return TopTokens(values, ids.gather(-1, order), vocab)
