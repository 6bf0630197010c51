"""What measuring takes: fresh processes, memory over a baseline, and what machine it was."""

from __future__ import annotations

import gc
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

MIB = 2**20
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "codecarbon")
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells each rank: with it, a process that is none of them would wait for the others."""


def machine(device: str, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """What a figure must be read with."""
    versions = {name: _version(name) for name in packages}
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if is_cuda(device) else _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {package: version for package, version in versions.items() if version},
    }


def in_fresh_process(program: Sequence[str], task: dict[str, Any]) -> dict[str, Any]:
    """The JSON that `python *program --task …` prints as its last line; {"error": …} if it ends badly."""
    command = [sys.executable, *program, "--task", json.dumps(task)]
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return {"error": f"ended by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"ended with {done.returncode}"]
        return {"error": lines[-1][:200]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def is_cuda(device: str) -> bool:
    return torch.device(device).type == "cuda"


def seconds(function: Callable[[], object], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """Leaves in "mib" how far the resident (CPU) or allocated (CUDA) memory rose at most while inside."""
    result: dict[str, float] = {}
    before = memory(device)
    start_peak(device)
    yield result
    result["mib"] = (peak(device) - before) / MIB


def memory(device: str) -> int:
    """Bytes of this process: resident in main memory, or allocated on a CUDA device."""
    gc.collect()
    synchronize(device)
    return torch.cuda.memory_allocated(device) if is_cuda(device) else psutil.Process().memory_info().rss


def start_peak(device: str) -> None:
    """`peak` starts again from here. Not so for main memory outside Linux, where it is that of the whole process."""
    if is_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int:
    """The most bytes since `start_peak`."""
    synchronize(device)
    if is_cuda(device):
        return torch.cuda.max_memory_allocated(device)
    if Path("/proc/self/status").exists():
        found = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
        return int(found[0].split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def available_memory(device: str) -> int:
    """Bytes that can still be had: of the CUDA device, or of main memory within the limit of a container."""
    if is_cuda(device):
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used, stat = (Path("/sys/fs/cgroup", f"memory.{name}") for name in ("max", "current", "stat"))
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        cached = dict(line.split() for line in stat.read_text().splitlines())["inactive_file"]
        free = min(free, int(most) - int(used.read_text()) + int(cached))
    return max(free, 0)


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
