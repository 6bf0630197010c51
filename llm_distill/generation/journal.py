"""What was written, on disk from the moment it is there.

An answer is a line of a journal, written before the next is taken; a line that a kill has torn does not count. A
run that goes on opens a journal of its own. Filters read the journals and never change them, so another choice of
filters costs no new tokens.
"""

from __future__ import annotations

import json
import os
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from llm_distill.files import differences, write_atomically
from llm_distill.generation.engines.base import Answer, Completion
from llm_distill.models import without_places

SETTINGS_FILE = "generation.json"
FORMAT, VERSION = "llm_distill generation", 1
SECONDS_BETWEEN_SYNCS = 1.0
IDENTITY = ("teacher", "sampling", "tokenizer")
"""What all completions of a folder share. More prompts and other filters are welcome."""


def open_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Makes `folder` one of these settings, or sees that it is. A teacher is known by its weights, wherever they lie.

    Raises:
        ValueError: it is another run's, or has other things in it.
    """
    if not (folder / SETTINGS_FILE).is_file():
        if strange := [path.name for path in folder.iterdir() if not path.name.startswith(".")]:
            raise ValueError(f"{folder} is not a folder of generated texts and has other things in it: {strange[0]}.")
        save_settings(folder, settings)
        return
    stored, wanted = read_settings(folder), {name: settings[name] for name in IDENTITY}
    stored["teacher"], wanted["teacher"] = without_places(stored["teacher"], wanted["teacher"])
    if changes := differences(stored, wanted, "the folder"):
        raise ValueError(
            f"{folder} holds texts of another configuration. {'; '.join(changes)}. Choose another output_dir, or the "
            "settings that those were written with."
        )


def save_settings(folder: Path, settings: dict[str, Any]) -> None:
    content = {"format": FORMAT, "version": VERSION, **settings}
    write_atomically(folder / SETTINGS_FILE, (json.dumps(content, indent=2) + "\n").encode())


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Raises ValueError: no folder of generated texts, or one of a newer version."""
    path = Path(folder, SETTINGS_FILE)
    try:
        settings = json.loads(path.read_text())
        assert settings["format"] == FORMAT
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{folder} is not a folder of generated texts: {path.name} cannot be read.") from error
    if settings["version"] > VERSION:
        raise ValueError(f"{path} is of a newer version of llm-distill: pip install --upgrade llm-distill.")
    return settings


class Journal:
    """Writes answers, each at once."""

    def __init__(self, folder: Path) -> None:
        self._file = (folder / f"journal-{uuid.uuid4().hex}.jsonl").open("ab")
        self._synced = time.monotonic()

    def append(self, answer: Answer, **provenance: Any) -> dict[str, Any]:
        """Writes an answer and where it comes from, and returns both as an entry. A kill does not undo it, nor does a
        power cut a second later.
        """
        prompt = answer.prompt
        entry = {
            "prompt_id": prompt.id,
            "prompt": prompt.content,
            **prompt.options,
            "prompt_ids": answer.prompt_ids,
            "completions": [completion._asdict() for completion in answer.completions],
            "refused": answer.refused,
            "cost": answer.cost,
            **provenance,
        }
        text = json.dumps(entry, ensure_ascii=False).encode()
        self._file.write(b"%08x %s\n" % (zlib.crc32(text), text))
        self._file.flush()
        if time.monotonic() - self._synced > SECONDS_BETWEEN_SYNCS:
            self._sync()
        return entry

    def close(self) -> None:
        self._sync()
        self._file.close()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()


class JournalEntries:
    """The answers of a folder by prompt: where they lie, and not what they say. A folder that is not there has none.
    Of a prompt that was asked again after a refusal, the later answer counts.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises ValueError if a line was changed after it was written."""
        self._places: dict[str, tuple[Path, int]] = {}
        self.refused: set[str] = set()
        self.extra: set[str] = set()
        """What the messages have besides a text, by name."""
        self.cost = 0.0
        for path in sorted(Path(folder).glob("journal-*.jsonl")):
            place = 0
            with path.open("rb") as file:
                for line in file:
                    entry = _parse_line(line, path, place)
                    if entry is not None:
                        self._add(entry, (path, place))
                    place += len(line)

    def _add(self, entry: dict[str, Any], place: tuple[Path, int]) -> None:
        prompt_id = entry["prompt_id"]
        self.cost += entry["cost"]
        if prompt_id in self._places and prompt_id not in self.refused:
            return
        self._places[prompt_id] = place
        self.extra.update(*(completion.get("extra") or {} for completion in entry["completions"]))
        (self.refused.add if entry["refused"] else self.refused.discard)(prompt_id)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, prompt_id: str) -> bool:
        return prompt_id in self._places

    def read(self, prompt_ids: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Those of these prompts that are there, in the order asked for."""
        files: dict[Path, BinaryIO] = {}
        with ExitStack() as opened:
            for prompt_id in prompt_ids:
                if prompt_id in self._places:
                    path, place = self._places[prompt_id]
                    if path not in files:
                        files[path] = opened.enter_context(path.open("rb"))
                    files[path].seek(place)
                    entry = _parse_line(files[path].readline(), path, place)
                    assert entry is not None, "it was whole a moment ago"
                    entry["completions"] = [Completion(**fields) for fields in entry["completions"]]
                    yield entry


def _parse_line(line: bytes, path: Path, place: int) -> dict[str, Any] | None:
    """None for the line that a kill has torn: the last one, without its end."""
    if not line.endswith(b"\n"):
        return None
    crc, _, text = line[:-1].partition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        raise ValueError(f"{path} is damaged at byte {place:,}. Remove that line: its prompt will be asked again.")
    return json.loads(text)
