"""The passes over a chunk of rows in plain torch: the reference, and what runs where nothing compiled can.

On a CPU it goes over a few rows at a time, so that what lies between reading the logits and writing the gradient over
them stays in the caches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from llm_distill.losses.fused.job import Job, RowStatistics
from llm_distill.signals import MixtureSignal

BLOCK_ELEMENTS = {"cpu": 2**19, "accelerator": 2**23}
"""Logits worked on at a time: 2 MiB and 32 MiB a temporary, of which there are about ten."""


def dense(
    job: Job,
    rows: slice,
    raw: Float[Tensor, "rows vocab"],
    teacher_raw: list[Tensor],
    gradient: Float[Tensor, "rows vocab"] | None,
) -> None:
    """The loss against a teacher's full distribution: fills `job.metrics[rows]`, and `gradient` if it is there.

    Args:
        rows: which rows of the job the chunk is.
        raw: the student's product, before bias and post-processing.
        teacher_raw: that of each teacher, [rows, vocab].
        gradient: where that of Σ rows on `raw` goes; may be `raw` itself.
    """
    T, head = job.temperature, job.student.head
    for block in _blocks(raw):
        here = slice(rows.start + block.start, rows.start + block.stop)
        targets = None if job.targets is None else job.targets[here, None]
        logits = job.student.logits(raw[block])
        parts = [
            teacher.logits(y[block]).to(logits.dtype) for teacher, y in zip(job.teachers, teacher_raw, strict=True)
        ]
        log_q, q = _log_softmax(logits)
        log_p, p = _log_mixture(job, parts, 1.0)
        _record(job, here, targets, log_p, p, log_q, q)
        log_q_T, q_T = (log_q, q) if T == 1 else _log_softmax(logits / T)
        log_p_T, p_T = (log_p, p) if T == 1 else _log_mixture(job, parts, T)
        phi, psi = job.divergence.terms(p_T, q_T, log_p_T, log_q_T)
        job.metrics["kd"][here] = job.squared * phi.sum(-1)
        if gradient is None:
            continue
        d_logits = (psi * job.kd_slope).addcmul_(q_T, -job.kd_slope * psi.sum(-1, keepdim=True))
        if job.ce_weight:
            assert targets is not None
            d_logits.add_(q, alpha=job.ce_weight)
            d_logits.scatter_add_(-1, targets, torch.full_like(targets, -job.ce_weight, dtype=q.dtype))
        gradient[block] = d_logits if head.is_linear else d_logits.mul_(head.post_process_slope(logits))


def statistics(job: Job, raw: Float[Tensor, "rows vocab"]) -> RowStatistics:
    """What a sparse signal and the cross-entropy need to know of full rows."""
    found = []
    for block in _blocks(raw):
        logits = job.student.logits_of_included(raw[block])
        maximum = logits.amax(-1)
        logits = logits - maximum[:, None]
        q = logits.softmax(-1)
        log_total = -q.amax(-1).log()  # the maximum has the share 1 / total
        mean = torch.linalg.vecdot(q, logits)
        T = job.temperature
        tempered_log_total = log_total if T == 1 else -(logits / T).softmax(-1).amax(-1).log()
        found.append(torch.stack([maximum, log_total, tempered_log_total, mean]))
    return RowStatistics(*torch.cat(found, -1))


def softmax_gradient(
    job: Job,
    raw: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"],
    found: RowStatistics,
    slope: Float[Tensor, " rows"],
    slope_T: Float[Tensor, " rows"] | None,
) -> None:
    """Gradient = (slope · softmax(z) + slope_T · softmax(z / T)) · ∂z/∂raw, both over the tokens not excluded."""
    head = job.student.head
    for block in _blocks(raw):
        logits = job.student.logits_of_included(raw[block])
        shifted = logits - found.maximum[block, None]
        d_logits = _exp(shifted - found.log_total[block, None]).mul_(slope[block, None])
        if slope_T is not None:
            q_T = _exp(shifted / job.temperature - found.tempered_log_total[block, None])
            d_logits.addcmul_(q_T, slope_T[block, None])
        gradient[block] = d_logits if head.is_linear else d_logits.mul_(head.post_process_slope(logits))


def _record(job: Job, rows: slice, targets: Tensor | None, log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor) -> None:
    """How alike the two distributions are at temperature 1, whatever is being minimised."""
    metrics = job.metrics
    metrics["entropy"][rows] = -torch.linalg.vecdot(q, log_q)
    metrics["kl"][rows] = torch.linalg.vecdot(p, log_p - log_q)
    metrics["acceptance"][rows] = torch.minimum(p, q).sum(-1)
    # The sum of both distances to the maximum is 0 where both are 0, and nowhere else. (An argmax is much slower.)
    highest_q, highest_p = log_q.amax(-1, keepdim=True), log_p.amax(-1, keepdim=True)
    distance = (log_p - highest_p).add_(log_q - highest_q)
    metrics["top1_agreement"][rows] = (distance.amax(-1) == 0).to(q.dtype)
    metrics["confidence"][rows], metrics["teacher_confidence"][rows] = highest_q[:, 0].exp(), highest_p[:, 0].exp()
    if targets is not None:
        at_q, at_p = log_q.gather(-1, targets), log_p.gather(-1, targets)
        metrics["ce"][rows], metrics["teacher_ce"][rows] = -at_q[:, 0], -at_p[:, 0]
        metrics["correct"][rows] = (at_q == highest_q)[:, 0].to(q.dtype)
        metrics["teacher_correct"][rows] = (at_p == highest_p)[:, 0].to(q.dtype)


def _log_mixture(job: Job, parts: list[Tensor], temperature: float) -> tuple[Tensor, Tensor]:
    """The logarithms and the probabilities p = Σ wᵢ softmax(zᵢ / T)."""
    if not isinstance(job.signal, MixtureSignal):
        return _log_softmax(parts[0] if temperature == 1 else parts[0] / temperature)
    pairs = zip(parts, job.signal.weights, strict=True)
    log_p = torch.stack([(z / temperature).log_softmax(-1) + math.log(w) for z, w in pairs]).logsumexp(0)
    return log_p, _exp(log_p)


def _log_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_q = logits.log_softmax(-1)
    return log_q, _exp(log_q)


def _exp(x: Tensor) -> Tensor:
    """eˣ for x ≤ 0. On a CPU, torch's exp can take three times as long as its exp2."""
    return (x * math.log2(math.e)).exp2_() if x.device.type == "cpu" else x.exp()


def _blocks(raw: Tensor) -> Iterator[slice]:
    elements = BLOCK_ELEMENTS["cpu" if raw.device.type == "cpu" else "accelerator"]
    step = max(1, elements // raw.shape[1])
    for start in range(0, len(raw), step):
        yield slice(start, min(start + step, len(raw)))
