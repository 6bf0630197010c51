"""Trains a tiny student in a process of its own: what the tests of ranks and of resumption launch.

Usage: worker.py FOLDER OPTIONS, with OPTIONS as JSON: `config` for the DistillationConfig, `resume`, `pause` (seconds a
step, so that a test can kill it in between), `masked` (rows of the data in which nothing counts), `lora`, `moe`,
`other_tokens` (the teacher's), `dtype` (float64). Writes FOLDER/weights-RANK.safetensors and FOLDER/log.json.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from families import tiny_model
from peft import LoraConfig
from safetensors.torch import save_file
from tiny import VOCAB, make_config, tiny_llama
from transformers import PreTrainedTokenizerFast, TrainerCallback

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.data.corpus import train_tokenizer

ROWS = 24
SOME_CODE = ["def add(self, first, second):\n    return self.first + second", "for x in range(3):\n    print(x)"]


def make_rows(masked: list[int], shortest_prompt: int = 0) -> Dataset:
    """Sequences of random tokens and lengths, with prompts masked; nothing counts in the rows named in `masked`."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(ROWS):
        length = int(torch.randint(6, 24, (), generator=generator))
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        prompt = length if index in masked else int(torch.randint(shortest_prompt, length - 2, (), generator=generator))
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(rows)


def with_teacher_text(rows: Dataset) -> Dataset:
    """The same rows, of which the teacher reads a few tokens more: how many differs by row."""

    def add(row: dict[str, Any], number: int) -> dict[str, Any]:
        more = list(range(7, 9 + number % 5))
        return {
            "teacher_input_ids": more + row["input_ids"],
            "teacher_labels": [-100] * (len(more) + 1) + row["labels"][1:],
        }

    return rows.map(add, with_indices=True)


class Pause(TrainerCallback):
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        time.sleep(self.seconds)


def train(folder: Path, options: dict[str, Any], tokenizer: Any) -> DistillationTrainer:
    config = {
        "max_steps": 3,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "per_device_eval_batch_size": 2,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "disable_tqdm": True,
    }
    dtype = getattr(torch, options.get("dtype", "float64"))
    student = tiny_model("mixtral", seed=1, vocab_size=VOCAB) if options.get("moe") else tiny_llama(1, hidden=16)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False) if options.get("lora") else None
    own = train_tokenizer(Dataset.from_dict({"text": SOME_CODE}), 300) if options.get("other_tokens") else tokenizer
    rows = make_rows(options.get("masked", []), 2 if options.get("config", {}).get("on_policy_share") else 0)
    trainer = DistillationTrainer(
        model=student.to(dtype),
        teacher=None if "teacher_ema_decay" in options.get("config", {}) else LiveTeacher(tiny_llama(2).to(dtype), own),
        args=make_config(folder / "out", **(config | options.get("config", {}))),
        train_dataset=with_teacher_text(rows) if options.get("reads_more") else rows,
        eval_dataset=make_rows([]).select(range(7)),  # does not divide into batches over two ranks
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Pause(options.get("pause", 0.0))],
    )
    trainer.train(resume_from_checkpoint=options.get("resume"))
    return trainer


def main() -> None:
    folder, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    trainer = train(folder, options, PreTrainedTokenizerFast.from_pretrained(folder.parent / "tokenizer"))
    evaluation = trainer.evaluate()
    rank = trainer.accelerator.process_index
    weights = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    save_file(weights, folder / f"weights-{rank}.safetensors")
    if rank == 0:
        (folder / "log.json").write_text(json.dumps({"history": trainer.state.log_history, "evaluation": evaluation}))


if __name__ == "__main__":
    main()
