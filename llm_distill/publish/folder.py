"""The output folder of a run: whether it is free, and its checkpoints, each of which is there whole or not at all."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import sort_checkpoints

from llm_distill.cache import manifest
from llm_distill.files import move_into
from llm_distill.generation import journal
from llm_distill.publish.record import FILE, OPTIONS_FILE

logger = logging.getLogger(__name__)

AT_WORK = "another run"
PARTIAL = ".partial"
"""Within an output folder: what is being written, until it is whole."""
MODEL_FILES = ("*.safetensors", "pytorch_model*.bin", "*.gguf", "config.json", "adapter_config.json", "tokenizer*.json")
OTHERS = {
    manifest.FILE: "a teacher cache",
    journal.SETTINGS_FILE: "generated texts",
    "dataset_info.json": "a dataset",
    "dataset_dict.json": "a dataset",
    OPTIONS_FILE: "a file that the record of a run would replace",
    **dict.fromkeys(MODEL_FILES, "a model"),
}
"""What a folder with such a file holds, if no run of ours has left it."""


def require_output_folder(folder: str | Path, inputs: Mapping[str, str | None]) -> None:
    """Raises ValueError if a student that is written there would take the place of something else, or lie among what
    is no run's.

    Args:
        folder: of a run that has not begun.
        inputs: what the run reads, by what it is: names of models or data, or folders.
    """
    place = Path(folder).expanduser().resolve()
    ways_out = "Choose another output_dir."
    if blocking := [path for path in (place, *place.parents) if path.is_file()]:
        raise ValueError(f"output_dir={folder} is no folder: {blocking[0]} is a file. {ways_out}")
    for what, path in (("the folder in which you are", Path.cwd()), ("your home", Path.home())):
        if path.resolve().is_relative_to(place):
            raise ValueError(f"output_dir={folder} is, or holds, {what}. {ways_out}")
    for what, name in inputs.items():
        if name and Path(name).expanduser().resolve() == place:
            raise ValueError(f"output_dir={folder} is also {what}, which the run reads and would overwrite. {ways_out}")


def require_unused(folder: Path) -> None:
    """Raises ValueError if there is what an earlier run, or something else, has left in the output folder."""
    if checkpoint := last_checkpoint(folder):
        raise ValueError(
            f"{checkpoint} is of an earlier run. Go on from it with resume_from_checkpoint=True "
            "(--resume_from_checkpoint true), or choose another output_dir."
        )
    if (folder / FILE).is_file() and any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{folder} has the student of an earlier run, which would be overwritten. Choose another output_dir, or "
            "remove the folder."
        )
    require_own(folder)


def require_own(folder: Path) -> None:
    """Raises ValueError if there is something in the folder that a student would be written over, and no run left."""
    if not (folder / FILE).is_file():
        for pattern, what in OTHERS.items():
            if paths := sorted(folder.glob(pattern)):
                raise ValueError(f"{folder} holds {what}, {paths[0].name}. Choose another output_dir.")


@contextmanager
def written_aside(folder: Path, is_writer: bool) -> Iterator[Path]:
    """A folder within `folder` to write into. When the block ends, what is there is moved into `folder`; if it fails,
    it is removed.

    Args:
        is_writer: whether this rank does so; all must have written by the end of the block.
    """
    aside = folder / PARTIAL
    try:
        yield aside
        if is_writer and aside.is_dir():
            move_into(aside, folder)
    finally:
        if is_writer:
            shutil.rmtree(aside, ignore_errors=True)


def last_checkpoint(folder: Path) -> Path | None:
    """The last one that is whole. Torn ones are named in a warning."""
    for name in reversed(sort_checkpoints(str(folder))):
        if reason := why_torn(Path(name)):
            logger.warning("%s is passed over: %s.", name, reason)
        else:
            return Path(name)
    return None


def why_torn(checkpoint: Path) -> str | None:
    """Why it is not whole: a kill, or a full disk, has cut a file short. None if it is."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        for path in checkpoint.glob("*.safetensors.index.json"):
            _require_files(checkpoint, json.loads(path.read_text())["weight_map"].values())
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError as error:
        return f"a JSON file of it is cut short ({error})"
    for path in checkpoint.rglob("*.safetensors"):
        try:
            safe_open(path, "pt").__enter__()
        except SafetensorError as error:
            return f"{path.name} is cut short ({error})"
    for path in (*checkpoint.rglob("*.pt"), *checkpoint.rglob("*.pth")):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is cut short"
    return None


def _require_files(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).stat()
