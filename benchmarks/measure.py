"""How the benchmarks measure: fresh processes, memory over a baseline, and what machine it was."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

MIB = 2**20


def machine(device: str) -> dict[str, Any]:
    """What a figure must be read with."""
    versions = {name: _version(name) for name in ("torch", "transformers", "trl", "liger_kernel", "triton")}
    name = torch.cuda.get_device_name() if device == "cuda" else _cpu()
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": name,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {package: version for package, version in versions.items() if version},
        "command": shlex.join(["python", *sys.argv]),
    }


def in_fresh_process(script: str, task: dict[str, Any]) -> dict[str, Any]:
    """The JSON that `script --task …` prints as its last line; {"error": …} if it ends badly."""
    command = [sys.executable, script, "--task", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"error": lines[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def seconds(function: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """Leaves in "mib" how far the resident (CPU) or allocated (CUDA) memory rose at most while inside."""
    result: dict[str, float] = {}
    gc.collect()
    synchronize(device)
    before = _now(device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    yield result
    synchronize(device)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM")
    result["mib"] = (peak - before) / MIB


def _now(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else _status("VmRSS")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
