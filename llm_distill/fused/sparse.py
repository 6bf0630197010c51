"""The loss of rows where the teacher says something about a few tokens, or nothing: no teacher product.

Full rows are touched twice, for their statistics and for a gradient that is a multiple of the softmax; all else is about k
tokens a row. The tokens that the teacher names are taken out of the full row, so that the mass of the others is exact
however little it is.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float
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


def _without_tail(
    backend: ModuleType, job: Job, signal: object, rows: slice, raw: Tensor, gradient: Tensor | None
) -> None:
    """Samples, whose loss is the cross-entropy with their weights, or nothing but the targets."""
    T, metrics, targets = job.temperature, job.metrics, job.targets_of(rows)
    found = backend.statistics(job, raw)
    metrics["entropy"][rows] = found.log_sum - found.mean
    target_logits = None if targets is None else job.student.logits_at(raw, targets)
    if target_logits is not None:
        metrics["ce"][rows] = found.log_sum - target_logits[:, 0]
    on_q, on_q_T = torch.full_like(found.mean, job.ce_weight), torch.zeros_like(found.mean)
    ids = w = logits = None
    if isinstance(signal, SparseSignal):
        ids, w = signal.ids[rows], signal.log_probs[rows].to(found.mean.dtype).exp()  # padding has weight 0
        logits = job.student.logits_at(raw, ids)
        metrics["kd"][rows] = job.squared * (w * (found.log_sum_T[:, None] - logits / T)).sum(-1)
        on_q_T = job.kd_slope * w.sum(-1)
    if gradient is None:
        return
    backend.softmax_gradient(job, raw, gradient, found, *((on_q + on_q_T, None) if T == 1 else (on_q, on_q_T)))
    if ids is not None:
        _add(job, gradient, ids, logits, -job.kd_slope * w)
    if targets is not None and job.ce_weight:
        _add(job, gradient, targets, target_logits, torch.full_like(target_logits, -job.ce_weight))


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
    T, metrics, targets = job.temperature, job.metrics, job.targets_of(rows)
    present = signal.log_probs[rows] > NOTHING
    ids = torch.where(present, signal.ids[rows], signal.ids[rows, :1])  # padding repeats the first: marks no other
    logits = job.student.logits_at(raw, ids)
    inside = torch.where(present, logits, NOTHING)
    log_p = torch.where(present, signal.log_probs[rows].to(inside.dtype), NOTHING)
    target_logits = None if targets is None else job.student.logits_at(raw, targets)
    put(raw, ids, torch.full_like(inside, NOTHING))
    outside = backend.statistics(job, raw)

    # At temperature 1: what is reported, and the cross-entropy.
    log_sum = torch.logaddexp(outside.log_sum, inside.logsumexp(-1))
    q_outside, q_inside = (outside.log_sum - log_sum).exp(), (inside - log_sum[:, None]).exp()
    metrics["entropy"][rows] = log_sum - q_outside * outside.mean - (q_inside * inside).sum(-1)
    if target_logits is not None:
        metrics["ce"][rows] = log_sum - target_logits[:, 0]
    top = inside.gather(-1, log_p.argmax(-1, keepdim=True))[:, 0]
    metrics["top1_agreement"][rows] = (top >= torch.maximum(outside.maximum, inside.amax(-1))).to(top.dtype)

    # At temperature T: the divergence of the k + 1 cells.
    kd, d_inside, d_outside = _cells(job.divergence, log_p, log_tail.to(log_p.dtype), inside / T, outside.log_sum_T)
    metrics["kd"][rows] = job.squared * kd
    if gradient is None:
        return
    d_inside, d_outside = job.kd_slope * d_inside + job.ce_weight * q_inside, job.kd_slope * d_outside
    ce_outside = job.ce_weight * q_outside
    slopes = (d_outside + ce_outside, None) if T == 1 else (ce_outside, d_outside)
    backend.softmax_gradient(job, raw, gradient, outside, *slopes)
    d_inside = torch.where(present, d_inside, d_inside[:, :1]) * job.student.head.post_process_slope(logits)
    put(gradient, ids, d_inside)
    if targets is not None and job.ce_weight:
        _add(job, gradient, targets, target_logits, torch.full_like(target_logits, -job.ce_weight))


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


def _add(job: Job, gradient: Tensor, ids: Tensor, logits: Tensor | None, values: Tensor) -> None:
    """Gradients on the logits of a few tokens, added to those on the raw product."""
    assert logits is not None
    put(gradient, ids, values * job.student.head.post_process_slope(logits), accumulate=True)
