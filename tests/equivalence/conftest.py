"""Running the workers to their end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import capture_worker
import pytest
from launch import CPU, WORKER, Run, run_to_end, shards
from transformers import PreTrainedTokenizerBase


@pytest.fixture
def run_worker(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Run]:
    """Runs the worker to its end and gives its weights and logs."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def run(name: str, ranks: int = 1, launcher: Path = CPU, **options: Any) -> Run:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        run_to_end(WORKER, str(folder), json.dumps(options), ranks=ranks, launcher=launcher)
        return Run(folder)

    return run


@pytest.fixture
def captured_shards(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., set[str]]:
    """Runs `capture_worker.py` to its end and gives the names of the shards that it leaves."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def run(ranks: int, launcher: Path = CPU, **options: Any) -> set[str]:
        folder = tmp_path / str(ranks)
        folder.mkdir()
        worker = Path(capture_worker.__file__)
        run_to_end(worker, str(folder), json.dumps(options), ranks=ranks, launcher=launcher)
        return shards(folder)

    return run
