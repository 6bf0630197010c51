"""A head's logits, a chunk of rows at a time, with what makes probabilities of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llm_distill.divergences import ForwardKL
from llm_distill.fused import cpp_backend
from llm_distill.fused.head_loss import choose_backend, chunk_rows, opened_projection
from llm_distill.fused.job import Job, Top
from llm_distill.fused.products import chunk_buffers, logits_dtype, multiply
from llm_distill.heads import LMHead

TILE_BYTES = 2**22
"""What is looked at together on a CPU: it stays in the cache."""


class Logits(NamedTuple):
    """Of some rows, one after the other."""

    rows: slice
    scores: Float[Tensor, "rows vocab"] | Top
    """Divided by T. Overwritten by the next."""
    log_total: Float[Tensor, " rows"]
    """log p = scores − log_total."""
    entropy: Float[Tensor, " rows"]
    """At temperature 1, in nats."""


@torch.no_grad()
def logits_in_chunks(
    hidden: Float[Tensor, "rows hidden"], head: LMHead, temperature: float, top: int = 0
) -> Iterator[Logits]:
    """One product of the head, one pass for the statistics; nothing of `[rows, vocab]` is kept.

    Args:
        top: how many of the likeliest tokens are all that is wanted (0: all are). They are found in the pass for the
            statistics where that is compiled; elsewhere all tokens come nevertheless.
    """
    device, top = hidden.device, min(top, head.vocab_size)
    with head.weights() as (weight, bias), torch.autocast(device.type, enabled=False):
        student = opened_projection(head, hidden, weight, bias)
        job = Job(student, None, [], ForwardKL(), temperature, 0.0, 1.0, 0.0, None)
        dtype = logits_dtype(student.hidden.dtype, device)
        backend = choose_backend(job, dtype, dtype, device=device)
        size = min(chunk_rows(head.vocab_size, [dtype], device, None), max(len(hidden), 1))
        tile = size if device.type != "cpu" else max(1, TILE_BYTES // (head.vocab_size * dtype.itemsize))
        with chunk_buffers((size, head.vocab_size), [dtype], device) as (buffer,):
            for start in range(0, len(hidden), size):
                part = student.hidden[start : start + size]
                raw = buffer[: len(part)]
                multiply(part, student.weight.T, out=raw)
                found, best = (
                    cpp_backend.statistics_and_top(job, raw, top)
                    if top and backend is cpp_backend
                    else (backend.statistics(job, raw), None)
                )
                log_total = found.maximum / temperature + found.tempered_log_total
                entropy = found.log_total - found.mean
                if best is not None:
                    best = best._replace(values=best.values / temperature)
                    yield Logits(slice(start, start + len(part)), best, log_total, entropy)
                    continue
                for first in range(0, len(part), tile):
                    of = slice(first, first + tile)
                    rows = slice(start + first, min(start + first + tile, start + len(part)))
                    values = raw[of] if head.is_linear and student.bias is None else student.logits(raw[of])
                    values = values if temperature == 1 else values.float() / temperature
                    yield Logits(rows, values, log_total[of], entropy[of])
