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

from llm_distill.losses.fused.task import NOTHING, Chunk, HeadLossTask, RowStatistics
from llm_distill.signals import MixtureSignal

BLOCK_ELEMENTS = {"cpu": 2**19, "accelerator": 2**23}
"""Logits worked on at a time: 2 MiB and 32 MiB a temporary, of which there are about ten."""


def dense(task: HeadLossTask, chunk: Chunk) -> None:
    """The loss against a teacher's full distribution: fills the metrics of the chunk, and its gradient if it is
    wanted.
    """
    T, head = task.temperature, task.student.head
    for block in _blocks(chunk.raw):
        rows = slice(chunk.rows.start + block.start, chunk.rows.start + block.stop)
        targets = None if task.targets is None else task.targets[rows, None]
        logits = task.student.logits(chunk.raw[block])
        teacher_logits = [
            teacher.logits(raw[block]).to(logits.dtype)
            for teacher, raw in zip(task.teachers, chunk.teacher_raw, strict=True)
        ]
        log_q, q = _log_softmax(logits)
        log_p, p, disagreement = _log_mixture(task, rows, teacher_logits, 1.0)
        if disagreement is not None:
            task.metrics["disagreement"][rows] = disagreement
        _record(task, rows, targets, log_p, p, log_q, q)
        outside_slope = None
        if chunk.log_outside is not None:
            outside_mass = task.record_outside(rows, chunk.log_outside[block], logits.logsumexp(-1))
            outside_slope = task.outside_weight * outside_mass[:, None]
        log_q_T, q_T = (log_q, q) if T == 1 else _log_softmax(logits / T)
        log_p_T, p_T = (log_p, p) if T == 1 else _log_mixture(task, rows, teacher_logits, T)[:2]
        phi, psi = task.divergence.terms(p_T, q_T, log_p_T, log_q_T)
        kd, kd_slope = task.squared * phi.sum(-1), torch.as_tensor(task.kd_slope, dtype=q.dtype)
        if task.kd_row_weights != "equal":
            at_text = None if targets is None else log_p.gather(-1, targets)[:, 0]
            weights = task.weigh_kd(rows, -torch.linalg.vecdot(p, log_p), at_text, log_p.amax(-1))
            kd, kd_slope = weights * kd, task.kd_slope * weights[:, None]
        task.metrics["kd"][rows] = kd
        if chunk.gradient is None:
            continue
        d_logits = (psi * kd_slope).addcmul_(q_T, -kd_slope * psi.sum(-1, keepdim=True))
        if outside_slope is not None:
            d_logits.addcmul_(q, outside_slope, value=-1)
        if task.ce_weight:
            assert targets is not None
            d_logits.add_(q, alpha=task.ce_weight)
            d_logits.scatter_add_(-1, targets, torch.full_like(targets, -task.ce_weight, dtype=q.dtype))
        chunk.gradient[block] = d_logits if head.is_linear else d_logits.mul_(head.post_process_slope(logits))


def statistics(task: HeadLossTask, raw: Float[Tensor, "rows vocab"]) -> RowStatistics:
    """What a sparse signal and the cross-entropy need to know of full rows."""
    blocks = []
    for block in _blocks(raw):
        logits = task.student.logits(raw[block])
        maximum = logits.amax(-1)
        logits = (logits - maximum[:, None]).clamp_(min=NOTHING)
        q = logits.softmax(-1)
        log_total = -q.amax(-1).log()  # the maximum has the share 1 / total
        mean = torch.linalg.vecdot(q, logits)
        T = task.temperature
        tempered_log_total = log_total if T == 1 else -(logits / T).softmax(-1).amax(-1).log()
        blocks.append(torch.stack([maximum, log_total, tempered_log_total, mean]))
    return RowStatistics(*torch.cat(blocks, -1))


def softmax_gradient(
    task: HeadLossTask,
    raw: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"],
    statistics: RowStatistics,
    slope: Float[Tensor, " rows"],
    slope_T: Float[Tensor, " rows"] | None,
) -> None:
    """Gradient = (slope · softmax(z) + slope_T · softmax(z / T)) · ∂z/∂raw, both over the tokens not excluded."""
    head = task.student.head
    for block in _blocks(raw):
        logits = task.student.logits(raw[block])
        shifted = logits - statistics.maximum[block, None]
        d_logits = _exp(shifted - statistics.log_total[block, None]).mul_(slope[block, None])
        if slope_T is not None:
            q_T = _exp(shifted / task.temperature - statistics.tempered_log_total[block, None])
            d_logits.addcmul_(q_T, slope_T[block, None])
        gradient[block] = d_logits if head.is_linear else d_logits.mul_(head.post_process_slope(logits))


def log_outside(task: HeadLossTask, raw: Float[Tensor, "rows outside"]) -> Float[Tensor, " rows"]:
    """The logarithm of Σ exp z over the student's rows past the vocabulary, of their product."""
    return torch.cat([_outside_logits(task, raw[block]).logsumexp(-1) for block in _blocks(raw)])


def outside_gradient(
    task: HeadLossTask, rows: slice, raw: Float[Tensor, "rows outside"], gradient: Float[Tensor, "rows outside"]
) -> None:
    """The loss's gradient on that product, which may be `gradient` itself: outside_weight times the softmax over all
    rows of the matrix.
    """
    slope = task.outside_weight * task.metrics["outside_mass"][rows, None]
    for block in _blocks(raw):
        logits = _outside_logits(task, raw[block])
        gradient[block] = logits.softmax(-1) * slope[block] * task.student.head.post_process_slope(logits)


def _outside_logits(task: HeadLossTask, raw: Tensor) -> Tensor:
    return task.student.logits(raw, first=task.student.head.vocab_size).clamp(min=NOTHING)


def _record(
    task: HeadLossTask, rows: slice, targets: Tensor | None, log_p: Tensor, p: Tensor, log_q: Tensor, q: Tensor
) -> None:
    """How alike the two distributions are at temperature 1, whatever is being minimised."""
    metrics = task.metrics
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


def _log_mixture(
    task: HeadLossTask, rows: slice, logits: list[Tensor], temperature: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The teacher's logarithms and probabilities at a temperature, and how much its members differ."""
    log_ps = [_log_softmax(z if temperature == 1 else z / temperature) for z in logits]
    if len(log_ps) == 1:
        return *log_ps[0], None
    assert isinstance(task.signal, MixtureSignal), "no other has several"
    log_p, disagreement = task.signal.mix([log_p for log_p, _ in log_ps], rows)
    log_p.clamp_(min=NOTHING)
    return log_p, _exp(log_p), disagreement


def _log_softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    log_q = logits.log_softmax(-1).clamp_(min=NOTHING)
    return log_q, _exp(log_q)


def _exp(x: Tensor) -> Tensor:
    """eˣ for x ≤ 0. On a CPU, torch's exp can take three times as long as its exp2."""
    return (x * math.log2(math.e)).exp2_() if x.device.type == "cpu" else x.exp()


def _blocks(raw: Tensor) -> Iterator[slice]:
    elements = BLOCK_ELEMENTS["cpu" if raw.device.type == "cpu" else "accelerator"]
    step = max(1, elements // raw.shape[1])
    for start in range(0, len(raw), step):
        yield slice(start, min(start + step, len(raw)))
