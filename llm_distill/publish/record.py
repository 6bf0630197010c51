"""Which distillation wrote a folder, so that another one neither goes on from it nor overwrites it unawares, and so
that a model card can be written from the folder alone.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from peft import PeftModel
from transformers import PreTrainedModel
from transformers.utils import extract_commit_hash

from llm_distill.config import DistillationConfig
from llm_distill.files import differences, write_atomically
from llm_distill.heads import base_of
from llm_distill.leaks import public_command, public_value, without_secrets
from llm_distill.losses.objective import Objective
from llm_distill.models import describe_model, without_places
from llm_distill.options import fields_chosen
from llm_distill.teachers import Teacher

FILE = "distillation.json"
OPTIONS_FILE = "run.yaml"
RESUMED = ("objective.", "teacher.")
"""What must be the same to go on from a checkpoint."""
IDENTITY = (*RESUMED, "student.", "data.")
"""What must be the same to be the same run; the rest, `run.`, says how it went."""
LIBRARIES = ("llm-distill", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
NOT_TOLD = {"config", "disable_tqdm", "local_rank", "push_to_hub", "report_to", "run_name"}
"""Options that change nothing. What is secret or local, `public_value` leaves out."""


def run_record(
    objective: Objective, teacher: Teacher | None, student: PreTrainedModel | PeftModel, revision: str | None = None
) -> dict[str, Any]:
    """What makes two runs the same distillation, flat: `objective.divergence`, `teacher.model`, `student.model`, …

    `revision` is the branch, tag or commit that the student was loaded from, if it is of the Hub.
    """
    record = {f"objective.{name}": value for name, value in objective.describe().items()}
    record |= {f"teacher.{name}": value for name, value in (teacher.describe() if teacher else {}).items()}
    start = base_of(student)
    record |= {f"student.{name}": value for name, value in describe_model(start, None).items() if name != "tokenizer"}
    record["student.revision"] = record["student.revision"] or _commit(start.config._name_or_path, revision)
    return record


def circumstances(
    command: list[str] | None, steps: int, log_history: list[dict[str, float]], ranks: int
) -> dict[str, Any]:
    """How it went: when, by which command, on what, with which libraries, and the last evaluation.

    `command` is by default that of this process; a notebook has none.
    """
    if command is None and sys.argv[0].endswith(".py") and "ipykernel" not in sys.argv[0]:
        command = ["python", *sys.argv]
    figures: dict[str, float] = {}
    for entry in log_history:
        figures |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    return {
        "run.date": datetime.now(UTC).date().isoformat(),
        "run.command": command and shlex.join(public_command(command)),
        "run.steps": steps,
        "run.ranks": ranks,
        "run.device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU ({platform.machine()})",
        "run.versions": {library: version(library) for library in LIBRARIES},
        "run.figures": figures,
    }


def run_options(*groups: Any, **more: Any) -> dict[str, Any]:
    """The options that are not at their defaults, as `--config` takes them. Of local places only the last part is told.

    Args:
        groups: dataclasses of options, such as a `DistillationConfig`.
        more: further ones.
    """
    return public_value(options_chosen(*groups) | more)


def options_chosen(*groups: Any) -> dict[str, Any]:
    """The same for whoever chose them: with their places, but without what is secret."""
    chosen: dict[str, Any] = {}
    for group in groups:
        names = (group.chosen if isinstance(group, DistillationConfig) else fields_chosen(group)) - NOT_TOLD
        chosen |= {option.name: _plain(getattr(group, option.name)) for option in fields(group) if option.name in names}
    return without_secrets(chosen)


def write_run(folder: str | Path, record: dict[str, Any], options: dict[str, Any]) -> None:
    """`distillation.json` and `run.yaml`, nothing local and nothing secret in either."""
    write_atomically(Path(folder, FILE), (json.dumps(record, indent=2) + "\n").encode())
    write_atomically(Path(folder, OPTIONS_FILE), yaml.safe_dump(options, sort_keys=False, allow_unicode=True).encode())


def require_same_run(checkpoint: str | Path, record: dict[str, Any]) -> None:
    """Raises ValueError, naming each field and both values, if `checkpoint` is of another distillation."""
    path = Path(checkpoint) / FILE
    if not path.is_file():
        return  # of plain fine-tuning, say: nothing to compare with
    if changes := changes_of_run(path, record, RESUMED, "the checkpoint"):
        raise ValueError(
            f"{checkpoint} is of another distillation: {'; '.join(changes)}. Resume with the settings it was made "
            "with, or start anew in another output_dir."
        )


def changes_of_run(path: Path, record: dict[str, Any], compared: Sequence[str], holder: str) -> list[str]:
    """In what a stored record is not this one, of the fields that begin with one of `compared`."""
    there, changes = json.loads(path.read_text()), list[str]()
    for part in compared:
        parts = (
            {name.removeprefix(part): value for name, value in fields.items() if name.startswith(part)}
            for fields in (there, record)
        )
        stored, wanted = ({part.rstrip("."): fields} for fields in without_places(*parts))
        changes += differences(stored, wanted, holder, ignore_missing=False)
    return changes


def _commit(name: str, revision: str | None) -> str | None:
    """Of a model of the Hub that has just been loaded; transformers no longer keeps it."""
    if not name or os.path.isdir(name) or os.path.isabs(name):
        return None
    path = try_to_load_from_cache(name, "config.json", revision=revision)
    return extract_commit_hash(path, None) if isinstance(path, str) else None


def _plain(value: Any) -> Any:
    """As YAML can hold it."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)
