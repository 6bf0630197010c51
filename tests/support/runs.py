"""Short runs of `DistillationTrainer`, and what they are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from tiny import make_config
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from worker import make_rows

from llm_distill import DistillationTrainer, TeacherCache
from llm_distill.cache.methods import Method
from llm_distill.capture.run import capture
from llm_distill.rows import Batch, View
from llm_distill.teachers import Teacher


def make_trainer(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    student: str | PreTrainedModel,
    teacher: Teacher | None = None,
    *,
    peft_config: PeftConfig | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
    **options: Any,
) -> DistillationTrainer:
    """A trainer over a few prepared rows in a fixed order; `options` are those of its configuration."""
    defaults = {
        "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
    }
    return DistillationTrainer(
        model=student,
        teacher=teacher,
        args=make_config(folder / "out", **(defaults | options)),
        train_dataset=make_rows([], shortest_prompt=2 if options.get("on_policy_share") else 0),
        processing_class=tokenizer,
        peft_config=peft_config,
        quantization_config=quantization_config,
    )


def save(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """A checkpoint as a user has it."""
    for part in filter(None, (model, tokenizer)):
        part.save_pretrained(folder)
    return folder


def fill_cache(
    trainer: DistillationTrainer, folder: Path | str, method: Method, teacher: Teacher | None = None, **options: Any
) -> TeacherCache:
    """A cache of what a trainer's teacher says about its texts."""
    return capture(teacher or trainer.teacher, trainer.data, folder, method, **options)


def first_batch(trainer: DistillationTrainer) -> Batch:
    """What the first step of `make_trainer`'s run learns from."""
    return trainer.data_collator([trainer.train_dataset[index] for index in range(2)])


def without_labels(batch: Batch) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def counted_logits(model: nn.Module, batch: Batch) -> Tensor:
    """What the model's own forward says at the rows that count; a learned prompt in front does not count."""
    return logits_at(model, View.of(batch))


def logits_at(model: nn.Module, view: View) -> Tensor:
    """The same of a view."""
    time = view.inputs["input_ids"].shape[1]
    with torch.no_grad():
        logits = model(**view.inputs).logits[:, -time:]
    return logits[view.positions.sample, view.positions.position]


def logged(trainer: DistillationTrainer, name: str) -> list[float]:
    """A metric at each logged step."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def copied_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}
