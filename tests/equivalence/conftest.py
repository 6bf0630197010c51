"""Running the workers to their end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import capture_worker
import pytest
from launch import WORKER, Run, run_ranks, shards
from transformers import PreTrainedTokenizerBase


def run_script(script: Path, folder: Path, options: dict[str, Any], ranks: int, launcher: Path | None) -> None:
    """On ranks in forks, with DeepSpeed if a configuration of it is the `launcher`."""
    run_ranks(script, str(folder), json.dumps(options), ranks=ranks, launcher=launcher)


@pytest.fixture
def run_worker(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Run]:
    """Runs the worker to its end and gives its weights and logs."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def run(name: str, ranks: int = 1, launcher: Path | None = None, **options: Any) -> Run:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        run_script(WORKER, folder, options, ranks, launcher)
        return Run(folder)

    return run


@pytest.fixture
def captured_shards(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., set[str]]:
    """Runs `capture_worker.py` to its end and gives the names of the shards that it leaves."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def run(ranks: int, launcher: Path | None = None, **options: Any) -> set[str]:
        folder = tmp_path / str(ranks)
        folder.mkdir()
        run_script(Path(capture_worker.__file__), folder, options, ranks, launcher)
        return shards(folder)

    return run
