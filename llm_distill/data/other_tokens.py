"""The teacher reads the student's text in other tokens: batches that have both, and which of them belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from llm_distill.alignment import NO_GROUP, AlignedText, Alignment
from llm_distill.config import DistillationConfig
from llm_distill.data.other_chats import align_answers
from llm_distill.data.teacher_view import IDS, LABELS, NUMBER, MisfitError, has_teacher_text
from llm_distill.rows import GROUPS, IGNORED, TEACHER


@dataclass(frozen=True)
class AlignedCollator:
    """A collator that lays the teacher's tokens of each text beside the student's, with the groups of both.

    Args:
        max_length: of the teacher's texts, in its tokens.
        writes: whether the student writes texts, of which what is beyond `max_length` is not taught.
    """

    collate: Callable[[Sequence[Any]], Any]
    alignment: Alignment
    max_length: int | None
    writes: bool = False

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        """Raises MisfitError for rows that the teacher cannot read, or of which it would read other answers."""
        batch: dict[str, Any] = self.collate(rows)
        ids, labels = batch["input_ids"], batch["labels"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        texts = [
            self.read({**row, "input_ids": own[counts].tolist(), "labels": of[counts].tolist()}, self.writes)
            for row, own, of, counts in zip(rows, ids, labels, mask, strict=True)
        ]
        groups = torch.full_like(labels, NO_GROUP)
        first, teacher_groups = 0, []
        for number, text in enumerate(texts):  # one after the other, over the whole batch
            groups[number, mask[number]] = _numbered(text.student_groups, first)
            teacher_groups.append(_numbered(text.groups, first))
            first += max(text.groups, default=NO_GROUP) + 1
        inputs = [torch.tensor(text.ids) for text in texts]
        batch[GROUPS] = groups
        batch[TEACHER] = {
            "input_ids": _padded(inputs, 0),
            "attention_mask": _padded([torch.ones_like(own) for own in inputs], 0),
            "labels": _padded([torch.tensor(text.labels) for text in texts], IGNORED),
            GROUPS: _padded(teacher_groups, NO_GROUP),
        }
        return batch

    def read(self, row: Mapping[str, Any], is_written: bool = False) -> AlignedText:
        """What the teacher reads of a row, and the groups that it can read to their end: all, if it is not written.

        Raises:
            MisfitError: it is too long, or has other answers.
        """
        ids, labels = row["input_ids"], row.get("labels", row["input_ids"])
        where = f"row {row[NUMBER]}: " if row.get(NUMBER) is not None else ""
        try:
            if row.get(IDS) is None:
                text = self.alignment.align(ids, labels)
            else:
                text = align_answers(self.alignment, ids, labels, row[IDS], row[LABELS])
        except MisfitError as error:
            raise MisfitError(f"{where}{error}") from error
        if self.max_length is None or len(text.ids) <= self.max_length:
            return text
        if not is_written:
            raise MisfitError(
                f"{where}the teacher would read {len(text.ids):,} tokens of its own, and {self.max_length:,} at most. "
                "Leave such rows out, or set a smaller max_length for the student, which cuts them."
            )
        lost = {*text.groups[self.max_length :]}
        kept, own = ([NO_GROUP if g in lost else g for g in of] for of in (text.groups, text.student_groups))
        labels = [IGNORED if g == NO_GROUP else label for g, label in zip(kept, text.labels, strict=True)]
        return AlignedText(text.ids[: self.max_length], labels[: self.max_length], kept[: self.max_length], own)


def _numbered(groups: list[int], first: int) -> Tensor:
    numbers = torch.tensor(groups, dtype=torch.long)
    return torch.where(numbers == NO_GROUP, numbers, numbers + first)


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def require_aligned_rows(dataset: Any, name: str, read: AlignedCollator) -> None:
    """Raises ValueError naming the first row of a prepared dataset that the teacher cannot read in its own tokens, or
    of which it would read other answers, and how many others are like it. Streams are not read.
    """
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    sizes = np.array([max(len(data), 1) for data in read.alignment.student.of])
    problems = []
    for number, row in enumerate(dataset):
        if (
            row.get(IDS) is None
        ):  # no token has less than a byte, and two may come before, so that most rows need not be read
            most = sizes[row["input_ids"]].sum() + 2
            if read.max_length is None or most <= read.max_length:
                continue
        try:
            read.read({NUMBER: number} | row)
        except MisfitError as error:
            problems.append(str(error))
    if problems:
        others = f" So it is of {len(problems):,} of its {len(dataset):,} rows." if len(problems) > 1 else ""
        raise ValueError(f"the {name} dataset, {problems[0]}{others}")


def refuse_unaligned(args: DistillationConfig, datasets: Sequence[Any], names_teachers: bool) -> None:
    """Raises ValueError for data that a teacher with another tokenizer cannot read.

    Args:
        names_teachers: whether rows name one of several.
    """
    reason = "the teacher has another tokenizer"
    if args.packing or args.padding_free:
        raise ValueError(f"{reason}, and rows are packed: set packing and padding_free to False.")
    if names_teachers:
        raise ValueError(f"{reason}, and rows name one teacher of several: leave out the column `teacher`.")
    if args.on_policy_share and has_teacher_text(*datasets):
        raise ValueError(
            f"{reason}, and reads something else than the student, such as conversations in its own chat template: "
            "the student's own texts (on_policy_share) cannot be put there. Give prompts as texts."
        )
