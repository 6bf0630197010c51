"""What can be wrong with prepared data: found before the first step where possible, the batch named where not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, NoReturn

import pyarrow.compute as pc
import torch
from datasets import Dataset
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_distill.data.on_policy_rows import require_prompts
from llm_distill.data.other_tokens import AlignedCollator, require_aligned_rows
from llm_distill.data.prepare import PreparedData, iterate_windows, spread_rows
from llm_distill.data.teacher_view import IDS, TwoViews, require_teachers_rows
from llm_distill.models import (
    context_length,
    different_ids,
    refuse_past_context,
    require_same_ids_of,
    unshared_tokens,
)
from llm_distill.rows import IGNORED, View, count_rows
from llm_distill.signals import Signal
from llm_distill.teachers.base import Teacher

SAMPLED_TEXTS = 16
SAMPLED_TOKENS = 512


class ReadingCollator:
    """A collator that lets a teacher put into a batch what it has to say of it."""

    def __init__(self, collate: Callable[[list[Any]], Any], read: Callable[[Any], Any]) -> None:
        self.collate, self.read = collate, read

    def __call__(self, rows: list[Any]) -> MutableMapping[str, Any]:
        return self.read(self.collate(rows))


def require_usable(
    data: PreparedData,
    collate: Callable[[list[Any]], Any],
    student: PreTrainedModel | PeftModel,
    teacher: Teacher | None,
) -> None:
    """Raises ValueError if a dataset has nothing to learn from, a text too long for student or teacher, or one that a
    stored teacher does not know.

    Args:
        collate: what makes the batches of training.
    """
    contexts = {"student": context_length(student), "teacher": None if teacher is None else teacher.max_length}
    for name, dataset in data.datasets.items():
        require_rows(dataset, name)
        if data.args.on_policy_share and name == "train":
            require_prompts(dataset, data.args.max_completion_length, contexts)
        longest = longest_sequence(dataset) or 0
        for role, max_length in contexts.items():
            refuse_past_context(longest, max_length, f"the {name} dataset", role)
        for member in () if teacher is None or teacher.alignment is not None else teacher.models:
            if member.tokenizer is not None:
                require_shared_tokens(dataset, name, member.tokenizer, data.tokenizer)
        if isinstance(data.collate, TwoViews):
            writes = data.args.on_policy_share and name == "train"
            require_teachers_rows(dataset, name, data.collate, data.args.max_completion_length if writes else None)
        if isinstance(data.collate, AlignedCollator):
            require_aligned_rows(dataset, name, data.collate)
    if isinstance(collate, ReadingCollator) and teacher is not None and teacher.is_stored:
        for name, dataset in data.datasets.items():
            require_readable(dataset, name, collate)


def require_rows(dataset: Any, name: str) -> None:
    """Raises ValueError if no token of a prepared dataset counts. Streams are not read."""
    if not isinstance(dataset, Dataset) or "labels" not in (dataset.column_names or ["labels"]):
        return
    if not any(label != IGNORED for row in dataset for label in row["labels"][1:]):
        raise ValueError(
            f"the {name} dataset ({len(dataset)} rows after preparation) has no token to learn from: every label is "
            "masked. Is max_length shorter than the prompts, or does the chat template mark no assistant turn?"
        )


def require_shared_tokens(
    dataset: Any, name: str, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase
) -> None:
    """Raises ValueError if a prepared dataset uses a token that the teacher does not have at its id, or one of a few
    texts has other ids for the teacher. Streams are not read.
    """
    if not isinstance(dataset, Dataset) or "input_ids" not in dataset.column_names:
        return
    columns = [column for column in ("input_ids", IDS) if column in dataset.column_names]
    for row in spread_rows(dataset, SAMPLED_TEXTS):
        for column in columns:
            text = student.decode(row[column][:SAMPLED_TOKENS], skip_special_tokens=True)
            require_same_ids_of(text, teacher, student)
    unshared = {i: token for token, i in unshared_tokens(teacher, student).items()}
    if not unshared:
        return
    for number, row in enumerate(dataset.select_columns(columns)):
        if used := unshared.keys() & {token for ids in row.values() for token in ids}:
            token = unshared[min(used)]
            raise different_ids(
                f"{len(teacher.get_vocab()):,} tokens", student, f"{token!r}, which row {number} of {name} has"
            )


def longest_sequence(dataset: Any, ids: str = "input_ids") -> int | None:
    """Of a prepared dataset, in tokens; None for a stream, which is not read, and for one without that column."""
    if not isinstance(dataset, Dataset) or ids not in dataset.column_names:
        return None
    column = "seq_lengths" if "seq_lengths" in dataset.column_names else ids
    longest = 0
    for table in dataset.select_columns([column]).with_format("arrow").iter(batch_size=10_000):
        lengths = pc.list_flatten(table[column]) if column == "seq_lengths" else pc.list_value_length(table[column])
        longest = max(longest, pc.max(lengths).as_py() or 0)
    return longest


def require_readable(dataset: Any, name: str, read: Callable[[list[Any]], Any]) -> None:
    """Raises ValueError if one of a few texts from all over a prepared dataset cannot be read as a batch is read, with
    what a stored teacher says. A sample, not a proof: what it does not meet is found in its step. Streams are not read.
    """
    if not isinstance(dataset, Dataset):
        return
    try:
        batch = read([dataset[i] for i in range(0, len(dataset), -(-len(dataset) // SAMPLED_TEXTS))])
    except ValueError as error:
        raise ValueError(f"the {name} dataset: {error}") from error
    if (
        name == "train"
        and not count_rows(batch["labels"])
        and not any(count_rows(read(rows)["labels"]) for rows in iterate_windows(dataset, SAMPLED_TEXTS))
    ):
        raise ValueError(
            f"the {name} dataset: none of its {len(dataset):,} texts is in the teacher_cache, so that on_miss=skip "
            "would leave out all of them. Was it captured with another max_length, packing or chat template? "
            "`llm-distill capture` with the settings of this run adds what is missing."
        )


def refuse_broken_loss(
    values: Mapping[str, Float[Tensor, " rows"]],
    signal: Signal | None,
    view: View,
    step: int,
    tokenizer: PreTrainedTokenizerBase,
) -> NoReturn:
    """Raises ValueError naming the batch, and who gave what is not finite. Called after a loss that is not.

    Args:
        values: what the loss is made of, per row.
    """
    broken = {name: ~value.isfinite() for name, value in values.items() if not value.isfinite().all()}
    if signal is not None and (signal.broken_rows().any() or ("teacher_ce" in broken and "ce" not in broken)):
        who, rows = "the teacher gave NaN or infinity", signal.broken_rows() | broken.get("teacher_ce", False)
        todo = (
            "A teacher in float16 often overflows: load it in bfloat16 "
            '(teacher_model_init_kwargs=\'{"dtype": "bfloat16"}\').'
        )
    else:
        name, rows = next(iter(broken.items()), ("loss", torch.ones(len(view.positions.sample), dtype=torch.bool)))
        who = f"the student gave NaN or infinity, as its {name} shows,"
        todo = (
            "Its weights or activations have most likely grown past what a number can hold: a lower learning_rate, "
            "warmup_steps, or bf16 in place of fp16."
        )
    where = ""
    if rows.any():
        sample = int(view.positions.sample[rows.to(view.positions.sample.device)][0])
        text = tokenizer.decode(view.inputs["input_ids"][sample][:48], skip_special_tokens=True)
        where = f", first in its sequence {sample}, which begins {text!r}"
    raise ValueError(
        f"{who} for {int(rows.sum())} of {len(rows)} positions in the batch after step {step}{where}. {todo} Nothing "
        "was learned from this batch."
    )
