"""Rows are looked at before TRL prepares them: columns, types, nulls, conversations, tokens and their labels.

A dataset is looked at whole, a batch of columns at a time; only the rows of a batch that is not plainly sound are
looked at one by one. A stream is looked at as far as it has come.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, reduce
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import get_training_chat_template, maybe_convert_to_chatml
from trl.chat_template_utils import has_generation_markers

from llm_distill.config import DistillationConfig
from llm_distill.data.problems import (
    LENGTHS,
    OF_TOKENS,
    PLACES,
    TURNS,
    TokenRules,
    problem_of_text,
    problem_of_tokens,
    problem_of_turns,
    shortened,
)
from llm_distill.models import vocabulary_size
from llm_distill.templates import RAISED, apply_template

BATCH = 10_000
"""Rows that are looked at together."""


class Columns(NamedTuple):
    """What is read of a dataset, and as what."""

    used: tuple[str, ...]
    kind: str
    """tokens, chat or text"""


class RowChecks:
    """What rows must be for a tokenizer and the options of a run.

    Args:
        tokenizer: or a processor, which has one.
        formatting_func: makes texts of rows that are no tokens yet.
        is_collated: whether a collator of the person's own makes batches of them.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        args: DistillationConfig,
        formatting_func: Callable[[Any], str] | None = None,
        is_collated: bool = False,
    ) -> None:
        self.processor, self.args = tokenizer, args
        self.tokenizer: PreTrainedTokenizerBase = getattr(tokenizer, "tokenizer", tokenizer)
        self.formatting_func, self.is_collated = formatting_func, is_collated
        self.is_prepared = bool((args.dataset_kwargs or {}).get("skip_prepare_dataset"))
        grows = args.chat_template_path is not None  # by the tokens of that template
        self.token_rules = TokenRules(
            vocab_size=math.inf if grows else vocabulary_size(self.tokenizer),
            may_be_none=args.max_length is not None and not self.is_prepared,
            may_be_packed=args.padding_free and not args.packing,
        )

    def apply(self, train: Any, evaluation: Any) -> tuple[Any, Any]:
        """The datasets as TRL is to prepare them: without columns that it would mistake, and without masked tokens.

        Raises:
            ValueError: a dataset, or one of its rows, that cannot be learned from.
        """
        if isinstance(evaluation, dict):
            evaluation = {name: self.check(dataset, name) for name, dataset in evaluation.items()}
        elif evaluation is not None:
            evaluation = self.check(evaluation, "eval")
        return None if train is None else self.check(train, "train"), evaluation

    def check(self, dataset: Any, name: str) -> Any:
        """One dataset or stream; see `apply`."""
        if isinstance(dataset, dict):
            raise ValueError(f"the {name} dataset is several, {', '.join(dataset)}: give one of these splits.")
        if not isinstance(dataset, Dataset | IterableDataset):
            raise ValueError(
                f"the {name} dataset must be a datasets.Dataset or a stream, got {type(dataset).__name__}."
            )
        is_transformed = isinstance(dataset, Dataset) and dataset.format["type"] == "custom"
        if is_transformed or (self.is_prepared and self.is_collated):
            return dataset
        dataset = dataset.with_format(None)
        first = next(iter(dataset), None)
        if not isinstance(first, Mapping):
            raise ValueError(f"the {name} dataset has no rows{'' if first is None else ' with columns'}.")
        if self.formatting_func is not None and "input_ids" not in first:
            dataset = self._format(dataset, self.formatting_func, first, name)
            first = next(iter(dataset))
        columns = self._choose_columns(first, name)
        stray = [column for column in ("prompt", "completion", "chosen", "rejected", *TURNS) if column in first]
        stray += [column for column in ("messages", self.args.dataset_text_field) if column in first]
        if columns.kind != "tokens":
            dataset = dataset.remove_columns([column for column in stray if column not in columns.used])
        if isinstance(dataset, IterableDataset):
            dataset = dataset.filter(partial(self._is_sound_row, columns, name), with_indices=True)
            has_masked = "attention_mask" in columns.used
        else:
            has_masked = self._check_all(dataset, columns, name)
        return dataset.map(drop_masked_tokens) if has_masked else dataset

    @contextmanager
    def naming_rows(self, train: Any, evaluation: Any) -> Iterator[None]:
        """Inside, TRL prepares the datasets. What a chat template says no to there is said with its row."""
        try:
            yield
        except RAISED:
            datasets = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
            for name, dataset in {"train": train, **datasets}.items():
                if isinstance(dataset, Dataset) and not self.is_prepared:
                    self._require_rendered_rows(dataset, name)
            raise

    def _format(self, dataset: Any, formatting_func: Callable[[Any], str], first: Mapping[str, Any], name: str) -> Any:
        """Texts in place of the rows. TRL would leave the columns that they are made of, and read those."""
        has_pairs = {"prompt", "completion"} <= set(first)
        if unread := sorted(set(first) & {"teacher_prompt", "teacher_messages"}):
            raise ValueError(f"a formatting_func makes whole texts, in which there is no place for {unread[0]}.")
        if self.args.completion_only_loss or (has_pairs and self.args.completion_only_loss is None):
            raise ValueError(
                "a formatting_func makes whole texts, which completion_only_loss cannot cut: set it to False."
            )
        make_text = partial(_make_text, formatting_func, self.args.dataset_text_field, name)
        return dataset.map(make_text, with_indices=True, remove_columns=list(first))

    def _choose_columns(self, first: Mapping[str, Any], name: str) -> Columns:
        """What TRL reads of a dataset with such a first row. Raises ValueError if there is nothing."""
        present = f"the {name} dataset has the columns {', '.join(first)}"
        if "image" in first or "images" in first:
            raise ValueError(f"{present}: pictures are not distilled. Remove the column to learn from the text alone.")
        if "input_ids" in first:
            return Columns(tuple(c for c in ("input_ids", *OF_TOKENS, LENGTHS, PLACES) if c in first), "tokens")
        if self.is_prepared:
            raise ValueError(f"{present}, no `input_ids`, and skip_prepare_dataset keeps them from being made.")
        text = self.args.dataset_text_field
        for used in (("prompt", "completion"), ("messages",), ("conversations",), (text,)):
            if set(used) <= set(first) and used != ("prompt",):
                break
        else:
            if "prompt" in first:
                raise ValueError(
                    f"{present}: prompts without a `completion`. Let the teacher write them first (`llm-distill "
                    "generate`) and train on what it has written, let the student write as it learns "
                    "(on_policy_share=1), or rename the column that answers them."
                )
            raise ValueError(
                f"{present}, and none to learn from: a `{text}`, a `prompt` with its `completion`, `messages` or "
                "`input_ids`. Rename what is meant (dataset.rename_columns), or name a column of whole texts: "
                "dataset_text_field."
            )
        if stray := [column for column in (*OF_TOKENS, LENGTHS) if column in first]:
            raise ValueError(
                f"{present}: `{stray[0]}` would be taken for a number of each token, and there are no `input_ids`. "
                f"Remove or rename it, such as classes of `{used[0]}`."
            )
        is_chat = used != (text,) and (len(used) == 1 or any(isinstance(first[column], list) for column in used))
        columns = Columns(used, "chat" if is_chat else "text")
        if self.args.chat_template_path is None and is_chat and self.processor.chat_template is None:
            raise ValueError(
                f"the {name} dataset has conversations (`{used[0]}`), and the tokenizer has no chat template: give "
                "one with chat_template_path, such as the teacher's."
            )
        if self.args.eos_token is None and not is_chat and self.tokenizer.eos_token is None:
            raise ValueError("the tokenizer has no token that ends a text: name one with eos_token.")
        return columns

    def _check_all(self, dataset: Dataset, columns: Columns, name: str) -> bool:
        """Raises ValueError naming the first row of a dataset that is not sound. Whether tokens are masked."""
        selected = dataset.select_columns(list(columns.used))
        has_masked, start = False, 0
        for table in selected.with_format("arrow").iter(batch_size=BATCH):
            if not self._is_plainly_sound(table, columns):
                for number, row in enumerate(selected.select(range(start, start + len(table))), start):
                    self._check_row(columns, name, row, number)
            if "attention_mask" in columns.used:
                has_masked |= pc.min(table["attention_mask"].combine_chunks().flatten()).as_py() == 0
            start += len(table)
        return has_masked

    def _is_plainly_sound(self, table: pa.Table, columns: Columns) -> bool:
        """Whether nothing of a batch needs a closer look."""
        arrays = [table[column].combine_chunks() for column in columns.used]
        if any(array.null_count for array in arrays):
            return False
        if columns.kind == "text":
            return all(pa.types.is_string(array.type) or pa.types.is_large_string(array.type) for array in arrays)
        if not all(pa.types.is_list(array.type) or pa.types.is_large_list(array.type) for array in arrays):
            return False
        lengths = [pc.list_value_length(array) for array in arrays]
        if not all(pc.min(length).as_py() for length in lengths):
            return False
        flat = [array.flatten() for array in arrays]
        if columns.kind == "chat":
            return all(
                pa.types.is_struct(turns.type) and turns.null_count == 0 and _has_texts(turns, column)
                for column, turns in zip(columns.used, flat, strict=True)
            )
        if LENGTHS in columns.used or not all(length.equals(lengths[0]) for length in lengths):
            return False
        numeric = all(pa.types.is_integer(values.type) or pa.types.is_boolean(values.type) for values in flat)
        if not numeric or any(values.null_count for values in flat):
            return False
        row = {column: values.to_numpy(zero_copy_only=False) for column, values in zip(columns.used, flat, strict=True)}
        starts = np.cumsum(lengths[0].to_numpy()) - lengths[0].to_numpy()
        return problem_of_tokens(row, self.token_rules, starts) is None

    def _is_sound_row(self, columns: Columns, name: str, row: Mapping[str, Any], number: int) -> bool:
        """True. Raises ValueError naming a row of a stream that is not sound."""
        self._check_row(columns, name, row, number)
        if columns.kind == "chat" and not self.is_prepared:
            self._check_rendered(columns, name, row, number)
        return True

    def _check_row(self, columns: Columns, name: str, row: Mapping[str, Any], number: int) -> None:
        if columns.kind == "tokens":
            problem = problem_of_tokens(row, self.token_rules)
        else:
            problem_of = problem_of_turns if columns.kind == "chat" else problem_of_text
            problem = next(filter(None, (problem_of(row.get(column), column) for column in columns.used)), None)
        if problem is not None:
            raise ValueError(f"the {name} dataset, row {number}: {problem}. Mend such rows, or leave them out.")

    def _require_rendered_rows(self, dataset: Dataset, name: str) -> None:
        dataset = dataset.with_format(None)
        columns = self._choose_columns(dataset[0], name)
        if columns.kind == "chat":
            for number, row in enumerate(dataset):
                self._check_rendered(columns, name, row, number)

    def _check_rendered(self, columns: Columns, name: str, row: Mapping[str, Any], number: int) -> None:
        """Raises ValueError if the chat template says no to a conversation, with what it says."""
        try:
            self._render(columns.used, row)
        except ValueError as error:
            raise ValueError(f"the {name} dataset, row {number}: {error}") from error

    def _render(self, used: tuple[str, ...], row: Mapping[str, Any]) -> None:
        """As TRL does. Raises ValueError where it would fail."""
        options = row.get("chat_template_kwargs", {})
        if not isinstance(options, Mapping):
            raise ValueError(f"`chat_template_kwargs` is {shortened(options)}, not a mapping. Give {{}} for none.")
        try:
            tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
        except ValueError as error:
            raise ValueError(f"`tools` is {shortened(row['tools'])}, which is not JSON ({error}).") from error
        counts, template = self.args.assistant_only_loss, None
        if counts and not has_generation_markers(self.processor.chat_template):
            template = get_training_chat_template(self.processor)
        options = {"chat_template": template, "tools": tools, **options}
        if len(used) == 2:
            apply_template(self.processor, row["prompt"], add_generation_prompt=True, tokenize=False, **options)
            messages = row["prompt"] + row["completion"]
        else:
            messages = maybe_convert_to_chatml({used[0]: [dict(turn) for turn in row[used[0]]]})["messages"]
        options |= {"return_dict": counts, "return_assistant_tokens_mask": counts, "tokenize": counts}
        rendered = apply_template(self.processor, messages, **options)
        if counts and 1 not in rendered["assistant_masks"]:
            raise ValueError("no turn of an assistant counts, which is all that assistant_only_loss learns from.")


def _make_text(formatting_func: Callable[[Any], str], column: str, name: str, row: Any, number: int) -> dict[str, str]:
    text = formatting_func(row)
    if not isinstance(text, str):
        raise ValueError(
            f"the {name} dataset, row {number}: formatting_func makes {shortened(text)} of it, not a text."
        )
    return {column: text}


def drop_masked_tokens(row: dict[str, Any]) -> dict[str, Any]:
    """A tokenised row without the tokens that its `attention_mask` hides: they neither count nor are seen."""
    of_tokens = [column for column in ("input_ids", *OF_TOKENS) if column in row]
    mask = row["attention_mask"]
    return {
        column: [number for number, is_seen in zip(row[column], mask, strict=True) if is_seen] for column in of_tokens
    }


def _has_texts(turns: pa.StructArray, column: str) -> bool:
    """Whether every turn has a role, and a text or something else to say, such as the call of a tool."""
    names = TURNS.get(column, ("role", "content"))
    fields = {field.name: turns.field(place) for place, field in enumerate(turns.type)}
    if not all(name in fields and pa.types.is_string(fields[name].type) for name in names):
        return False
    role = fields.pop(names[0])
    is_silent = reduce(pc.and_, map(pc.is_null, fields.values()))
    return role.null_count == 0 and not pc.any(is_silent).as_py()
