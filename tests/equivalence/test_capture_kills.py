"""A capture that is killed, on one rank or several, ends in the very files that an undisturbed one writes."""

from __future__ import annotations

import json
import random
import signal
import tempfile
import time
from pathlib import Path

import capture_worker
import pytest
from launch import run_ranks, shards, start_ranks, wait_for_ranks
from transformers import PreTrainedTokenizerBase
from warm import Program

from llm_distill import TeacherCache

WORKER = Path(capture_worker.__file__)


@pytest.fixture(autouse=True)
def saved_tokenizer(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")


def start_capture(folder: Path, **options: float) -> Program:
    folder.mkdir(exist_ok=True)
    (program,) = start_ranks(WORKER, str(folder), json.dumps(options))
    return program


def wait_for_its_begin(program: Program) -> None:
    while "captures" not in program.output() and program.poll() is None:
        time.sleep(0.01)


def capture_whole(folder: Path) -> set[str]:
    program = start_capture(folder)
    assert program.wait() == 0, program.errors()
    return shards(folder)


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_end_in_the_same_bytes(tmp_path: Path, kills: int) -> None:
    program = start_capture(tmp_path / "whole")
    wait_for_its_begin(program)
    began = time.perf_counter()
    assert program.wait() == 0
    seconds, place = time.perf_counter() - began, random.Random(0)
    expected = shards(tmp_path / "whole")
    assert len(expected) == 15
    killed = partial = 0
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    while killed < kills:
        program = start_capture(folder)
        wait_for_its_begin(program)
        time.sleep(place.uniform(0, seconds))
        program.kill()
        killed += program.wait() == -signal.SIGKILL
        partial += bool(list((folder / "cache").glob(".partial-*")))
        if (folder / "cache" / "manifest.json").exists() and shards(folder) == expected:
            folder = Path(tempfile.mkdtemp(dir=tmp_path))  # complete: another one
        elif (folder / "cache" / "manifest.json").exists():
            assert shards(folder) < expected  # nothing else, and nothing twice
    assert partial > 0  # some were hit while they wrote
    assert capture_whole(folder) == expected
    assert not list((folder / "cache").glob(".partial-*"))
    assert sum(len(shard.keys) for shard in TeacherCache(folder / "cache").shards) == len(
        {key for key, _ in TeacherCache(folder / "cache").examples()}
    )


def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(tmp_path: Path) -> None:
    expected = capture_whole(tmp_path / "whole")
    largest = max(path.stat().st_size for path in (tmp_path / "whole" / "cache").glob("shard-*"))
    folder = tmp_path / "full"
    program = start_capture(folder, file_limit=largest - 1)
    assert program.wait() > 0
    lines = program.errors().splitlines()
    assert any("could not be written (" in line and "the same command goes on" in line for line in lines)
    assert not list((folder / "cache").glob(".partial-*"))
    assert shards(folder) < expected
    assert capture_whole(folder) == expected


def test_ranks_may_change_and_one_of_them_may_be_killed(tmp_path: Path) -> None:
    expected, folder = capture_whole(tmp_path / "one"), tmp_path / "two"
    folder.mkdir()
    programs = start_ranks(WORKER, str(folder), json.dumps({"pause": 0.2}), ranks=2)
    deadline = time.monotonic() + 120
    while len(list((folder / "cache").glob("shard-*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    programs[-1].kill()
    assert all(wait_for_ranks(programs))
    assert shards(folder) < expected
    for ranks in (2, 1):
        run_ranks(WORKER, str(folder), "{}", ranks=ranks)
        assert shards(folder) == expected
