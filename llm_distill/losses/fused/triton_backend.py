"""Losses and gradients of a chunk of rows on a GPU: Triton kernels, one program a row.

Two kernels a chunk for a teacher's full distribution: one for the statistics of each side, one for value and gradient,
which gets the divergence passed in as a function. Each reads the logits once (the second twice, unless Σψ is known).
"""

from __future__ import annotations

import functools
import itertools
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
from llm_distill.losses.fused.job import Job, Projection, RowStatistics

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


def dense(
    job: Job,
    rows: slice,
    raw: Float[Tensor, "rows vocab"],
    teacher_raw: list[Tensor],
    gradient: Float[Tensor, "rows vocab"] | None,
) -> None:
    """As `torch_backend.dense`, of one teacher."""
    teacher, values = job.teachers[0], {name: metric[rows] for name, metric in job.metrics.items()}
    z, y = statistics(job, raw), _statistics(teacher, job.temperature, teacher_raw[0], values["kd"])
    values["entropy"].copy_(z.log_total - z.mean)
    values["confidence"].copy_((-z.log_total).exp())
    values["teacher_confidence"].copy_((-y.log_total).exp())
    targets = None if job.targets is None else job.targets[rows]
    if targets is not None:
        z_target = job.student.logits_at(raw, targets[:, None])[:, 0]
        y_target = teacher.logits_at(teacher_raw[0], targets[:, None])[:, 0]
        values["ce"].copy_(z.log_total - (z_target - z.maximum))
        values["teacher_ce"].copy_(y.log_total - (y_target - y.maximum))
        for name, target, maximum in (("correct", z_target, z.maximum), ("teacher_correct", y_target, y.maximum)):
            values[name].copy_(target.isclose(maximum, rtol=1e-6, atol=1e-6))  # torch's tanh is not the kernels'
    (z_numbers, z_kinds), (y_numbers, y_kinds) = _side(job.student), _side(teacher)
    kernels.dense_kernel[(len(raw),)](
        raw,
        teacher_raw[0],
        _or(job.student.bias, raw),
        _or(teacher.bias, raw),
        _or(gradient, raw),
        _or(targets, raw),
        *(*z[:3], *y[:3]),
        *(values["kd"], values["kl"], values["acceptance"], values["top1_agreement"]),
        *(raw.shape[1], *z_numbers, *y_numbers, 1 / job.temperature, job.kd_slope, job.ce_weight),
        job.divergence.slope_sum or 0.0,
        *(*z_kinds, *y_kinds),
        FORMULA=formula(job.divergence),
        WANTS_GRADIENT=gradient is not None,
        WITH_CE=bool(job.ce_weight),
        SLOPE_SUM_KNOWN=job.divergence.slope_sum is not None,
        TEMPERED=job.temperature != 1,
        **_common(values["kd"]),
    )
    values["kd"] *= job.squared


def statistics(job: Job, raw: Float[Tensor, "rows vocab"]) -> RowStatistics:
    """As `torch_backend.statistics`."""
    return _statistics(job.student, job.temperature, raw, job.metrics["entropy"])


def softmax_gradient(
    job: Job,
    raw: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"],
    found: RowStatistics,
    slope: Float[Tensor, " rows"],
    slope_T: Float[Tensor, " rows"] | None,
) -> None:
    """As `torch_backend.softmax_gradient`."""
    numbers, kinds = _side(job.student)
    common = _common(slope)
    kernels.softmax_gradient_kernel[(len(raw), triton.cdiv(raw.shape[1], common["BLOCK"]))](
        raw,
        _or(job.student.bias, raw),
        gradient,
        *(*found[:3], slope, _or(slope_T, slope)),
        *(raw.shape[1], *numbers, 1 / job.temperature),
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
    source, name = "\n".join(lines), f"<formula {next(_numbers)} of {divergence}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # Triton asks for the source
    namespace = {"kernels": kernels, "tl": tl}
    exec(compile(source, name, "exec"), namespace)  # of numbers and of the names in TRITON
    return triton.jit(namespace["formula"])


_numbers = itertools.count()


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
    one = torch.zeros(1, 1, device=device)
    try:
        _statistics(Projection(LMHead(torch.nn.Linear(1, 1), 1), one, one, None), 1.0, one, one[0])
    except Exception as error:  # Triton's errors have no common class
        logger.warning("the loss runs in torch and not in Triton, which takes longer: %s", str(error)[:500])
        return False
    return True


def _statistics(side: Projection, temperature: float, raw: Tensor, like: Tensor) -> RowStatistics:
    result = RowStatistics(*like.new_empty(4, len(raw)))
    numbers, kinds = _side(side)
    kernels.statistics_kernel[(len(raw),)](
        raw,
        _or(side.bias, raw),
        *result,
        *(raw.shape[1], *numbers, 1 / temperature),
        *(*kinds, temperature != 1),
        **_common(like),
    )
    return result


def _side(side: Projection) -> tuple[tuple[float, float], tuple[bool, bool, bool]]:
    """(scale, cap) and (HAS_BIAS, PLAIN, HAS_CAP)."""
    head = side.head
    return (head.scale, head.soft_cap or 0.0), (side.bias is not None, head.is_linear, head.soft_cap is not None)


def _common(like: Tensor) -> dict[str, Any]:
    return {"REAL": tl.float64 if like.dtype == torch.float64 else tl.float32, "BLOCK": BLOCK, "num_warps": WARPS}


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer must point to something, even where the kernel does not look."""
    return other if tensor is None else tensor
