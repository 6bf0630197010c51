"""What commands are given, and the one line with which they refuse it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROWS = {
    "text": {"text": "def f(x):\n    return x + 1"},
    "prompt": {"prompt": "def f(x):", "completion": "\n    return x + 1"},
    "messages": {
        "messages": [{"role": "user", "content": "What is 1 + 1?"}, {"role": "assistant", "content": "It is 2."}]
    },
}


def write_rows(path: Path, kind: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(12 * (json.dumps(ROWS[kind]) + "\n"))
    return str(path)


def as_flags(options: dict[str, Any]) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def refused(capsys: pytest.CaptureFixture[str], function: Callable[[list[str]], None], arguments: list[str]) -> str:
    """The one line with which `function(arguments)` exits, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        function(arguments)
    assert caught.value.code == 2
    *before, line = capsys.readouterr().err.splitlines()
    assert not any("Traceback" in other for other in before)
    assert line.startswith("llm-distill: error: ")
    return line
