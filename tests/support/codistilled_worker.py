"""One of several runs that teach each other: what the test of co-distillation launches, kills and launches again.

Usage: codistilled_worker.py SHARED NAME STEPS RESUME, with RESUME true or false. Writes SHARED/NAME.json, its log.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tiny import make_config, tiny_llama
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from worker import Pause, make_rows

from llm_distill import DistillationTrainer
from llm_distill.teachers.codistilled import CodistilledTeacher


def make_run(
    shared: Path, name: str, tokenizer: PreTrainedTokenizerBase, seed: int = 1, **options: object
) -> DistillationTrainer:
    defaults = {
        "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "ce_weight": 1.0,
        "save_strategy": "steps",
        "save_steps": 2,
        "teacher_codistilled": str(shared),
    }
    trainer = DistillationTrainer(
        model=tiny_llama(seed, hidden=16),
        args=make_config(shared / name, **(defaults | options)),
        train_dataset=make_rows([]),
        processing_class=tokenizer,
    )
    assert isinstance(trainer.teacher, CodistilledTeacher)
    trainer.teacher.every = 2
    return trainer


def main() -> None:
    shared, name, steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(shared.parent / "tokenizer")
    trainer = make_run(shared, name, tokenizer, seed=len(name), max_steps=steps, save_total_limit=2)
    trainer.add_callback(Pause(0.05))
    trainer.train(resume_from_checkpoint=sys.argv[4] == "true")
    (shared / f"{name}.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main()
