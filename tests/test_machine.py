"""What the machine has, and processes of their own."""

from __future__ import annotations

import pytest

from llm_distill.machine import free_memory, peak_memory, reset_peak_memory, run_in_fresh_process, used_memory

MIB = 2**20


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL, as when memory runs out"),
        ("import sys; sys.exit('no such model')", "no such model"),
        ("import sys; sys.exit(3)", "ended with 3"),
    ],
)
def test_a_process_that_ends_badly_says_how(program: str, error: str) -> None:
    assert run_in_fresh_process(["-c", program], {}) == {"error": error}


def test_a_process_of_its_own_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    program = "import json, os, sys; print(json.dumps([sys.argv[2], 'WORLD_SIZE' in os.environ]))"
    assert run_in_fresh_process(["-c", program], {"size": 1}) == ['{"size": 1}', False]


def test_peak_memory_is_what_was_used_at_most_and_starts_again() -> None:
    reset_peak_memory("cpu")
    before = used_memory("cpu")
    _ = b"x" * (64 * MIB)
    del _
    assert peak_memory("cpu") - before >= 60 * MIB
    reset_peak_memory("cpu")
    assert peak_memory("cpu") - used_memory("cpu") < 32 * MIB


def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = free_memory("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert 0 < free_memory("cpu") == pytest.approx(alone / 4, rel=0.5)
