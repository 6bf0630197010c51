"""Losses and gradients of a chunk of rows on a GPU: Triton kernels, one program a row.

Two kernels a chunk for a teacher's full distribution: one for the statistics of each side, one for value and gradient,
which gets the divergence passed in as a function. Each reads the logits once (the second twice, unless Σψ is known).
"""

from __future__ import annotations

import functools
import linecache
import logging
from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from llm_distill.divergences import Divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused import triton_kernels as kernels
from llm_distill.losses.fused.formula import Language, UntranslatableError, translate
from llm_distill.losses.fused.task import Chunk, HeadLossTask, Projection, RowStatistics, is_likeliest

logger = logging.getLogger(__name__)

BLOCK, WARPS = 2048, 8
"""Logits a program works on at a time, and by how many warps."""

TRITON = Language(
    statement="{name} = {value}",
    number="{}",
    functions={
        "absolute": "kernels.absolute",
        "exp": "tl.exp",
        "expm1": "kernels.expm1",
        "log": "tl.log",
        "log1p": "kernels.log1p",
        "maximum": "tl.maximum",
        "minimum": "tl.minimum",
        "sign": "kernels.sign",
    },
)


def dense(task: HeadLossTask, chunk: Chunk) -> None:
    """As `torch_backend.dense`, of one teacher."""
    raw, teacher, teacher_raw = chunk.raw, task.teachers[0], chunk.teacher_raw[0]
    metrics = {name: metric[chunk.rows] for name, metric in task.metrics.items()}
    z = statistics(task, raw)
    y = _statistics(teacher, task.temperature, teacher_raw, metrics["kd"])
    metrics["entropy"].copy_(z.log_total - z.mean)
    metrics["confidence"].copy_((-z.log_total).exp())
    metrics["teacher_confidence"].copy_((-y.log_total).exp())
    targets = None if task.targets is None else task.targets[chunk.rows]
    if targets is not None:
        z_target = task.student.logits_at(raw, targets[:, None])[:, 0]
        y_target = teacher.logits_at(teacher_raw, targets[:, None])[:, 0]
        metrics["ce"].copy_(z.log_total - (z_target - z.maximum))
        metrics["teacher_ce"].copy_(y.log_total - (y_target - y.maximum))
        metrics["correct"].copy_(is_likeliest(z_target, z.maximum))
        metrics["teacher_correct"].copy_(is_likeliest(y_target, y.maximum))
    outside_slope = None
    if chunk.log_outside is not None:
        outside_mass = task.record_outside(chunk.rows, chunk.log_outside, z.maximum + z.log_total)
        outside_slope = task.outside_weight * outside_mass
    (z_numbers, z_kinds), (y_numbers, y_kinds) = _side(task.student, raw), _side(teacher, teacher_raw)
    kernels.dense_kernel[(len(raw),)](
        raw,
        teacher_raw,
        task.student.bias,
        teacher.bias,
        _matrix(chunk.gradient, like=raw),
        targets,
        outside_slope,
        *(*z[:3], *y[:3]),
        *(metrics["kd"], metrics["kl"], metrics["acceptance"], metrics["top1_agreement"]),
        *(raw.shape[1], *z_numbers, *y_numbers, 1 / task.temperature, task.kd_slope, task.ce_weight),
        task.divergence.slope_sum or 0.0,
        *(*z_kinds, *y_kinds),
        FORMULA=formula(task.divergence),
        WANTS_GRADIENT=chunk.gradient is not None,
        WITH_CE=bool(task.ce_weight),
        WITH_OUTSIDE=outside_slope is not None,
        SLOPE_SUM_KNOWN=task.divergence.slope_sum is not None,
        TEMPERED=task.temperature != 1,
        **_common(metrics["kd"]),
    )
    metrics["kd"] *= task.squared


def statistics(task: HeadLossTask, raw: Float[Tensor, "rows vocab"]) -> RowStatistics:
    """As `torch_backend.statistics`."""
    return _statistics(task.student, task.temperature, raw, task.metrics["entropy"])


def softmax_gradient(
    task: HeadLossTask,
    raw: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"],
    statistics: RowStatistics,
    slope: Float[Tensor, " rows"],
    slope_T: Float[Tensor, " rows"] | None,
) -> None:
    """As `torch_backend.softmax_gradient`."""
    numbers, kinds = _side(task.student, raw)
    common = _common(slope)
    kernels.softmax_gradient_kernel[(len(raw), triton.cdiv(raw.shape[1], common["BLOCK"]))](
        raw,
        task.student.bias,
        _matrix(gradient, like=raw),
        *(*statistics[:3], slope, slope_T),
        *(raw.shape[1], *numbers, 1 / task.temperature),
        *(*kinds, slope_T is not None),
        **common,
    )


@functools.cache
def formula(divergence: Divergence) -> Any:
    """The divergence's formula as a Triton function.

    Raises:
        UntranslatableError: it needs more than Triton has.
    """
    statements, phi, psi = translate(divergence, TRITON)
    lines = [
        "def formula(p, q, log_p, log_q):",
        *(f"    {line}" for line in statements),
        f"    return {phi}, {psi}",
        "",
    ]
    source, name = "\n".join(lines), f"<formula of {divergence}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # Triton asks for the source
    namespace = {"kernels": kernels, "tl": tl}
    exec(compile(source, name, "exec"), namespace)  # of numbers and of the names in TRITON
    return triton.jit(namespace["formula"])


def can_run(divergence: Divergence, device: torch.device) -> bool:
    """Whether the kernels can be used here; if not, it says why, once."""
    try:
        formula(divergence)
    except UntranslatableError as reason:
        logger.warning("%s runs in torch and not compiled: %s cannot be translated.", divergence, reason)
        return False
    return _launches(device)


@functools.cache
def _launches(device: torch.device) -> bool:
    """Triton needs a C compiler and a GPU that it knows. A tiny launch finds out."""
    number = torch.zeros(1, 1, device=device)
    try:
        _statistics(Projection(LMHead(torch.nn.Linear(1, 1), 1), number, number, None), 1.0, number, number[0])
    except Exception as error:  # Triton's errors have no common class
        logger.warning("the loss runs in torch and not in Triton, which takes longer: %s", str(error)[:500])
        return False
    return True


def _statistics(side: Projection, temperature: float, raw: Tensor, like: Tensor) -> RowStatistics:
    result = RowStatistics(*like.new_empty(4, len(raw)))
    numbers, kinds = _side(side, raw)
    kernels.statistics_kernel[(len(raw),)](
        raw,
        side.bias,
        *result,
        *(raw.shape[1], *numbers, 1 / temperature),
        *(*kinds, temperature != 1),
        **_common(like),
    )
    return result


def _side(side: Projection, raw: Tensor) -> tuple[tuple[int, float, float], tuple[bool, bool, bool]]:
    """(from one row to the next, scale, cap) and (HAS_BIAS, PLAIN, HAS_CAP)."""
    head, kinds = side.head, (side.bias is not None, side.head.is_linear, side.head.soft_cap is not None)
    return (raw.stride(0), head.scale, head.soft_cap or 0.0), kinds


def _matrix(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """The kernels take its rows to lie as far apart as those of another."""
    assert tensor is None or tensor.stride() == like.stride() == (like.stride(0), 1)
    return tensor


def _common(like: Tensor) -> dict[str, Any]:
    return {"REAL": tl.float64 if like.dtype == torch.float64 else tl.float32, "BLOCK": BLOCK, "num_warps": WARPS}
