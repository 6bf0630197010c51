"""How the benchmarks measure: as the gap report does, with the command that made the figures."""

from __future__ import annotations

import shlex
import sys
from typing import Any

from llm_distill.evaluation import measure
from llm_distill.evaluation.measure import MIB, peak_memory, seconds, synchronize

__all__ = ["MIB", "in_fresh_process", "machine", "peak_memory", "seconds", "synchronize"]


def machine(device: str) -> dict[str, Any]:
    """What a figure must be read with."""
    packages = ("torch", "transformers", "trl", "liger_kernel", "triton")
    return measure.machine(device, packages) | {"command": shlex.join(["python", *sys.argv])}


def in_fresh_process(script: str, task: dict[str, Any]) -> dict[str, Any]:
    """The JSON that `script --task …` prints as its last line; {"error": …} if it ends badly."""
    return measure.in_fresh_process([script], task)
