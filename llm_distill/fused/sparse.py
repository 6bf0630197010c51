"""The loss of rows where the teacher says something about a few tokens, or nothing: no teacher product.

Full rows are touched twice, for their statistics and for a gradient that is a multiple of the softmax; all else is
about k tokens a row. The tokens that the teacher names are taken out of the full row, so that the mass of the others is
exact however little it is.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_distill.divergences import Divergence
from llm_distill.fused.job import NOTHING, Job, put
from llm_distill.signals import SparseSignal


def sparse(
    backend: ModuleType,
    job: Job,
    rows: slice,
    raw: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"] | None,
) -> None:
    """Fills `job.metrics[rows]`, and `gradient` if it is there. Writes over `raw`.

    Args:
        backend: the module with `statistics` and `softmax_gradient`.
        rows: which rows of the job the chunk is.
        raw: the student's product, before bias and post-processing.
        gradient: where that of Σ rows on `raw` goes; may be `raw` itself.
    """
    if isinstance(job.signal, SparseSignal) and job.signal.log_tail is not None:
        _with_tail(backend, job, job.signal, job.signal.log_tail[rows], rows, raw, gradient)
    else:
        _without_tail(backend, job, job.signal, rows, raw, gradient)


class _Few(NamedTuple):
    """A few tokens a row."""

    ids: Int[Tensor, "rows k"]
    logits: Float[Tensor, "rows k"]
    slope: Float[Tensor, "rows k"] | float
    """∂ logits / ∂ raw."""

    @classmethod
    def of(cls, job: Job, raw: Tensor, ids: Tensor) -> _Few:
        logits = job.student.logits_at(raw, ids)
        return cls(ids, logits, job.student.head.post_process_slope(logits))

    def add_to(self, gradient: Tensor, d_logits: Tensor) -> None:
        put(gradient, self.ids, d_logits * self.slope, accumulate=True)


def _targets(job: Job, raw: Tensor, rows: slice) -> _Few | None:
    return None if job.targets is None else _Few.of(job, raw, job.targets[rows, None])


def _add_cross_entropy(job: Job, target: _Few | None, gradient: Tensor) -> None:
    """The target's own cell; the rest of its gradient is a multiple of the softmax."""
    if target is not None and job.ce_weight:
        target.add_to(gradient, torch.full_like(target.logits, -job.ce_weight))


def _without_tail(
    backend: ModuleType, job: Job, signal: object, rows: slice, raw: Tensor, gradient: Tensor | None
) -> None:
    """Samples, whose loss is the cross-entropy with their weights, or nothing but the targets."""
    T, metrics, target = job.temperature, job.metrics, _targets(job, raw, rows)
    found = backend.statistics(job, raw)
    metrics["entropy"][rows] = found.log_sum - found.mean
    if target is not None:
        metrics["ce"][rows] = found.log_sum - target.logits[:, 0]
    slope, slope_T = torch.full_like(found.mean, job.ce_weight), torch.zeros_like(found.mean)
    samples, weights = None, slope
    if isinstance(signal, SparseSignal):
        samples = _Few.of(job, raw, signal.ids[rows])
        weights = signal.log_probs[rows].to(found.mean.dtype).exp()  # padding has weight 0
        metrics["kd"][rows] = job.squared * (weights * (found.tempered_log_sum[:, None] - samples.logits / T)).sum(-1)
        slope_T = job.kd_slope * weights.sum(-1)
    if gradient is None:
        return
    slopes = (slope + slope_T, None) if T == 1 else (slope, slope_T)
    backend.softmax_gradient(job, raw, gradient, found, *slopes)
    if samples is not None:
        samples.add_to(gradient, -job.kd_slope * weights)
    _add_cross_entropy(job, target, gradient)


def _with_tail(
    backend: ModuleType,
    job: Job,
    signal: SparseSignal,
    log_tail: Tensor,
    rows: slice,
    raw: Tensor,
    gradient: Tensor | None,
) -> None:
    """The teacher's top tokens and the mass of all others."""
    T, metrics, target = job.temperature, job.metrics, _targets(job, raw, rows)
    present = signal.log_probs[rows] > NOTHING
    # Padding repeats the first token, so that it marks no other as taken.
    top = _Few.of(job, raw, torch.where(present, signal.ids[rows], signal.ids[rows, :1]))
    inside = torch.where(present, top.logits, NOTHING)
    log_p = torch.where(present, signal.log_probs[rows].to(inside.dtype), NOTHING)
    put(raw, top.ids, torch.full_like(inside, NOTHING))
    outside = backend.statistics(job, raw)

    # At temperature 1: what is reported, and the cross-entropy.
    log_sum = torch.logaddexp(outside.log_sum, inside.logsumexp(-1))
    q_outside, q_inside = (outside.log_sum - log_sum).exp(), (inside - log_sum[:, None]).exp()
    metrics["entropy"][rows] = log_sum - q_outside * outside.mean - (q_inside * inside).sum(-1)
    if target is not None:
        metrics["ce"][rows] = log_sum - target.logits[:, 0]
    teachers_first = inside.gather(-1, log_p.argmax(-1, keepdim=True))[:, 0]
    students_highest = torch.maximum(outside.maximum, inside.amax(-1))
    metrics["top1_agreement"][rows] = (teachers_first == students_highest).to(inside.dtype)

    # At temperature T: the divergence of the k + 1 cells.
    kd, d_inside, d_outside = _cells(
        job.divergence, log_p, log_tail.to(log_p.dtype), inside / T, outside.tempered_log_sum
    )
    metrics["kd"][rows] = job.squared * kd
    if gradient is None:
        return
    d_inside, d_outside = job.kd_slope * d_inside + job.ce_weight * q_inside, job.kd_slope * d_outside
    ce_outside = job.ce_weight * q_outside
    slopes = (d_outside + ce_outside, None) if T == 1 else (ce_outside, d_outside)
    backend.softmax_gradient(job, raw, gradient, outside, *slopes)
    put(gradient, top.ids, torch.where(present, d_inside, d_inside[:, :1]) * top.slope)
    _add_cross_entropy(job, target, gradient)


def _cells(
    divergence: Divergence,
    log_p: Float[Tensor, "rows k"],
    log_p_tail: Float[Tensor, " rows"],
    inside: Float[Tensor, "rows k"],
    log_outside: Float[Tensor, " rows"],
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows k"], Float[Tensor, " rows"]]:
    """The divergence of k + 1 cells (the tokens, and all else lumped into one) and its gradient.

    With ψ the slopes of the cells, the gradient on token i is ψᵢ − qᵢ Σψ. A token v of the tail gets its share of the
    tail, qᵥ / q_tail, of ψ_tail − q_tail Σψ. Padding has log p = NOTHING and `inside` = NOTHING.

    Args:
        inside: the student's scaled logits at the tokens.
        log_outside: the logsumexp of all its others.

    Returns:
        The value, the gradient on the k logits, and what the tail's tokens share.
    """
    log_q = torch.cat([inside, log_outside[:, None]], -1).log_softmax(-1).clamp(min=NOTHING)
    log_p = torch.cat([log_p, log_p_tail[:, None]], -1).clamp(min=NOTHING)
    q = log_q.exp()
    phi, psi = divergence.terms(log_p.exp(), q, log_p, log_q)
    gradient = psi - q * psi.sum(-1, keepdim=True)
    return phi.sum(-1), gradient[:, :-1], gradient[:, -1]
