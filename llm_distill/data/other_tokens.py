"""The teacher reads the student's text in other tokens: batches that have both, and which of them belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_distill.alignment import NO_GROUP, AlignedText, Alignment
from llm_distill.config import DistillationConfig
from llm_distill.rows import GROUPS, IGNORED, TEACHER


@dataclass(frozen=True)
class AlignedCollator:
    """A collator that lays the teacher's tokens of each text beside the student's, with the groups of both.

    Args:
        max_length: of the teacher's texts, in its tokens. What is beyond is not taught; the rest is.
    """

    collate: Callable[[Sequence[Any]], Any]
    alignment: Alignment
    max_length: int | None

    def __call__(self, rows: Sequence[Any]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collate(rows)
        ids, labels = batch["input_ids"], batch["labels"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        texts = [
            self.read(own[counts].tolist(), of[counts].tolist())
            for own, of, counts in zip(ids, labels, mask, strict=True)
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

    def read(self, ids: list[int], labels: list[int]) -> AlignedText:
        """What the teacher reads of a row, and the groups that it can read to their end."""
        text = self.alignment.align(ids, labels)
        if self.max_length is None or len(text.ids) <= self.max_length:
            return text
        lost = {*text.groups[self.max_length :]}
        kept, own = ([NO_GROUP if g in lost else g for g in of] for of in (text.groups, text.student_groups))
        labels = [IGNORED if g == NO_GROUP else label for g, label in zip(kept, text.labels, strict=True)]
        return AlignedText(text.ids[: self.max_length], labels[: self.max_length], kept[: self.max_length], own)


def _numbered(groups: list[int], first: int) -> Tensor:
    numbers = torch.tensor(groups, dtype=torch.long)
    return torch.where(numbers == NO_GROUP, numbers, numbers + first)


def _padded(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)


def refuse_unaligned(
    args: DistillationConfig, reads_more: bool, names_teachers: bool, first: Mapping[str, Any]
) -> None:
    """Raises ValueError for data that a teacher with another tokenizer cannot read.

    Args:
        reads_more: whether it is to read something else than the student.
        names_teachers: whether rows name one of several.
        first: a row of the data.
    """
    reason = "the teacher has another tokenizer"
    if args.packing or args.padding_free:
        raise ValueError(f"{reason}, and rows are packed: set packing and padding_free to False.")
    if reads_more:
        raise ValueError(f"{reason}, and is to read something else than the student too: only one of both can be.")
    if names_teachers:
        raise ValueError(f"{reason}, and rows name one teacher of several: leave out the column `teacher`.")
    if "messages" in first or isinstance(first.get("prompt"), list):
        raise ValueError(
            f"{reason}, and conversations are in the student's chat template, which is not the teacher's: give rows of "
            "prompt and completion as texts."
        )
