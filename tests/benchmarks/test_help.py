"""Every benchmark starts from where a person starts it, with all that it imports."""

from __future__ import annotations

from pathlib import Path

import pytest
from warm import run_python

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NAMES = [path.stem for path in sorted(BENCHMARKS.glob("*.py")) if "ArgumentParser" in path.read_text()]


@pytest.mark.parametrize("name", NAMES)
def test_it_starts(name: str) -> None:
    assert "--output" in run_python(BENCHMARKS / f"{name}.py", "--help")
