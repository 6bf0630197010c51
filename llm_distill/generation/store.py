"""What the teacher has written, on disk from the moment it is there.

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
from pathlib import Path
from typing import Any

from llm_distill.files import differences, write_atomically
from llm_distill.generation.engines import Answer, Completion

SETTINGS_FILE = "generation.json"
FORMAT, VERSION = "llm_distill generation", 1
SECONDS_BETWEEN_SYNCS = 1.0
IDENTITY = ("teacher", "sampling")
"""What all completions of a folder share. More prompts and other filters are welcome."""


def open_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Makes `folder` one of these settings, or sees that it is.

    Raises:
        ValueError: it is another run's, or has other things in it.
    """
    path = folder / SETTINGS_FILE
    if not path.is_file():
        if strange := [each.name for each in folder.iterdir() if not each.name.startswith(".")]:
            raise ValueError(f"{folder} is not a folder of generated texts and has other things in it: {strange[0]}.")
        save_settings(folder, settings)
        return
    found = differences(read_settings(folder), {name: settings[name] for name in IDENTITY}, "the folder")
    if found:
        raise ValueError(
            f"{folder} holds texts of another configuration. {'; '.join(found)}. Choose another output_dir, or the "
            "settings that those were written with."
        )


def save_settings(folder: Path, settings: dict[str, Any]) -> None:
    content = {"format": FORMAT, "version": VERSION, **settings}
    write_atomically(folder / SETTINGS_FILE, (json.dumps(content, indent=2) + "\n").encode())


def read_settings(folder: str | Path) -> dict[str, Any]:
    """Raises:
    ValueError: no folder of generated texts, or one of a newer version.
    """
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

    def append(self, answer: Answer, **said: Any) -> dict[str, Any]:
        """With the system when it returns: a kill does not undo it, nor a power cut a second later. The entry."""
        prompt = answer.prompt
        entry = {
            "prompt_id": prompt.id,
            "prompt": prompt.content,
            "row": prompt.row,
            "prompt_ids": answer.prompt_ids,
            "completions": [completion._asdict() for completion in answer.completions],
            "refused": answer.refused,
            "cost": answer.cost,
            **said,
        }
        text = json.dumps(entry, ensure_ascii=False, default=str).encode()
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


class Entries:
    """The answers of a folder, by prompt: where they lie, and not what they say."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError if a line was changed after it was written."""
        self._places: dict[str, tuple[Path, int]] = {}
        self.cost, self.tokens, self.num_completions = 0.0, 0, 0
        for path in sorted(folder.glob("journal-*.jsonl")):
            place = 0
            with path.open("rb") as file:
                for line in file:
                    entry = _parsed(line, path, place)
                    if entry is not None and entry["prompt_id"] not in self._places:
                        self._places[entry["prompt_id"]] = (path, place)
                        self.cost += entry["cost"]
                        self.tokens += sum(each["tokens"] for each in entry["completions"])
                        self.num_completions += len(entry["completions"])
                    place += len(line)

    @classmethod
    def cost_in(cls, folder: str | Path) -> float:
        """What the answers of a folder have cost; nothing if there is none."""
        return cls(Path(folder)).cost

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, prompt_id: str) -> bool:
        return prompt_id in self._places

    def read(self, prompt_ids: Iterable[str]) -> Iterator[dict[str, Any]]:
        """Those of these prompts that are there, in the order asked for."""
        files: dict[Path, Any] = {}
        try:
            for prompt_id in prompt_ids:
                if prompt_id in self._places:
                    path, place = self._places[prompt_id]
                    if path not in files:
                        files[path] = path.open("rb")
                    files[path].seek(place)
                    entry = _parsed(files[path].readline(), path, place)
                    assert entry is not None, "it was whole a moment ago"
                    entry["completions"] = [Completion(**each) for each in entry["completions"]]
                    yield entry
        finally:
            for file in files.values():
                file.close()


def _parsed(line: bytes, path: Path, place: int) -> dict[str, Any] | None:
    """None for the line that a kill has torn: the last one, without its end."""
    if not line.endswith(b"\n"):
        return None
    crc, _, text = line[:-1].partition(b" ")
    if crc != b"%08x" % zlib.crc32(text):
        raise ValueError(f"{path} is damaged at byte {place:,}. Remove that line: its prompt will be asked again.")
    return json.loads(text)
