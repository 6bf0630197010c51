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
from llm_distill.losses.fused.job import Choice, Few, Job, Projection, RowStatistics

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


class Kernels:
    """The compiled functions for one divergence and type of logits."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        pointer, number = ctypes.c_void_p, ctypes.c_double
        side = [("raw", pointer), ("bias", pointer), ("scale", number), ("cap", number)]
        self.Side = type("Side", (ctypes.Structure,), {"_fields_": side})
        self.Dense = self._structure(
            "student teacher | gradient targets | temperature kd_slope ce_weight | "
            "kd entropy kl acceptance agreement confidence teacher_confidence ce teacher_ce correct teacher_correct"
        )
        self.Statistics = self._structure(
            "student | | temperature most threshold | start maximum log_total tempered_log_total mean values ids"
        )
        self.Gradient = self._structure(
            "student | gradient | temperature | maximum slope log_total slope_T tempered_log_total"
        )
        self.Halves = self._structure("| high low product | is_last |")

    def _structure(self, fields: str) -> type[ctypes.Structure]:
        kinds = (self.Side, ctypes.c_void_p, ctypes.c_double, ctypes.c_void_p)
        listed = [(name, kind) for kind, names in zip(kinds, fields.split("|"), strict=True) for name in names.split()]
        return type("Arguments", (ctypes.Structure,), {"_fields_": [*listed, ("vocab", ctypes.c_long)]})

    def run(self, name: str, arguments: ctypes.Structure, rows: int) -> None:
        """All rows, shared out over torch's number of threads. The interpreter is free meanwhile."""
        run = getattr(self._library, name)
        run(ctypes.byref(arguments), ctypes.c_long(rows), ctypes.c_int(torch.get_num_threads()))


def kernels_of(job: Job) -> Kernels | None:
    """Those of its passes over rows, on a CPU and with one teacher at most."""
    sides = [job.student, *job.teachers]
    if len(sides) > 2 or job.student.hidden.device.type != "cpu":
        return None
    is_plain = all(side.head.is_linear and side.bias is None for side in sides)
    return compiled(job.divergence, sides[0].hidden.dtype, sides[-1].hidden.dtype, is_plain)


def dense(
    job: Job,
    rows: slice,
    raw: Float[Tensor, "rows vocab"],
    teacher_raw: list[Tensor],
    gradient: Float[Tensor, "rows vocab"] | None,
) -> None:
    """As `torch_backend.dense`, of one teacher."""
    kernels = kernels_of(job)
    assert kernels is not None
    values = {name: metric[rows] for name, metric in job.metrics.items()}
    targets = None if job.targets is None else job.targets[rows].contiguous()
    arguments = kernels.Dense(
        student=_side(kernels, job.student, raw),
        teacher=_side(kernels, job.teachers[0], teacher_raw[0]),
        gradient=_pointer(gradient),
        targets=_pointer(targets),
        temperature=job.temperature,
        kd_slope=job.kd_slope,
        ce_weight=job.ce_weight,
        kd=_pointer(values["kd"]),
        entropy=_pointer(values["entropy"]),
        kl=_pointer(values["kl"]),
        acceptance=_pointer(values["acceptance"]),
        agreement=_pointer(values["top1_agreement"]),
        confidence=_pointer(values["confidence"]),
        teacher_confidence=_pointer(values["teacher_confidence"]),
        ce=_pointer(values.get("ce")),
        teacher_ce=_pointer(values.get("teacher_ce")),
        correct=_pointer(values.get("correct")),
        teacher_correct=_pointer(values.get("teacher_correct")),
        vocab=raw.shape[1],
    )
    kernels.run("dense", arguments, len(raw))
    values["kd"] *= job.squared


def statistics(job: Job, raw: Float[Tensor, "rows vocab"]) -> RowStatistics:
    """As `torch_backend.statistics`."""
    return statistics_and_few(job, raw, Choice(0))[0]


def statistics_and_few(
    job: Job, raw: Float[Tensor, "rows vocab"], choice: Choice, start: Float[Tensor, " rows"] | None = None
) -> tuple[RowStatistics, Few]:
    """The same, and the logits of a few tokens while the row is at hand; of equal ones the first are the likeliest.

    Args:
        start: of each row's draw, from 0 to 1; needed with a threshold.
    """
    kernels = kernels_of(job)
    assert kernels is not None
    result = RowStatistics(*job.metrics["entropy"].new_empty(4, len(raw)))
    values = result.maximum.new_empty(len(raw), choice.most)
    few = Few(values, torch.empty_like(values, dtype=torch.long), raw.shape[1])
    start = None if start is None else start.to(values.dtype).contiguous()
    arguments = kernels.Statistics(
        student=_side(kernels, job.student, raw),
        temperature=job.temperature,
        most=choice.most,
        threshold=choice.threshold,
        start=_pointer(start),
        **{name: _pointer(value) for name, value in result._asdict().items()},
        values=_pointer(few.values),
        ids=_pointer(few.ids),
        vocab=raw.shape[1],
    )
    kernels.run("statistics", arguments, len(raw))
    return result, few


def softmax_gradient(
    job: Job,
    raw: Float[Tensor, "rows vocab"],
    gradient: Float[Tensor, "rows vocab"],
    found: RowStatistics,
    slope: Float[Tensor, " rows"],
    slope_T: Float[Tensor, " rows"] | None,
) -> None:
    """As `torch_backend.softmax_gradient`."""
    kernels = kernels_of(job)
    assert kernels is not None
    slope, slope_T = slope.contiguous(), None if slope_T is None else slope_T.contiguous()
    arguments = kernels.Gradient(
        student=_side(kernels, job.student, raw),
        gradient=_pointer(gradient),
        temperature=job.temperature,
        slope=_pointer(slope),
        maximum=_pointer(found.maximum),
        log_total=_pointer(found.log_total),
        slope_T=_pointer(slope_T),
        tempered_log_total=_pointer(found.tempered_log_total),
        vocab=raw.shape[1],
    )
    kernels.run("gradient", arguments, len(raw))


def add_halves(
    job: Job,
    high: Float[Tensor, "rows width"],
    low: Int[Tensor, "rows width"],
    product: Float[Tensor, "rows width"],
    *,
    is_last: bool,
) -> None:
    """Adds bfloat16 to float32 numbers of which `high` are the upper 16 bits, as bfloat16, and `low` the others. The
    last time `high` becomes the sum rounded to the nearest bfloat16.
    """
    kernels = kernels_of(job)
    assert kernels is not None
    pointers = {name: _pointer(each) for name, each in (("high", high), ("low", low), ("product", product))}
    kernels.run("add_halves", kernels.Halves(**pointers, is_last=is_last, vocab=high.shape[1]), len(high))


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


def _side(kernels: Kernels, projection: Projection, raw: Tensor) -> ctypes.Structure:
    head = projection.head
    return kernels.Side(_pointer(raw), _pointer(projection.bias), head.scale, head.soft_cap or 0.0)


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
