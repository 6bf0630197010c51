"""What a cache is: whose signals, over which tokens, kept how. One JSON file, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from llm_distill.files import differences, write_atomically
from llm_distill.models import without_places

FILE, HEAD_FILE, PLOT_FILE, CARD_FILE = "manifest.json", "head.safetensors", "fidelity.png", "README.md"
FORMAT, VERSION = "llm_distill teacher cache", 2
IDENTITY = ("teacher", "tokenizer", "vocab_size", "temperature", "method", "seed")
"""The fields that all of a cache's signals share. Another value of one of them makes another cache."""


class DamagedManifestError(ValueError):
    """The manifest is not what was written."""


class OldFormatError(ValueError):
    """The manifest is of a format that is no longer read."""


def identity(manifest: dict[str, Any]) -> str:
    """A hash of what all signals share; every shard carries it."""
    return _hash({"version": VERSION, **{name: manifest[name] for name in IDENTITY}})[:32]


def changes(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """In what another manifest is of another cache, as far as both tell."""
    teachers = without_places(stored.get("teacher", {}), wanted["teacher"])
    wanted = {name: wanted[name] for name in IDENTITY} | {"teacher": teachers[1]}
    return differences(stored | {"teacher": teachers[0]}, wanted)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Atomically, with a checksum of itself."""
    content = {"format": FORMAT, "version": VERSION, **manifest}
    content["checksum"] = _hash({name: value for name, value in content.items() if name != "checksum"})
    write_atomically(folder / FILE, (json.dumps(content, indent=2) + "\n").encode())


def parse_manifest(text: bytes, where: str) -> dict[str, Any]:
    """Raises:
    ValueError: not a manifest, one of another format, or a damaged one.
    """
    again = "Run `llm-distill capture` again with the same settings: it keeps the shards and writes a new one."
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise DamagedManifestError(f"{where} is damaged. {again} ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{where} is not the manifest of a teacher cache.")
    if not isinstance(manifest.get("version", 0), int):
        raise DamagedManifestError(f"{where} is damaged: its version is no number. {again}")
    if manifest.get("version", 0) > VERSION:
        raise ValueError(
            f"{where} has format version {manifest['version']}, and this version of llm-distill reads up to {VERSION}: "
            "upgrade it (pip install --upgrade llm-distill)."
        )
    if manifest.get("version", 0) < VERSION:
        raise OldFormatError(
            f"{where} has format version {manifest.get('version')}, which this version of llm-distill no longer reads: "
            "capture again, with --drop_stale."
        )
    checksum = manifest.pop("checksum", None)
    if checksum != _hash(manifest) or not manifest.keys() >= set(IDENTITY):
        raise DamagedManifestError(f"{where} is damaged: its checksum does not fit. {again}")
    return manifest


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
