"""How fast the loss and the training step are on a GPU: parts `blocks`, `fused_head` and `train_step` of `gpu.py`.

All in bfloat16, as a mixed-precision run computes, with 8,192 rows and widths 896 and 3584 (those of Qwen2.5-0.5B and
-7B). The cases are those of `fused_head.py` and `train_step.py`, with their measurements, one after the other in one
process; memory is what torch has allocated there.
"""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import fused_head
import torch
from measure import seconds, synchronize

from llm_distill.losses.fused import head_loss, triton_backend

Outcome = tuple[dict[str, Any], dict[str, tuple[float, float]]]
Check = Callable[[], Outcome]

ROW_KERNELS = ("statistics_kernel", "dense_kernel", "softmax_gradient_kernel")
BLOCKS = ((1024, 4), (1024, 8), (2048, 4), (2048, 8), (2048, 16), (4096, 8), (4096, 16), (8192, 16))
"""(BLOCK, WARPS)"""
THREADS_OF_MULTIPROCESSOR, THREADS_OF_WARP = 2048, 32
TUNED = ("forward_kl", "jsd", "top-64 with tail")
CASES = (
    *("forward_kl", "jsd", "forward_kl, T = 2", "forward_kl + CE", "top-64 with tail", "top-64 with tail + CE"),
    *("forward_kl, head frozen", "forward_kl, no_grad", "naive", "TRL", "Liger"),
)
VOCABS = (128_256, 151_936, 262_144)


def setting(device: str, short: bool, vocab: int) -> dict[str, Any]:
    """A problem, in the words of `fused_head.py`."""
    size = {"rows": 64, "student": 32, "teacher": 48} if short else {"rows": 8192, "student": 896, "teacher": 3584}
    measured = {"repeats": 1 if short else 5, "floor_chunks": [1024, 2048, 4096], "check_rows": 16 if short else 512}
    dtype = "float32" if device == "cpu" else "bfloat16"
    return {"device": device, "dtype": dtype, "vocab": 500 if short else vocab, **size, **measured}


def block_checks(device: str, short: bool) -> dict[str, Check]:
    common = setting(device, short, 151_936) | ({"rows": 8} if short else {})
    tuned = TUNED[:1] if short else TUNED
    checks: dict[str, Check] = {"rates": functools.partial(rates, device, short)}
    for name in tuned:
        checks[f"{name}: ms of 8,192 rows, by BLOCK x WARPS"] = functools.partial(try_blocks, name, common)
    for name in tuned:
        checks[f"{name}: µs a row, by rows in a chunk"] = functools.partial(try_rows, name, common)
    return checks


def rates(device: str, short: bool) -> Outcome:
    """What the GPU can do at most: bytes read and written by a copy, operations of a product of random matrices."""
    elements, size = (2**20, 256) if short else (2**31, 8192)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    source = torch.randn(elements // 2, device=device, dtype=dtype)
    copy, (a, b) = torch.empty_like(source), torch.randn(2, size, size, device=device, dtype=dtype)
    moved = 2 * source.numel() * source.element_size()
    return {
        "copy, GB/s": moved / 1e9 / median_seconds(lambda: copy.copy_(source), device),
        "product, TFLOP/s": 2 * size**3 / 1e12 / median_seconds(lambda: a @ b, device),
    }, {}


def try_blocks(name: str, common: dict[str, Any]) -> Outcome:
    """The row kernels' time (on a CPU, where they are interpreted, the whole loss's)."""
    run = runnable(name, common)
    times: dict[str, Any] = {}
    for block, warps in BLOCKS[:2] if common["rows"] < 64 else BLOCKS:
        with patched(common["device"], block=block, warps=warps):
            times[f"{block} x {warps}"] = in_row_kernels(run, common["device"])[0]
    return best_of(times), {}


def try_rows(name: str, common: dict[str, Any]) -> Outcome:
    """Whole rounds of programs on all multiprocessors beside powers of two; each with the products, and without."""
    device, total = common["device"], common["rows"]
    candidates = {4} if total < 64 else {512, 1024, 2048, 4096}
    if device == "cuda":
        programs = THREADS_OF_MULTIPROCESSOR // (THREADS_OF_WARP * triton_backend.WARPS)
        whole_round = torch.cuda.get_device_properties(device).multi_processor_count * programs
        candidates |= {whole_round // 2, whole_round, 2 * whole_round, 4 * whole_round}
    times: dict[str, Any] = {}
    for rows in sorted(candidates):
        chunks = max(round(total / rows), 1)
        run = runnable(name, common | {"rows": chunks * rows})
        with patched(device, rows=rows):
            kernels, whole = in_row_kernels(run, device)
        times[f"{rows}"] = whole * 1000 / (chunks * rows)
        times[f"{rows}, kernels"] = kernels * 1000 / (chunks * rows)
    return best_of(times), {}


def best_of(times: dict[str, float]) -> dict[str, Any]:
    whole = {name: value for name, value in times.items() if not name.endswith("kernels")}
    return times | {"best": min(whole, key=lambda name: whole[name])}


def runnable(name: str, common: dict[str, Any]) -> Callable[[], None]:
    """A case of `fused_head.py`: a call with its gradients."""
    problem = fused_head.Problem(common, common["rows"])
    loss = fused_head.ours(problem, fused_head.OURS[name])
    leaves = [problem.student_hidden, problem.student_head.weight]

    def run() -> None:
        torch.autograd.grad(loss(), leaves)

    return run


@contextmanager
def patched(device: str, block: int | None = None, warps: int | None = None, rows: int | None = None) -> Iterator[None]:
    changes = {(triton_backend, "BLOCK"): block, (triton_backend, "WARPS"): warps}
    if rows is not None:
        changes[head_loss, "chunk_rows"] = lambda *_: rows
    if device == "cpu":
        changes[head_loss, "choose_backend"] = lambda _: triton_backend
    with ExitStack() as patches:
        for (module, name), value in changes.items():
            if value is not None:
                patches.enter_context(mock.patch.object(module, name, value))
        yield


def in_row_kernels(run: Callable[[], None], device: str) -> tuple[float, float]:
    """Milliseconds of a call in our own kernels, and in all."""
    run()  # compiles
    whole = 1000 * median_seconds(run, device)
    if device == "cpu":
        return whole, whole
    calls = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(calls):
            run()
        synchronize(device)
    spent = sum(event.device_time_total for event in profile.key_averages() if event.key.startswith(ROW_KERNELS))
    if not spent:
        print("the profiler saw no kernel of ours: the times are those of the whole loss", flush=True)
    return spent / 1000 / calls or whole, whole


def median_seconds(run: Callable[[], object], device: str) -> float:
    run()
    return statistics.median(seconds(run, device) for _ in range(1 if device == "cpu" else 7))


def fused_head_checks(device: str, short: bool) -> dict[str, Check]:
    settings = [setting(device, short, vocab) for vocab in (VOCABS[:1] if short else VOCABS)]
    return {
        f"V = {common['vocab']:,}, {name}": functools.partial(fused_head_case, name, common)
        for common in settings
        for name in (("forward_kl", "naive") if short else CASES)
    }


def fused_head_case(name: str, common: dict[str, Any]) -> Outcome:
    task = common | (fused_head.OURS | fused_head.PEERS)[name]
    result = fused_head.measure(task)
    ratios = [case / floor for case, floor in zip(result["seconds"], result["floor_seconds"], strict=True)]
    figures = {
        "ms": 1000 * statistics.median(result["seconds"]),
        "x floor": statistics.median(ratios),
        "extra memory, MiB": result["extra_mib"],
        "first call, s": result["first_call_seconds"],
    }
    if name in ("forward_kl", "jsd", "naive", "TRL", "Liger"):
        figures["gradient error"] = fused_head.gradient_error(task)["gradient_error"]
    return figures, {"gradient error": (0.0, 1e-2)} if name in ("forward_kl", "jsd") else {}


def train_step_checks(device: str, short: bool) -> dict[str, Check]:
    import train_step

    common = {"device": device, "size": "tiny" if short else "large", "steps": 2 if short else 6}
    tasks = train_step.PARTS | {name: train_step.CASES[name] for name in train_step.CASES}
    names = ("HF Trainer step", "DistillationTrainer, sparse signal") if short else tuple(tasks)
    medians: dict[str, float] = {}
    return {name: functools.partial(train_step_case, name, common | tasks[name], medians) for name in names}


def train_step_case(name: str, task: dict[str, Any], medians: dict[str, float]) -> Outcome:
    """A part or a case; `medians` has those of the parts before it."""
    import train_step

    result = train_step.measure(task)
    gc.collect()  # a trainer and its models refer to each other
    medians[name] = statistics.median(result["seconds"])
    size = train_step.SIZES[task["size"]]
    figures = {
        "ms a step": 1000 * medians[name],
        "tokens/s": size["batch"] * size["length"] / medians[name],
        "peak memory, MiB": result["peak_mib"],
        "first step, s": result["first_seconds"],
    }
    parts = task.get("parts", ())
    if parts and all(part in medians for part in parts):
        figures["x parts"] = medians[name] / sum(medians[part] for part in parts)
    return figures, {}
