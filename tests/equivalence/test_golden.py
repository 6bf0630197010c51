"""Runs of every kind are, step by step, what they were before the house was rearranged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from golden import NUMBERS, RUNS, TWO_RANKS, golden_tokenizer, numbers, two_ranks


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_the_steps_that_it_took(name: str) -> None:
    compare(name, numbers(RUNS[name](golden_tokenizer())))


def test_two_ranks_take_the_steps_that_they_took(tmp_path: Path) -> None:
    compare(TWO_RANKS, two_ranks(tmp_path, golden_tokenizer()))


def compare(name: str, found: dict[str, Any]) -> None:
    expected: dict[str, Any] = json.loads(NUMBERS.read_text())[name]
    assert len(found["history"]) == len(expected["history"])
    for step, (now, then) in enumerate(zip(found["history"], expected["history"], strict=True)):
        assert now == pytest.approx(then, rel=1e-8, abs=1e-10), step
    assert found["weights"] == pytest.approx(expected["weights"], rel=1e-9)
