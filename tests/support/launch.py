"""Scripts on one rank or several: each in a fork of the warm process, or as a user launches them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from safetensors.torch import load_file
from torch import Tensor
from warm import Program, warm_process

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


def environment_of(launcher: Path) -> dict[str, str]:
    """What `accelerate launch` with this configuration of DeepSpeed tells a program."""
    parser, options = launch_command_parser(), ["--config_file", str(launcher), "--num_processes", "2", "script.py"]
    arguments, defaults, _ = _validate_launch_command(parser.parse_args(options))
    arguments.deepspeed_fields_from_accelerate_config = ",".join([*defaults.deepspeed_config, "mixed_precision"])
    _, environment = prepare_deepspeed_cmd_env(arguments)
    told = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    return told | {"CXX": "c++", "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}  # DeepSpeed compiles with CXX


def start_ranks(*arguments: str | Path, ranks: int = 1, launcher: Path | None = None) -> list[Program]:
    """`python *arguments` on each rank, with what `accelerate launch` tells it: on CPUs, or by a configuration of
    DeepSpeed.
    """
    environment = {"ACCELERATE_USE_CPU": "true", "TQDM_DISABLE": "1"} | (environment_of(launcher) if launcher else {})
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    programs = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        programs.append(warm_process().start(*arguments, **environment, **own))
    return programs


def wait_for_ranks(programs: Sequence[Program], timeout: float = 300) -> list[int]:
    """Their exit statuses. If one fails, the others are killed, as by a launcher."""
    end = time.monotonic() + timeout
    while None in (statuses := [program.poll() for program in programs]):
        if any(statuses) or time.monotonic() > end:
            for program in programs:
                program.kill()
        time.sleep(0.02)
    return [status for status in statuses if status is not None]


def run_ranks(*arguments: str | Path, ranks: int = 1, launcher: Path | None = None) -> str:
    """What `python *arguments` prints on each of them."""
    programs = start_ranks(*arguments, ranks=ranks, launcher=launcher)
    statuses = wait_for_ranks(programs)
    output = [program.output() for program in programs]
    assert not any(statuses), "\n".join([*output, *(program.errors() for program in programs)])[-5000:]
    return "\n".join(output)


def launch(script: Path, *arguments: str, ranks: int = 1, launcher: Path = CPU) -> str:
    """What a script prints under `accelerate launch`, as a user would start it."""
    options = {
        "config_file": launcher,
        "num_processes": ranks,
        "main_process_port": 0,  # a free one
        "num_cpu_threads_per_process": 1,
    }
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    environment = {name: value for name, value in os.environ.items() if name != "CXX"}  # DeepSpeed compiles with it
    environment |= {"DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, str(script), *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return done.stdout


def shards(folder: Path) -> set[str]:
    """Those of a cache, named by their bytes."""
    cache = TeacherCache(folder / "cache")
    assert cache.verify() == []
    return {shard.name for shard in cache.shards}
