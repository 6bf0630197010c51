"""Files that are there whole or not at all, folders that one process writes, and in what two records differ."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

LOCK_FILE = ".lock"


def differences(
    stored: dict[str, Any], wanted: dict[str, Any], holder: str = "the cache", *, ignore_missing: bool = True
) -> list[str]:
    """`field: the cache has …, asked for is …` for each field that differs. A field that only one of them has is
    ignored, or else taken for None in the other.
    """
    stored, wanted = (_flat(json.loads(json.dumps(record))) for record in (stored, wanted))
    names = [name for name in wanted if name in stored] if ignore_missing else {**stored, **wanted}
    return [
        f"{name}: {holder} has {stored.get(name)!r}, asked for is {wanted.get(name)!r}"
        for name in names
        if stored.get(name) != wanted.get(name)
    ]


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file holds.

    Raises:
        ValueError: it is not there, cannot be read, or holds no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"it is no JSON ({error})"
        raise ValueError(f"{path} cannot be read: {reason}.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, and holds a {type(content).__name__}.")
    return content


def write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, also after a power cut."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the block ends, and is removed if it fails."""
    handle, name = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def move_into(source: Path, folder: Path) -> None:
    """Moves what is in one folder into another on the same disk, each file or folder at once. A folder of the same name
    is set aside for it within `source`.
    """
    for path in sorted(source.iterdir()):
        place = folder / path.name
        if place.is_dir():
            place.rename(source / f".replaced-{path.name}")
        path.replace(place)


def locked(folder: Path, at_work: str) -> filelock.AcquireReturnProxy:
    """The lock of a folder, which is made if need be: for `with`, or to be held. The system opens it when the process
    dies.

    Args:
        at_work: what may be writing there, for the message.

    Raises:
        ValueError: somebody else has it, or the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return filelock.FileLock(folder / LOCK_FILE).acquire(timeout=0)
    except filelock.Timeout as error:
        raise ValueError(f"{at_work} is writing into {folder}. Wait for it, or choose another folder.") from error
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror or error}.") from error
