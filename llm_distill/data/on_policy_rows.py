"""The rows of on-policy distillation: their prompts, and what stands in place of their completions."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from datasets import Dataset

from llm_distill.data.policy import Row
from llm_distill.data.teacher_view import IDS, LABELS
from llm_distill.data.validate import BATCH
from llm_distill.rows import GROUPS, IGNORED, TEACHER

NO_PROMPT = (
    "on_policy_share needs prompts, and a text begins with what is to be learned: give rows of prompt and completion "
    "(or of prompt alone), or conversations with assistant_only_loss."
)


def rows_of(batch: dict[str, Any]) -> Iterator[Row]:
    """The rows of a padded batch, each with what the teacher reads in its place if that is another text."""
    mask = batch["attention_mask"].bool()
    of_teacher = rows_of(batch[TEACHER]) if TEACHER in batch and GROUPS not in batch else itertools.repeat(None)
    for number, (counts, read) in enumerate(zip(mask, of_teacher, strict=False)):
        row = {name: batch[name][number][counts].tolist() for name in ("input_ids", "labels")}
        yield row if read is None else row | {IDS: read["input_ids"], LABELS: read["labels"]}


def prompt_of(row: Row) -> list[int]:
    """The tokens before the first that is learned.

    Raises:
        ValueError: there are none.
    """
    first = next((place for place, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"]))
    if not first:
        raise ValueError(NO_PROMPT)
    return row["input_ids"][:first]


def replace_completion(row: Row, ids: list[int], labels: list[int]) -> Row:
    """The prompt of a row with another completion, for the student and for the teacher."""
    prompt = prompt_of(row)
    replaced = {"input_ids": prompt + ids, "labels": [IGNORED] * len(prompt) + labels}
    if IDS not in row:
        return replaced
    read = replace_completion({"input_ids": row[IDS], "labels": row[LABELS]}, ids, labels)
    return replaced | {IDS: read["input_ids"], LABELS: read["labels"]}


def add_empty_completions(dataset: Any, share: float) -> Any:
    """A dataset of prompts alone as TRL prepares one with completions, which are empty: the student writes them.

    Raises:
        ValueError: some of the texts are to be the dataset's own, and it has none.
    """
    columns: Iterable[str] = getattr(dataset, "column_names", None) or ()
    if "prompt" not in columns or {"completion", "messages", "text"} & {*columns}:
        return dataset
    if share < 1:
        raise ValueError(
            f"on_policy_share={share} learns from the dataset's own completions too, and it has none: add a column "
            "completion, or set on_policy_share=1."
        )

    def add(row: dict[str, Any]) -> dict[str, Any]:
        return {"completion": [{"role": "assistant", "content": ""}] if isinstance(row["prompt"], list) else ""}

    return dataset.map(add, desc="Prompts") if isinstance(dataset, Dataset) else dataset.map(add)


def prompt_lengths(dataset: Any) -> np.ndarray | None:
    """Tokens before the first that is learned, of each row of a prepared dataset, [rows]; None for a stream, which is
    not read, and where labels are made later.
    """
    if not isinstance(dataset, Dataset) or "labels" not in dataset.column_names:
        return None
    lengths = [
        next((place for place, label in enumerate(labels) if label != IGNORED), len(labels))
        for columns in dataset.select_columns(["labels"]).iter(batch_size=BATCH)
        for labels in columns["labels"]
    ]
    return np.array(lengths, dtype=np.int64)


def require_prompts(dataset: Any, max_new_tokens: int, contexts: Mapping[str, int | None]) -> None:
    """Raises ValueError naming the first row of a prepared dataset without a prompt, or with one after which there is
    no room for a text, and how many others are like it. Streams are not read.

    Args:
        contexts: of those who read the text, in tokens.
    """
    lengths = prompt_lengths(dataset)
    if lengths is None:
        return
    if len(missing := np.flatnonzero(lengths == 0)):
        raise ValueError(f"the train dataset, row {missing[0]}: {NO_PROMPT}{_count(missing, lengths)}")
    for role, context in contexts.items():
        if context is not None and len(longer := np.flatnonzero(lengths + max_new_tokens > context)):
            raise ValueError(
                f"the train dataset, row {longer[0]}: a prompt of {lengths[longer[0]]:,} tokens and "
                f"max_completion_length={max_new_tokens} are more than the {role}'s context of {context:,}: set it to "
                f"less, or leave such prompts out.{_count(longer, lengths)}"
            )


def _count(places: np.ndarray, rows: np.ndarray) -> str:
    return f" So it is of {len(places):,} of its {len(rows):,} rows." if len(places) > 1 else ""
