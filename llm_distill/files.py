"""Files that are there whole or not at all, folders that one process writes, and in what two records differ."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import filelock

LOCK_FILE = ".lock"


def differences(stored: dict[str, Any], wanted: dict[str, Any], holder: str = "the cache") -> list[str]:
    """`field: the cache has …, asked for is …` for each field that is in both and differs."""
    ours, theirs = _flat(stored), _flat(wanted)
    return [
        f"{name}: {holder} has {ours[name]!r}, asked for is {value!r}"
        for name, value in theirs.items()
        if name in ours and json.dumps(ours[name]) != json.dumps(value)
    ]


def write_atomically(path: Path, content: bytes) -> None:
    """A reader sees the old file or the new one, also after a power cut."""
    handle, temporary = tempfile.mkstemp(prefix=".partial-", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


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
