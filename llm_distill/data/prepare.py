"""Rows become batches exactly as TRL's `SFTTrainer` makes them: text, prompt/completion, chat, packing, masks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTTrainer

from llm_distill.config import DistillationConfig
from llm_distill.data.counts import RowCounts, StreamCounts, count_rows_left
from llm_distill.data.teacher_of_row import NamesTeacher, has_teacher_of_row, number_teachers
from llm_distill.data.teacher_view import (
    IDS,
    LABELS,
    MESSAGES,
    NUMBER,
    PROMPT,
    TwoViews,
    has_teacher_text,
    options_of_teacher,
    rows_of_teacher,
    tokenizer_of_teacher,
)
from llm_distill.data.validate import RowChecks
from llm_distill.models import vocabulary_size

PREPARATION = ("max_length", "packing", "packing_strategy", "completion_only_loss", "assistant_only_loss")
"""Options that decide where a text is cut and which of its tokens count."""


@dataclass(frozen=True)
class PreparedData:
    """Tokens and labels, and what makes batches of them."""

    train: Any
    """A `Dataset`, or an `IterableDataset` of a stream."""
    evaluation: dict[str, Any]
    collate: Callable[[Sequence[Any]], Any]
    tokenizer: PreTrainedTokenizerBase
    args: DistillationConfig
    accelerator: Accelerator
    row_counts: dict[str, RowCounts]
    """What became of the rows of each dataset that is no stream."""
    stream_counts: StreamCounts
    """What has become of those of the training data, if that is one."""

    @property
    def datasets(self) -> dict[str, Any]:
        """All of them, with a name for each."""
        return {"train": self.train, **self.evaluation}

    @property
    def packs(self) -> bool:
        """Whether several documents are read as one row."""
        return getattr(self.collate, "padding_free", False)

    @property
    def device(self) -> torch.device:
        return self.accelerator.device


def prepare(
    tokenizer: PreTrainedTokenizerBase, args: DistillationConfig, train: Any, evaluation: Any = None
) -> PreparedData:
    """What training with these options would read. No model is needed.

    TRL's preparation has no door of its own, so an `SFTTrainer` does it around a model of no size.

    Args:
        tokenizer: the student's, or whoever's tokens are wanted.
        args: `max_length`, `packing` and whatever else says how.
        train: a dataset, or a stream.
        evaluation: another one, or several by name.

    Raises:
        ValueError: data that cannot be prepared.
    """
    args = copy.copy(args)
    args.push_to_hub = False
    checks = RowChecks(tokenizer, args)
    train, evaluation = checks.apply(train, evaluation)
    size = {"hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1}
    train, evaluation = add_teacher_texts(tokenizer, args, train, evaluation)
    names = [teacher["name"] for teacher in args.teachers or () if isinstance(teacher, dict)]
    train, evaluation = number_teachers(names, args, train, evaluation)
    stream_counts = StreamCounts(args)
    with checks.naming_rows(train, evaluation), TemporaryDirectory() as nothing:
        trainer = SFTTrainer(
            model=LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary_size(tokenizer), **size)),
            args=_for_data_alone(args, nothing),
            train_dataset=stream_counts.before(train),
            eval_dataset=evaluation,
            processing_class=tokenizer,
        )
    prepared, collate = named_evaluation(trainer.eval_dataset), trainer.data_collator
    before, after = named_evaluation(evaluation), prepared
    if all(train is not dataset for dataset in before.values()):
        before, after = {"train": train, **before}, {"train": trainer.train_dataset, **after}
    stream_counts.reset()
    if has_teacher_of_row(train, *before.values()):
        collate = NamesTeacher(collate)
    if has_teacher_text(train, *before.values()):
        collate = TwoViews(collate, args.teacher_max_length)
    return PreparedData(
        stream_counts.after(trainer.train_dataset),
        prepared,
        collate,
        trainer.processing_class,
        args,
        trainer.accelerator,
        count_rows_left(before, after, args),
        stream_counts,
    )


def _for_data_alone(args: DistillationConfig, folder: str) -> DistillationConfig:
    """For a trainer that loads no student, and makes a folder where it would be saved."""
    args = copy.copy(args)
    args.output_dir, args.model_init_kwargs = folder, None
    return args


def add_teacher_texts(
    tokenizer: PreTrainedTokenizerBase,
    args: DistillationConfig,
    train: Any,
    evaluation: Any,
    own: PreTrainedTokenizerBase | None = None,
) -> tuple[Any, Any]:
    """The datasets with the tokens and labels of what the teacher reads, where that is something else than what the
    student reads.

    Args:
        tokenizer: the student's.
        train: a dataset or a stream, as `RowChecks` leaves it.
        evaluation: another one, or several by name.
        own: the teacher's tokenizer, if it has another one: it then reads conversations in its own chat template.

    Raises:
        ValueError: what the teacher is to read cannot be prepared, or there is no place for it.
    """
    add = partial(_add_teacher_text, tokenizer, args, own)
    if isinstance(evaluation, dict):
        evaluation = {name: add(data, name) for name, data in evaluation.items()}
    elif evaluation is not None:
        evaluation = add(evaluation, "eval")
    return None if train is None else add(train, "train"), evaluation


def _add_teacher_text(
    tokenizer: PreTrainedTokenizerBase,
    args: DistillationConfig,
    own: PreTrainedTokenizerBase | None,
    dataset: Any,
    name: str,
) -> Any:
    """What the teacher reads is prepared by itself, exactly as what the student reads, and laid beside it."""
    rows = rows_of_teacher(dataset, args, name, own is not None)
    if rows is None:
        return dataset
    reader = tokenizer_of_teacher(tokenizer if own is None else own, args)
    if own is not None and reader.chat_template is None:
        raise ValueError(
            f"the {name} dataset has conversations, and the teacher's tokenizer has no chat template: give one as "
            "teacher_chat_template. A teacher without one has not learned to answer; texts fit it better."
        )
    try:
        read = prepare(reader, options_of_teacher(args, own is not None), rows).train
    except ValueError as error:
        text = str(error).replace("the train dataset", f"the {name} dataset, as the teacher reads it")
        raise ValueError(text) from error
    columns = {"input_ids": IDS, "labels": LABELS}
    read = read.select_columns([*columns, NUMBER]).rename_columns(columns)
    replaced = [column for column in (PROMPT, MESSAGES, IDS, LABELS) if column in next(iter(dataset))]
    return concatenate_datasets([dataset.remove_columns(replaced), read], axis=1)


def named_evaluation(evaluation: Any) -> dict[str, Any]:
    """Datasets for evaluation by name, of which a trainer may have none, one or several."""
    if evaluation is None:
        return {}
    return dict(evaluation) if isinstance(evaluation, dict) else {"eval": evaluation}


def iterate_windows(dataset: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    """The rows of a dataset or a stream, so many at a time."""
    for columns in dataset.iter(batch_size=size):
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def spread_rows(dataset: Any, count: int) -> list[dict[str, Any]]:
    """So many rows from all over a dataset; of a stream the first ones."""
    if not isinstance(dataset, Dataset):
        return list(dataset.take(count))
    places = torch.linspace(0, len(dataset) - 1, min(count, len(dataset)), dtype=torch.float64).long()
    return [dataset[int(place)] for place in places]
