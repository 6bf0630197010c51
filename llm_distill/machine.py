"""The machine at hand: what it is, how much memory it has left, and how much memory and time a piece of work takes."""

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
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "codecarbon")
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher tells each rank: with it, a process that is none of them would wait for the others."""

Device = torch.device | str


def describe_machine(device: Device, packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """What a figure must be read with."""
    versions = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if is_cuda(device) else _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": versions,
    }


def free_memory(device: Device) -> int:
    """Bytes that this rank may still take: of its accelerator, or its share of the machine's (or container's) RAM."""
    if is_cuda(device):
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reserved
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # no container, or one without a limit
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(statistics["inactive_file"]))
    return max(0, free) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def used_memory(device: Device) -> int:
    """Bytes of this process: resident in main memory, or allocated on a CUDA device."""
    gc.collect()
    synchronize(device)
    return torch.cuda.memory_allocated(device) if is_cuda(device) else psutil.Process().memory_info().rss


def reset_peak_memory(device: Device) -> None:
    """Lets `peak_memory` start again. Outside Linux, that of main memory is always of the whole process."""
    if is_cuda(device):
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: Device) -> int:
    """The most bytes of `used_memory` since `reset_peak_memory`."""
    synchronize(device)
    if is_cuda(device):
        return torch.cuda.max_memory_allocated(device)
    if Path("/proc/self/status").exists():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def seconds(function: Callable[[], object], device: Device) -> float:
    """How long a call takes, to the end of what it has the device do."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def duration(seconds: float) -> str:
    """In words."""
    for unit, length in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:.0f} s"


def synchronize(device: Device) -> None:
    if is_cuda(device):
        torch.cuda.synchronize(device)


def is_cuda(device: Device) -> bool:
    return torch.device(device).type == "cuda"


def run_in_fresh_process(program: Sequence[str], task: dict[str, Any]) -> dict[str, Any]:
    """The JSON that `python *program --task …` prints as its last line; {"error": …} if it ends badly."""
    command = [sys.executable, *program, "--task", json.dumps(task)]
    environment = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        return {"error": f"ended by {name}" + (", as when memory runs out" if name == "SIGKILL" else "")}
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"ended with {process.returncode}"]
        return {"error": lines[-1][:200]}
    return json.loads(process.stdout.strip().splitlines()[-1])


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
