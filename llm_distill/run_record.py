"""Which distillation wrote a checkpoint, so that another one does not go on from it unawares."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llm_distill.objective import Objective
from llm_distill.teachers import Teacher

FILE = "distillation.json"


def run_record(objective: Objective, teacher: Teacher | None) -> dict[str, Any]:
    """What makes two runs the same distillation, flat: `objective.divergence`, `teacher.model`, …"""
    record = {f"objective.{name}": value for name, value in asdict(objective).items()}
    record["objective.divergence"] = repr(objective.divergence)
    del record["objective.buffer_mib"]  # how it is computed, not what
    for name, value in (teacher.describe() if teacher else {}).items():
        record[f"teacher.{name}"] = value
    return record


class RecordRun(TrainerCallback):
    """Writes the record beside every checkpoint."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():  # a hyperparameter search keeps its own elsewhere
            (folder / FILE).write_text(json.dumps(self.record, indent=2) + "\n")


def require_same_run(checkpoint: str | Path, record: dict[str, Any]) -> None:
    """Raises ValueError, naming each field and both values, if `checkpoint` is of another distillation."""
    path = Path(checkpoint) / FILE
    if not path.is_file():
        return  # of plain fine-tuning, say: nothing to compare with
    earlier = json.loads(path.read_text())
    now = json.loads(json.dumps(record))
    fields = [name for name in {**earlier, **now} if earlier.get(name) != now.get(name)]
    if fields:
        changes = "; ".join(f"{name} was {earlier.get(name)!r}, is {now.get(name)!r}" for name in fields)
        raise ValueError(
            f"{checkpoint} is of another distillation: {changes}. Resume with the settings it was made with, or start "
            "anew in another output_dir."
        )
