"""Losses and gradients of a chunk of rows on a CPU: `row_kernels.cpp`, compiled in a fraction of a second at first use.

The compiler is the machine's own (`CXX`, or g++). Where there is none, or it cannot do it, `torch_backend` does the
same in two to four times the time. Nothing is kept on disk: the library lies in a private folder until it is loaded.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_distill.divergences import Divergence
from llm_distill.losses.fused.formula import Language, UntranslatableError, translate
from llm_distill.losses.fused.task import (
    Chunk,
    HeadLossTask,
    Projection,
    RowStatistics,
    TokenChoice,
    TopTokens,
)

logger = logging.getLogger(__name__)

CPP = Language(
    statement="const real {name} = {value};",
    number="real({})",
    functions={
        "absolute": "abs_",
        "exp": "exp_",
        "expm1": "expm1_",
        "log": "log_",
        "log1p": "log1p_",
        "maximum": "max_",
        "minimum": "min_",
        "sign": "sign_",
    },
)
FLAGS = (
    "-std=c++14",  # whose headers are read in less time
    "-O3",
    "-march=native",
    *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else []),  # gcc halves them on Intel's
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-shared",
    "-fPIC",
)
TYPES = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}


def _pointers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_void_p) for name in names]


def _numbers(*names: str) -> list[tuple[str, type]]:
    return [(name, ctypes.c_double) for name in names]


VOCAB = ("vocab", ctypes.c_long)
DENSE_METRICS = (
    *("kd", "entropy", "kl", "acceptance", "top1_agreement", "confidence", "teacher_confidence"),
    *("ce", "teacher_ce", "correct", "teacher_correct"),
)


# What the functions of `row_kernels.cpp` are called with: the structures of the same names there.


class Side(ctypes.Structure):
    _fields_ = [*_pointers("raw", "bias"), *_numbers("scale", "cap"), ("stride", ctypes.c_long)]


class Dense(ctypes.Structure):
    _fields_ = [
        ("student", Side),
        ("teacher", Side),
        *_pointers("gradient", "targets", "log_outside"),
        *_numbers("temperature", "kd_slope", "ce_weight", "outside_weight"),
        *_pointers(*DENSE_METRICS, "log_total"),
        VOCAB,
    ]


class Statistics(ctypes.Structure):
    _fields_ = [
        ("student", Side),
        *_numbers("temperature", "most", "threshold"),
        *_pointers("start", "maximum", "log_total", "tempered_log_total", "mean", "values", "ids"),
        VOCAB,
    ]


class Gradient(ctypes.Structure):
    _fields_ = [
        ("student", Side),
        *_pointers("gradient"),
        *_numbers("temperature"),
        *_pointers("maximum", "slope", "log_total", "slope_T", "tempered_log_total"),
        VOCAB,
    ]


class Halves(ctypes.Structure):
    _fields_ = [*_pointers("high", "low", "product"), *_numbers("is_last"), VOCAB]


class Kernels:
    """The compiled functions for one divergence and type of logits: a back end, of one teacher at most."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def _run(self, name: str, arguments: ctypes.Structure, rows: int) -> None:
        """All rows, shared out over torch's number of threads. The interpreter is free meanwhile."""
        function = getattr(self._library, name)
        function(ctypes.byref(arguments), ctypes.c_long(rows), ctypes.c_int(torch.get_num_threads()))

    def dense(self, task: HeadLossTask, chunk: Chunk) -> None:
        """As `torch_backend.dense`."""
        raw, metrics = chunk.raw, {name: metric[chunk.rows] for name, metric in task.metrics.items()}
        targets = None if task.targets is None else task.targets[chunk.rows].contiguous()
        log_total = None if chunk.log_outside is None else torch.empty_like(chunk.log_outside)
        arguments = Dense(
            student=_side(task.student, raw),
            teacher=_side(task.teachers[0], chunk.teacher_raw[0]),
            gradient=_matrix(chunk.gradient, like=raw),
            targets=_pointer(targets),
            log_outside=_pointer(chunk.log_outside),
            temperature=task.temperature,
            kd_slope=task.kd_slope,
            ce_weight=task.ce_weight,
            outside_weight=task.outside_weight,
            log_total=_pointer(log_total),
            vocab=raw.shape[1],
            **{name: _pointer(metrics.get(name)) for name in DENSE_METRICS},
        )
        self._run("dense", arguments, len(raw))
        metrics["kd"] *= task.squared
        if chunk.log_outside is not None and log_total is not None:
            task.record_outside(chunk.rows, chunk.log_outside, log_total)

    def statistics(self, task: HeadLossTask, raw: Float[Tensor, "rows vocab"]) -> RowStatistics:
        """As `torch_backend.statistics`."""
        return self.statistics_and_tokens(task, raw, TokenChoice(0))[0]

    def statistics_and_tokens(
        self,
        task: HeadLossTask,
        raw: Float[Tensor, "rows vocab"],
        choice: TokenChoice,
        start: Float[Tensor, " rows"] | None = None,
    ) -> tuple[RowStatistics, TopTokens]:
        """The same, and the logits of a few tokens while the row is at hand; of equal ones the first are the likeliest.

        Args:
            start: of each row's draw, from 0 to 1; needed with a threshold.
        """
        statistics = RowStatistics(*task.metrics["entropy"].new_empty(4, len(raw)))
        values = statistics.maximum.new_empty(len(raw), choice.most)
        tokens = TopTokens(values, torch.empty_like(values, dtype=torch.long), raw.shape[1])
        start = None if start is None else start.to(values.dtype).contiguous()
        arguments = Statistics(
            student=_side(task.student, raw),
            temperature=task.temperature,
            most=choice.most,
            threshold=choice.threshold,
            start=_pointer(start),
            values=_pointer(tokens.values),
            ids=_pointer(tokens.ids),
            vocab=raw.shape[1],
            **{name: _pointer(value) for name, value in statistics._asdict().items()},
        )
        self._run("statistics", arguments, len(raw))
        return statistics, tokens

    def softmax_gradient(
        self,
        task: HeadLossTask,
        raw: Float[Tensor, "rows vocab"],
        gradient: Float[Tensor, "rows vocab"],
        statistics: RowStatistics,
        slope: Float[Tensor, " rows"],
        slope_T: Float[Tensor, " rows"] | None,
    ) -> None:
        """As `torch_backend.softmax_gradient`."""
        slope, slope_T = slope.contiguous(), None if slope_T is None else slope_T.contiguous()
        arguments = Gradient(
            student=_side(task.student, raw),
            gradient=_matrix(gradient, like=raw),
            temperature=task.temperature,
            slope=_pointer(slope),
            maximum=_pointer(statistics.maximum),
            log_total=_pointer(statistics.log_total),
            slope_T=_pointer(slope_T),
            tempered_log_total=_pointer(statistics.tempered_log_total),
            vocab=raw.shape[1],
        )
        self._run("gradient", arguments, len(raw))

    def add_halves(
        self,
        high: Float[Tensor, "rows width"],
        low: Int[Tensor, "rows width"],
        product: Float[Tensor, "rows width"],
        *,
        is_last: bool,
    ) -> None:
        """Adds bfloat16 to float32 numbers of which `high` are the upper 16 bits, as bfloat16, and `low` the others.
        The last time `high` becomes the sum rounded to the nearest bfloat16.
        """
        high_low_product = {"high": _pointer(high), "low": _pointer(low), "product": _pointer(product)}
        self._run("add_halves", Halves(**high_low_product, is_last=is_last, vocab=high.shape[1]), len(high))


def kernels_of(task: HeadLossTask) -> Kernels | None:
    """Those of its passes over rows, on a CPU and with one teacher at most."""
    sides = [task.student, *task.teachers]
    if len(sides) > 2 or task.student.hidden.device.type != "cpu":
        return None
    is_plain = all(side.head.is_linear and side.bias is None for side in sides)
    return compiled(task.divergence, sides[0].hidden.dtype, sides[-1].hidden.dtype, is_plain)


@functools.cache
def compiled(divergence: Divergence, student: torch.dtype, teacher: torch.dtype, is_plain: bool) -> Kernels | None:
    """The kernels for raw logits of these types (without a teacher, the student's twice, so that nothing is compiled
    for it alone), or None where the machine, a type or the formula does not allow them.

    Args:
        is_plain: raw logits are logits: no bias, scale or cap.
    """
    if student not in TYPES or teacher not in TYPES:
        return None
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not compiler or shutil.which(compiler[0]) is None:
        logger.warning("there is no C++ compiler (g++, or CXX): the loss runs in torch, which takes longer.")
        return None
    try:
        statements, phi, psi = translate(divergence, CPP)
    except UntranslatableError as reason:
        logger.warning("%s runs in torch and not compiled: %s cannot be translated.", divergence, reason)
        return None
    formula = " ".join([*statements, f"const real phi = {phi}, psi = {psi};"])
    defines = {
        "REAL": "double" if student == torch.float64 else "float",
        "STUDENT_LOGIT": TYPES[student],
        "TEACHER_LOGIT": TYPES[teacher],
        "IS_PLAIN": int(is_plain),
        "FORMULA": formula,
    }
    source = Path(__file__).with_name("row_kernels.cpp")
    try:
        with tempfile.TemporaryDirectory(prefix="llm_distill_") as folder:
            library = Path(folder, "row_kernels.so")
            flags = [*FLAGS, *(f"-D{name}={value}" for name, value in defines.items())]
            command = [*compiler, *flags, str(source), "-o", str(library), "-lmvec", "-lm"]
            subprocess.run(command, capture_output=True, text=True, check=True)
            return Kernels(ctypes.CDLL(str(library)))
    except (OSError, subprocess.CalledProcessError) as error:
        message = str(getattr(error, "stderr", "") or error).strip()[:500]
        logger.warning("the loss runs in torch and not compiled, which takes longer: %s", message)
        return None


def _side(projection: Projection, raw: Float[Tensor, "rows vocab"]) -> Side:
    head = projection.head
    return Side(
        raw=_matrix(raw, like=raw),
        bias=_pointer(projection.bias),
        scale=head.scale,
        cap=head.soft_cap or 0.0,
        stride=raw.stride(0),
    )


def _matrix(tensor: Tensor | None, like: Tensor) -> int | None:
    """The address of a matrix whose rows lie as far apart as those of another."""
    if tensor is None:
        return None
    assert tensor.stride() == like.stride() == (like.stride(0), 1) or not len(tensor)
    return tensor.data_ptr()


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
