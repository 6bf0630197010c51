"""Each row may name the one of several teachers that speaks about it, in a column `teacher`: by domain, or by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from llm_distill.config import DistillationConfig
from llm_distill.rows import SIGNAL, TEACHER_OF_ROW

COLUMN = "teacher"


def number_teachers(names: Sequence[str], args: DistillationConfig, *datasets: Any) -> list[Any]:
    """The datasets, each one or several by name, with the number of each row's teacher beside it, where they name one.

    Raises:
        ValueError: a row without a teacher, one that there is not, or no place for it.
    """
    return [
        {name: _number(names, args, part, name) for name, part in dataset.items()}
        if isinstance(dataset, dict)
        else _number(names, args, dataset, "train" if place == 0 else "eval")
        for place, dataset in enumerate(datasets)
    ]


def _number(names: Sequence[str], args: DistillationConfig, dataset: Any, name: str) -> Any:
    if not names or dataset is None or COLUMN not in next(iter(dataset), {}):
        return dataset
    reason = f"the {name} dataset: its column `{COLUMN}` says which teacher speaks about a row"
    if args.packing or args.padding_free:
        raise ValueError(f"{reason}, and rows are packed: set packing and padding_free to False.")
    if args.on_policy_share:
        raise ValueError(f"{reason}, and what the student writes has none: remove the column, or on_policy_share.")
    return dataset.map(partial(_number_row, tuple(names), reason), with_indices=True, remove_columns=[COLUMN])


def _number_row(names: tuple[str, ...], reason: str, row: Mapping[str, Any], number: int) -> dict[str, int]:
    if row[COLUMN] not in names:
        raise ValueError(
            f"{reason}, and row {number} has {row[COLUMN]!r}, where there are {', '.join(names)}. Name one of them (a "
            "teacher's `name`), or remove the column to mix all."
        )
    return {TEACHER_OF_ROW: names.index(row[COLUMN])}


def has_teacher_of_row(*datasets: Any) -> bool:
    """Whether one of the datasets says which teacher speaks about a row."""
    return any(TEACHER_OF_ROW in next(iter(dataset), {}) for dataset in datasets if dataset is not None)


@dataclass(frozen=True)
class NamesTeacher:
    """A collator that lays the number of each row's teacher where the mixture's reader finds it."""

    collate: Callable[[Sequence[Any]], Any]

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate(rows)
        if all(TEACHER_OF_ROW in row for row in rows):
            batch[SIGNAL] = {TEACHER_OF_ROW: torch.tensor([row[TEACHER_OF_ROW] for row in rows])}
        return batch
