"""The loss of rows where the teacher says something about a few tokens, or nothing: no teacher product.

Full rows are touched twice, for their statistics and for a gradient that is a multiple of the softmax; all else is
about k tokens a row. The tokens that the teacher names are taken out of the full row, so that the mass of the others is
exact however little it is.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_distill.divergences import Divergence
from llm_distill.losses.fused.task import NOTHING, Backend, Chunk, HeadLossTask, is_likeliest, set_tokens
from llm_distill.signals import SparseSignal, TokenSignal

SMALLEST = -87.0
"""The log-mass of a tail that is empty by rounding, as of 1 − Σ top in float32: the smallest number that is not 0. At 0
the reverse KL would be infinite."""

LARGEST_ADVANTAGE = 10.0
"""Nats by which the teacher's log-probability of a token may exceed the student's, or fall short of it: of a token that
the teacher takes for impossible, a single one would otherwise outweigh all others of a step."""


def sparse(backend: Backend, task: HeadLossTask, chunk: Chunk) -> None:
    """Fills the metrics of the chunk, and its gradient if it is wanted. Writes over `chunk.raw`."""
    if task.sparse_signal is not None and task.sparse_signal.log_tail is not None:
        _with_tail(backend, task, task.sparse_signal, task.sparse_signal.log_tail[chunk.rows], chunk)
    else:
        _without_tail(backend, task, chunk)


def _without_tail(backend: Backend, task: HeadLossTask, chunk: Chunk) -> None:
    """Samples, whose loss is the cross-entropy with their weights, or nothing but the targets.

    A policy gradient is such a cross-entropy too: the one sample is the text's own token, its weight the advantage.
    """
    T, metrics, signal, rows = task.temperature, task.metrics, task.sparse_signal, chunk.rows
    whole = backend.statistics(task, chunk.raw)
    metrics["entropy"][rows] = whole.log_total - whole.mean
    ids, weights = _named_tokens(task, rows, whole.mean)
    logits = task.student.logits_at(chunk.raw, ids)
    log_q = logits - whole.maximum[:, None] - whole.log_total[:, None]
    log_q_T = (logits - whole.maximum[:, None]) / T - whole.tempered_log_total[:, None]
    samples = ids.shape[1] - (task.targets is not None)
    if task.targets is not None:
        metrics["ce"][rows] = -log_q[:, -1]
        metrics["correct"][rows] = is_likeliest(logits[:, -1], whole.maximum).to(log_q.dtype)
    if isinstance(task.signal, TokenSignal):
        log_p = task.signal.log_probs[rows].to(log_q.dtype)
        advantages = (log_p - log_q[:, 0]).clamp(-LARGEST_ADVANTAGE, LARGEST_ADVANTAGE)
        weights[:, 0], metrics["kd"][rows], metrics["teacher_ce"][rows] = advantages, -advantages, -log_p
    elif signal is not None:
        kd = -task.squared * (weights * log_q_T)[:, :samples].sum(-1)
        if "kl" in metrics and signal.entropy is not None:
            metrics["kl"][rows] = kd - signal.entropy[rows]
        if task.kd_row_weights != "equal":
            assert signal.entropy is not None, "it is checked"
            row_weights = task.weigh_kd(rows, signal.entropy[rows].to(kd.dtype), None, kd)
            kd, weights[:, :samples] = row_weights * kd, row_weights[:, None] * weights[:, :samples]
        metrics["kd"][rows] = kd
    slope = _softmax_slope(task, chunk, whole.maximum + whole.log_total)
    if chunk.gradient is None:
        return
    slope_T = task.kd_slope * weights[:, :samples].sum(-1)
    slopes = (slope + slope_T, None) if T == 1 else (slope, slope_T)
    backend.softmax_gradient(task, chunk.raw, chunk.gradient, whole, *slopes)
    weights = torch.cat([task.kd_slope * weights[:, :samples], task.ce_weight * weights[:, samples:]], -1)
    d_logits = slope[:, None] * log_q.exp() + slope_T[:, None] * log_q_T.exp() - _summed_by_id(ids, weights)
    set_tokens(chunk.gradient, ids, d_logits * task.student.head.post_process_slope(logits))


def _softmax_slope(task: HeadLossTask, chunk: Chunk, log_total: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """What multiplies softmax(z) at temperature 1 in the gradient of all but the divergence. Records what is past the
    vocabulary, whose normaliser is `log_total`.
    """
    slope = torch.full_like(log_total, task.ce_weight)
    if chunk.log_outside is None:
        return slope
    return slope - task.outside_weight * task.record_outside(chunk.rows, chunk.log_outside, log_total)


def _named_tokens(task: HeadLossTask, rows: slice, like: Tensor) -> tuple[Tensor, Tensor]:
    """The samples and, as the last column, the targets: ids and weights."""
    ids, weights = [], []
    if (signal := task.sparse_signal) is not None:
        ids, weights = [signal.ids[rows]], [signal.log_probs[rows].to(like.dtype).exp()]  # padding has weight 0
    if isinstance(task.signal, TokenSignal):
        assert task.targets is not None, "it is checked"
        ids, weights = [task.targets[rows, None]], [torch.zeros_like(like)[:, None]]  # not known yet
    if task.targets is not None:
        ids, weights = [*ids, task.targets[rows, None]], [*weights, torch.ones_like(like)[:, None]]
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
    backend: Backend, task: HeadLossTask, signal: SparseSignal, log_tail: Float[Tensor, " rows"], chunk: Chunk
) -> None:
    """The teacher's top tokens and the mass of all others."""
    T, metrics, student, rows, raw = task.temperature, task.metrics, task.student, chunk.rows, chunk.raw
    present = ~(signal.log_probs[rows] <= NOTHING)  # so that NaN is seen
    # Padding repeats the first token, so that it marks no other as taken.
    ids = torch.where(present, signal.ids[rows], signal.ids[rows, :1])
    top_logits = student.logits_at(raw, ids)
    log_p = torch.where(present, signal.log_probs[rows].to(top_logits.dtype), NOTHING)
    log_tail = log_tail.to(log_p.dtype)
    if ids.shape[1] < signal.vocab_size:
        log_tail = log_tail.clamp(min=SMALLEST)
    target = None if task.targets is None else task.targets[rows, None]
    target_logits = None if target is None else student.logits_at(raw, target)
    set_tokens(raw, ids, torch.full_like(top_logits, NOTHING))
    rest = backend.statistics(task, raw)

    # At temperature 1: what is reported, and the cross-entropy. All relative to the highest logit of the row.
    highest = torch.maximum(rest.maximum, top_logits.amax(-1))
    inside = torch.where(present, top_logits - highest[:, None], NOTHING)
    rest_maximum = rest.maximum - highest
    log_rest = rest_maximum + rest.log_total
    log_sum = torch.logaddexp(log_rest, inside.logsumexp(-1))
    q_rest, q_inside = (log_rest - log_sum).exp(), (inside - log_sum[:, None]).exp()
    mean_rest = q_rest * (rest_maximum.clamp(min=NOTHING) + rest.mean)
    metrics["entropy"][rows] = log_sum - mean_rest - (q_inside * inside).sum(-1)
    if target_logits is not None:
        metrics["ce"][rows] = log_sum - (target_logits[:, 0] - highest)
        metrics["correct"][rows] = is_likeliest(target_logits[:, 0], highest).to(inside.dtype)
    teachers_first = inside.gather(-1, log_p.argmax(-1, keepdim=True))[:, 0]
    metrics["top1_agreement"][rows] = (teachers_first == 0).to(inside.dtype)
    softmax_slope = _softmax_slope(task, chunk, highest + log_sum)

    # At temperature T: the divergence of the k + 1 cells.
    log_rest_T = rest_maximum / T + rest.tempered_log_total
    kd, d_inside, d_rest = _cells(task.divergence, log_p, log_tail, inside / T, log_rest_T)
    if task.kd_row_weights != "equal":
        is_text = None if target is None else ids == target
        rated = rate_top_tokens(log_p, log_tail, task.student.head.vocab_size, is_text)
        row_weights = task.weigh_kd(rows, *rated, log_p.amax(-1))
        kd, d_inside, d_rest = row_weights * kd, row_weights[:, None] * d_inside, row_weights * d_rest
    metrics["kd"][rows] = task.squared * kd
    if chunk.gradient is None:
        return
    d_inside, slope_T = task.kd_slope * d_inside + softmax_slope[:, None] * q_inside, task.kd_slope * d_rest
    d_inside, slope = torch.where(present, d_inside, d_inside[:, :1]), softmax_slope * q_rest
    slopes = (slope + slope_T, None) if T == 1 else (slope, slope_T)
    backend.softmax_gradient(task, raw, chunk.gradient, rest, *slopes)
    if target is not None and target_logits is not None and task.ce_weight:
        d_inside = d_inside - task.ce_weight * (ids == target).to(d_inside.dtype)
        shifted = target_logits - rest.maximum[:, None]
        log_share, log_share_T = shifted - rest.log_total[:, None], shifted / T - rest.tempered_log_total[:, None]
        alone = slope[:, None] * log_share.exp() + slope_T[:, None] * log_share_T.exp() - task.ce_weight
        column = (ids == target).int().argmax(-1, keepdim=True)
        in_top = ids.gather(-1, column) == target
        d_target = torch.where(in_top, d_inside.gather(-1, column), alone)
        set_tokens(chunk.gradient, target, d_target * student.head.post_process_slope(target_logits))
    set_tokens(chunk.gradient, ids, d_inside * student.head.post_process_slope(top_logits))


def rate_top_tokens(
    log_p: Float[Tensor, "rows k"],
    log_tail: Float[Tensor, " rows"],
    vocab_size: int,
    is_text: Bool[Tensor, "rows k"] | None,
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"] | None]:
    """The teacher's entropy in nats, and its log-probability of the text's own token, from its top tokens (NOTHING
    where there is none), as if those of the tail were equally likely.
    """
    is_named = log_p > NOTHING
    log_other = log_tail.clamp(min=NOTHING) - (vocab_size - is_named.sum(-1)).clamp(min=1).to(log_p).log()
    entropy = -(log_p.exp() * log_p).sum(-1) - log_tail.exp() * log_other
    if is_text is None:
        return entropy, None
    is_text = is_text & is_named
    return entropy, torch.where(is_text.any(-1), log_p.where(is_text, NOTHING).amax(-1), log_other)


def _cells(
    divergence: Divergence,
    log_p: Float[Tensor, "rows k"],
    log_p_tail: Float[Tensor, " rows"],
    inside: Float[Tensor, "rows k"],
    log_rest: Float[Tensor, " rows"],
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows k"], Float[Tensor, " rows"]]:
    """The divergence of k + 1 cells (the tokens, and all else lumped into one) and its gradient.

    With ψ the slopes of the cells, the gradient on token i is ψᵢ − qᵢ Σψ. A token v of the tail gets its share of the
    tail, qᵥ / q_tail, of ψ_tail − q_tail Σψ. Padding has log p = NOTHING and `inside` = NOTHING.

    Args:
        inside: the student's scaled logits at the tokens.
        log_rest: the logsumexp of all its others.

    Returns:
        The value, the gradient on the k logits, and what the tail's tokens share.
    """
    log_q = torch.cat([inside, log_rest[:, None]], -1).log_softmax(-1).clamp(min=NOTHING)
    log_p = torch.cat([log_p, log_p_tail[:, None]], -1).clamp(min=NOTHING)
    q = log_q.exp()
    phi, psi = divergence.terms(log_p.exp(), q, log_p, log_q)
    gradient = psi - q * psi.sum(-1, keepdim=True)
    return phi.sum(-1), gradient[:, :-1], gradient[:, -1]
