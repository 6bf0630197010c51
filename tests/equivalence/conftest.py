"""Running `worker.py` to its end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch import CPU, WORKER, Run, start
from transformers import PreTrainedTokenizerBase


@pytest.fixture
def run_worker(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Run]:
    """Runs the worker to its end and gives its weights and logs."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")

    def run(name: str, ranks: int = 1, launcher: Path = CPU, **options: Any) -> Run:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        process = start(WORKER, str(folder), json.dumps(options), ranks=ranks, launcher=launcher)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-5000:]
        return Run(folder)

    return run
