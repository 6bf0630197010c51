"""A capture that is killed, on one rank or several, ends in the very files that an undisturbed one writes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import capture_worker
import pytest
from launch import shards, start
from transformers import PreTrainedTokenizerBase

from llm_distill import TeacherCache

WORKER = Path(capture_worker.__file__)


class Forks:
    """Captures in forks of one warm process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.said: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"TQDM_DISABLE": "1"},
        )
        self.wait_for("ready")

    def wait_for(self, wanted: str | None = None) -> str:
        """The next line that is `wanted`, or a number: what is captured prints too."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            text = line.strip()
            self.said.append(text)
            if text == wanted or (wanted is None and text.lstrip("-").isdigit()):
                return text
        raise AssertionError("the worker has ended")

    def capture(self, folder: Path, kill_after: float | None = None, **options: float) -> int:
        """The exit status of a capture into `folder`."""
        assert self.process.stdin is not None
        print(json.dumps({"folder": str(folder), **options}), file=self.process.stdin, flush=True)
        child = int(self.wait_for())
        if kill_after is not None:
            time.sleep(kill_after)
            with suppress(ProcessLookupError):  # it was faster
                os.kill(child, signal.SIGKILL)
        return int(self.wait_for())


@pytest.fixture
def forks(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Forks]:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    forks = Forks(tmp_path / "worker")
    yield forks
    assert forks.process.stdin is not None
    forks.process.stdin.close()
    forks.process.wait(timeout=60)


def test_twenty_kills_end_in_the_same_bytes(tmp_path: Path, forks: Forks) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    began = time.perf_counter()
    assert forks.capture(whole) == 0
    seconds = time.perf_counter() - began
    expected, place = shards(whole), random.Random(0)
    assert len(expected) == 15
    kills = partial = 0
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    while kills < 20:
        status = forks.capture(folder, kill_after=place.uniform(0, seconds))
        kills += status == -signal.SIGKILL
        partial += bool(list((folder / "cache").glob(".partial-*")))
        if (folder / "cache" / "manifest.json").exists() and shards(folder) == expected:
            folder = Path(tempfile.mkdtemp(dir=tmp_path))  # complete: another one
        elif (folder / "cache" / "manifest.json").exists():
            assert shards(folder) < expected  # nothing else, and nothing twice
    assert partial > 0  # some were hit while they wrote
    assert forks.capture(folder) == 0
    assert shards(folder) == expected
    assert not list((folder / "cache").glob(".partial-*"))
    assert sum(len(shard.keys) for shard in TeacherCache(folder / "cache").shards) == len(
        {key for key, _ in TeacherCache(folder / "cache").examples()}
    )


def test_a_full_disk_is_a_clear_error_and_nothing_is_lost(tmp_path: Path, forks: Forks) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    assert forks.capture(whole) == 0
    largest = max((whole / "cache").glob("shard-*"), key=lambda path: path.stat().st_size).stat().st_size
    folder = tmp_path / "full"
    folder.mkdir()
    assert forks.capture(folder, file_limit=largest - 1) > 0
    assert any("could not be written (" in line and "the same command goes on" in line for line in forks.said)
    assert not list((folder / "cache").glob(".partial-*"))
    assert shards(folder) < shards(whole)
    assert forks.capture(folder) == 0
    assert shards(folder) == shards(whole)


def test_ranks_may_change_and_one_of_them_may_be_killed(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    outputs = {}
    for name, ranks, pause in (("one", 1, 0.0), ("two", 2, 0.2)):
        (tmp_path / name).mkdir()
        process = start(WORKER, str(tmp_path / name), json.dumps({"pause": pause}), ranks=ranks)
        if ranks == 2:
            cache = tmp_path / name / "cache"
            deadline = time.monotonic() + 120
            while len(list(cache.glob("shard-*"))) < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(children[-1]), signal.SIGKILL)
        outputs[name] = process.communicate(timeout=200)[0]
        assert (process.returncode == 0) == (ranks == 1), outputs[name]
    expected = shards(tmp_path / "one")
    assert shards(tmp_path / "two") < expected
    for ranks in (2, 1):
        process = start(WORKER, str(tmp_path / "two"), "{}", ranks=ranks)
        output = process.communicate(timeout=200)[0]
        assert process.returncode == 0, output
        assert shards(tmp_path / "two") == expected
