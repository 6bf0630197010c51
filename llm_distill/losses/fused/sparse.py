"""The loss of rows where the teacher says something about a few tokens, or nothing: no teacher product.

Full rows are touched twice, for their statistics and for a gradient that is a multiple of the softmax; all else is
about k tokens a row. The tokens that the teacher names are taken out of the full row, so that the mass of the others is
exact however little it is.
"""

from __future__ import annotations

from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_distill.divergences import Divergence
from llm_distill.losses.fused.job import NOTHING, Job, put
from llm_distill.signals import SparseSignal

SMALLEST = -87.0
"""The log-mass of a tail that is empty by rounding, as of 1 − Σ top in float32: the smallest number that is not 0. At 0
the reverse KL would be infinite."""


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
    T, metrics = job.temperature, job.metrics
    found = backend.statistics(job, raw)
    metrics["entropy"][rows] = found.log_total - found.mean
    ids, weights = _named(job, signal, rows, found.mean)
    logits = job.student.logits_at(raw, ids)
    log_q = logits - found.maximum[:, None] - found.log_total[:, None]
    log_q_T = (logits - found.maximum[:, None]) / T - found.tempered_log_total[:, None]
    samples = ids.shape[1] - (job.targets is not None)
    if job.targets is not None:
        metrics["ce"][rows] = -log_q[:, -1]
    if isinstance(signal, SparseSignal):
        metrics["kd"][rows] = -job.squared * (weights * log_q_T)[:, :samples].sum(-1)
        if "kl" in metrics and signal.entropy is not None:
            metrics["kl"][rows] = metrics["kd"][rows] - signal.entropy[rows]
    if gradient is None:
        return
    slope, slope_T = torch.full_like(found.mean, job.ce_weight), job.kd_slope * weights[:, :samples].sum(-1)
    backend.softmax_gradient(job, raw, gradient, found, *((slope + slope_T, None) if T == 1 else (slope, slope_T)))
    weights = torch.cat([job.kd_slope * weights[:, :samples], job.ce_weight * weights[:, samples:]], -1)
    d_logits = slope[:, None] * log_q.exp() + slope_T[:, None] * log_q_T.exp() - _summed_by_id(ids, weights)
    put(gradient, ids, d_logits * job.student.head.post_process_slope(logits))


def _named(job: Job, signal: object, rows: slice, like: Tensor) -> tuple[Tensor, Tensor]:
    """The samples and, as the last column, the targets: ids and weights."""
    ids, weights = [], []
    if isinstance(signal, SparseSignal):
        ids, weights = [signal.ids[rows]], [signal.log_probs[rows].to(like.dtype).exp()]  # padding has weight 0
    if job.targets is not None:
        ids, weights = [*ids, job.targets[rows, None]], [*weights, torch.ones_like(like)[:, None]]
    if not ids:
        return torch.zeros(len(like), 0, dtype=torch.long, device=like.device), like.new_zeros(len(like), 0)
    return torch.cat(ids, -1), torch.cat(weights, -1)


def _summed_by_id(ids: Int[Tensor, "rows k"], weights: Float[Tensor, "rows k"]) -> Float[Tensor, "rows k"]:
    """For each token the weight of all its repetitions in the row."""
    ordered, order = ids.sort(dim=-1, stable=True)
    sums = torch.nn.functional.pad(weights.gather(-1, order).cumsum(-1), (1, 0))
    first, past = (torch.searchsorted(ordered, ids.contiguous(), right=right) for right in (False, True))
    return sums.gather(-1, past) - sums.gather(-1, first)


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
    T, metrics, student = job.temperature, job.metrics, job.student
    present = ~(signal.log_probs[rows] <= NOTHING)  # so that NaN is seen
    # Padding repeats the first token, so that it marks no other as taken.
    ids = torch.where(present, signal.ids[rows], signal.ids[rows, :1])
    top_logits = student.logits_at(raw, ids)
    log_p = torch.where(present, signal.log_probs[rows].to(top_logits.dtype), NOTHING)
    log_tail = log_tail.to(log_p.dtype)
    if ids.shape[1] < signal.vocab_size:
        log_tail = log_tail.clamp(min=SMALLEST)
    target = None if job.targets is None else job.targets[rows, None]
    target_logits = None if target is None else student.logits_at(raw, target)
    put(raw, ids, torch.full_like(top_logits, NOTHING))
    outside = backend.statistics(job, raw)

    # At temperature 1: what is reported, and the cross-entropy. All relative to the highest logit of the row.
    highest = torch.maximum(outside.maximum, top_logits.amax(-1))
    inside = torch.where(present, top_logits - highest[:, None], NOTHING)
    outside_maximum = outside.maximum - highest
    log_outside = outside_maximum + outside.log_total
    log_sum = torch.logaddexp(log_outside, inside.logsumexp(-1))
    q_outside, q_inside = (log_outside - log_sum).exp(), (inside - log_sum[:, None]).exp()
    mean_outside = q_outside * (outside_maximum.clamp(min=NOTHING) + outside.mean)
    metrics["entropy"][rows] = log_sum - mean_outside - (q_inside * inside).sum(-1)
    if target_logits is not None:
        metrics["ce"][rows] = log_sum - (target_logits[:, 0] - highest)
    teachers_first = inside.gather(-1, log_p.argmax(-1, keepdim=True))[:, 0]
    metrics["top1_agreement"][rows] = (teachers_first == 0).to(inside.dtype)

    # At temperature T: the divergence of the k + 1 cells.
    log_outside_T = outside_maximum / T + outside.tempered_log_total
    kd, d_inside, d_outside = _cells(job.divergence, log_p, log_tail, inside / T, log_outside_T)
    metrics["kd"][rows] = job.squared * kd
    if gradient is None:
        return
    d_inside, slope_T = job.kd_slope * d_inside + job.ce_weight * q_inside, job.kd_slope * d_outside
    d_inside, slope = torch.where(present, d_inside, d_inside[:, :1]), job.ce_weight * q_outside
    backend.softmax_gradient(job, raw, gradient, outside, *((slope + slope_T, None) if T == 1 else (slope, slope_T)))
    if target is not None and target_logits is not None and job.ce_weight:
        d_inside = d_inside - job.ce_weight * (ids == target).to(d_inside.dtype)
        shifted = target_logits - outside.maximum[:, None]
        log_share, log_share_T = shifted - outside.log_total[:, None], shifted / T - outside.tempered_log_total[:, None]
        alone = slope[:, None] * log_share.exp() + slope_T[:, None] * log_share_T.exp() - job.ce_weight
        column = (ids == target).int().argmax(-1, keepdim=True)
        in_top = ids.gather(-1, column) == target
        d_target = torch.where(in_top, d_inside.gather(-1, column), alone)
        put(gradient, target, d_target * student.head.post_process_slope(target_logits))
    put(gradient, ids, d_inside * student.head.post_process_slope(top_logits))


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
