"""Ranks share the prompts and pairs of a comparison, and all find the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import evaluation_worker
import pytest
from evaluation_worker import compare, write_task
from launch import run_ranks


def test_two_ranks_find_what_one_finds(saved: Path, tmp_path: Path):
    tasks = write_task(tmp_path)
    worker = Path(evaluation_worker.__file__)
    run_ranks(worker, *map(str, (saved, tasks, tmp_path)), ranks=2)
    alone = _numbers(json.loads(json.dumps(compare(saved, tasks))))
    for rank in range(2):
        together = _numbers(json.loads((tmp_path / f"comparison-{rank}.json").read_text()))
        assert together.keys() == alone.keys()
        for path, value in alone.items():
            near = pytest.approx(value, rel=1e-4, abs=1e-4) if isinstance(value, float) else value
            assert together[path] == near, path


def _numbers(content: Any, at: str = "") -> dict[str, Any]:
    """All values of a nested JSON, by their path."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else None
    if items is None:
        return {at: content}
    return {path: value for key, item in items for path, value in _numbers(item, f"{at}/{key}").items()}
