"""Rows become batches exactly as TRL's `SFTTrainer` makes them: text, prompt/completion, chat, packing, masks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTTrainer

from llm_distill.config import DistillationConfig
from llm_distill.data.counts import RowCounts, count_rows_left
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
    with checks.naming_rows(train, evaluation):
        trainer = SFTTrainer(
            model=LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary_size(tokenizer), **size)),
            args=args,
            train_dataset=train,
            eval_dataset=evaluation,
            processing_class=tokenizer,
        )
    prepared = named_evaluation(trainer.eval_dataset)
    before, after = named_evaluation(evaluation), prepared
    if all(train is not dataset for dataset in before.values()):
        before, after = {"train": train, **before}, {"train": trainer.train_dataset, **after}
    return PreparedData(
        trainer.train_dataset,
        prepared,
        trainer.data_collator,
        trainer.processing_class,
        args,
        trainer.accelerator,
        count_rows_left(before, after, args.max_length),
    )


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
