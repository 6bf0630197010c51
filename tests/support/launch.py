"""Launching scripts on one rank or several, as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from llm_distill import TeacherCache

WORKER = Path(__file__).with_name("worker.py")
CPU = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"


@dataclass(frozen=True)
class Run:
    folder: Path

    def weights(self, rank: int = 0) -> dict[str, Tensor]:
        return load_file(self.folder / f"weights-{rank}.safetensors")

    @property
    def log(self) -> dict[str, Any]:
        return json.loads((self.folder / "log.json").read_text())

    def logged(self, key: str) -> list[float]:
        return [entry[key] for entry in self.log["history"] if key in entry]


def start(script: Path, *arguments: str, ranks: int = 1, launcher: Path = CPU) -> subprocess.Popen[str]:
    """`accelerate launch` on CPU, as a user would."""
    options = {
        "config_file": launcher,
        "num_processes": ranks,
        "main_process_port": 0,  # a free one
        "num_cpu_threads_per_process": 1,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command += [str(script), *arguments]
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONWARNINGS": "ignore",
    }
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def run_to_end(script: Path, *arguments: str, ranks: int = 1, launcher: Path = CPU) -> str:
    """What it prints."""
    process = start(script, *arguments, ranks=ranks, launcher=launcher)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-5000:]
    return output


def shards(folder: Path) -> set[str]:
    """Those of a cache, named by their bytes."""
    cache = TeacherCache(folder / "cache")
    assert cache.verify() == []
    return {shard.name for shard in cache.shards}
