"""How the benchmarks measure: as the gap report does, with the command that made the figures."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llm_distill import machine as this_machine
from llm_distill.machine import seconds, synchronize

__all__ = ["MIB", "in_fresh_process", "machine", "peak_memory", "seconds", "synchronize", "write_results"]

MIB = 2**20


def machine(device: str) -> dict[str, Any]:
    """What a figure must be read with."""
    packages = ("torch", "transformers", "trl", "liger_kernel", "triton")
    return this_machine.describe_machine(device, packages) | {"command": shlex.join(["python", *sys.argv])}


def in_fresh_process(script: str, task: dict[str, Any]) -> dict[str, Any]:
    """The JSON that `script --task …` prints as its last line; {"error": …} if it ends badly."""
    return this_machine.run_in_fresh_process([script], task)


def write_results(
    output: Path, title: str, found: dict[str, Any], *parts: str, began: float | None = None, device: str = "cpu"
) -> None:
    """OUTPUT.json, what was found with the machine, and OUTPUT.md, `parts` under the title.

    Args:
        began: `time.perf_counter()` at the start, where the whole time is told.
    """
    about = machine(device) | ({} if began is None else {"seconds": time.perf_counter() - began})
    took = "" if began is None else f", {about['seconds']:.0f} s"
    where = f"{about['date']}, {about['device']}{took}. `{about['command']}`"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.with_suffix(".json").write_text(json.dumps({"machine": about, **found}, indent=1) + "\n")
    output.with_suffix(".md").write_text("\n\n".join([f"# {title}", where, *parts]) + "\n")


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float]]:
    """Leaves in "mib" how far the resident (CPU) or allocated (CUDA) memory rose at most while inside."""
    result: dict[str, float] = {}
    before = this_machine.used_memory(device)
    this_machine.reset_peak_memory(device)
    yield result
    result["mib"] = (this_machine.peak_memory(device) - before) / MIB
