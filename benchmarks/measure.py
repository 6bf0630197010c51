"""How the benchmarks measure: as the gap report does, with the command that made the figures."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llm_distill import machine as this_machine
from llm_distill.machine import seconds, synchronize

__all__ = ["MIB", "in_fresh_process", "machine", "peak_memory", "seconds", "synchronize"]

MIB = 2**20


def machine(device: str) -> dict[str, Any]:
    """What a figure must be read with."""
    packages = ("torch", "transformers", "trl", "liger_kernel", "triton")
    return this_machine.describe_machine(device, packages) | {"command": shlex.join(["python", *sys.argv])}


def in_fresh_process(script: str, task: dict[str, Any]) -> dict[str, Any]:
    """The JSON that `script --task …` prints as its last line; {"error": …} if it ends badly."""
    return this_machine.run_in_fresh_process([script], task)


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """Leaves in "mib" how far the resident (CPU) or allocated (CUDA) memory rose at most while inside."""
    result: dict[str, float] = {}
    before = this_machine.used_memory(device)
    this_machine.reset_peak_memory(device)
    yield result
    result["mib"] = (this_machine.peak_memory(device) - before) / MIB
