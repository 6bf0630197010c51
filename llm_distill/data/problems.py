"""What can be wrong with a row, in words: with its tokens and what is said of each, with its conversation, its text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llm_distill.rows import IGNORED

OF_TOKENS = ("labels", "attention_mask", "completion_mask", "assistant_masks")
"""Columns with a number for each of the `input_ids`."""
LENGTHS = "seq_lengths"
"""The column that says how long the documents of a packed row are."""
PLACES = "position_ids"
"""The column that begins again with each document, of which TRL reads nothing."""
TURNS = {"conversations": ("from", "value")}
"""What a turn of a conversation consists of where it is not `role` and `content`, by column."""


class TokenRules(NamedTuple):
    """What tokens may be in a run."""

    vocab_size: float
    """Ids are below."""
    may_be_none: bool
    """Whether rows without tokens are left out later."""
    may_be_packed: bool
    """Whether the lengths of documents are read."""


def problem_of_tokens(row: Mapping[str, Any], rules: TokenRules, starts: Any = 0) -> str | None:
    """What is wrong with a tokenised row, or with several that begin at `starts`, if anything."""
    numbers: dict[str, np.ndarray] = {}
    for column in (c for c in ("input_ids", *OF_TOKENS, LENGTHS, PLACES) if c in row or c == "input_ids"):
        if (array := _whole_numbers(row.get(column))) is None:
            return f"`{column}` is not a list of whole numbers, but {shortened(row.get(column))}"
        numbers[column] = array
    ids = numbers["input_ids"]
    for column in (c for c in OF_TOKENS if c in numbers):
        if len(numbers[column]) != len(ids):
            return f"`{column}` has {len(numbers[column]):,} numbers and `input_ids` {len(ids):,}"
        if column != "labels" and len(ids) and not 0 <= numbers[column].min() <= numbers[column].max() <= 1:
            return f"`{column}` has other numbers than 0 and 1"
    is_seen = numbers.get("attention_mask", np.ones(len(ids))).astype(bool)
    if not is_seen.size or not np.logical_or.reduceat(is_seen, np.atleast_1d(starts)).all():
        return None if rules.may_be_none and np.ndim(starts) == 0 else "it has no tokens"
    seen = ids[is_seen]
    if seen.min() < 0 or seen.max() >= rules.vocab_size:
        wrong = seen.min() if seen.min() < 0 else seen.max()
        return f"`input_ids` has {wrong}, and the tokenizer's vocabulary ends at {rules.vocab_size - 1:,}"
    if LENGTHS in numbers:
        return _problem_of_lengths(numbers[LENGTHS], len(seen), rules) or _problem_of_labels(numbers, is_seen, starts)
    return _problem_of_labels(numbers, is_seen, starts) or _problem_of_places(numbers, is_seen, starts)


def _whole_numbers(value: Any) -> np.ndarray | None:
    try:
        array = np.asarray(value)
    except ValueError:  # lists of different lengths in a list
        return None
    return array if array.ndim == 1 and (array.dtype.kind in "iub" or not array.size) else None


def _problem_of_labels(numbers: Mapping[str, np.ndarray], is_seen: np.ndarray, starts: Any) -> str | None:
    if "labels" not in numbers:
        return None
    labels, ids = numbers["labels"], numbers["input_ids"]
    counts = is_seen & (labels != IGNORED)
    counts[starts] = False  # nothing predicts a first token
    wrong = np.flatnonzero(counts & (labels != ids))
    if not wrong.size:
        return None
    return (
        f"`labels` has {labels[wrong[0]]} at position {wrong[0]}, where `input_ids` has {ids[wrong[0]]}. Labels are "
        "the tokens themselves, or -100 where nothing is learned: give them unshifted"
    )


def _problem_of_places(numbers: Mapping[str, np.ndarray], is_seen: np.ndarray, starts: Any) -> str | None:
    if PLACES not in numbers or len(numbers[PLACES]) != len(is_seen):
        return None
    begins = numbers[PLACES] == 0
    begins[starts] = False
    begins[1:] &= is_seen[:-1]  # what is masked before a text is no document
    if not begins.any():
        return None
    return f"it is packed already (`{PLACES}` begin again): say how long its documents are (`{LENGTHS}`)"


def _problem_of_lengths(lengths: np.ndarray, tokens: int, rules: TokenRules) -> str | None:
    if not rules.may_be_packed:
        return f"it is packed already (`{LENGTHS}`), which takes padding_free=True, packing=False and max_length=None"
    if lengths.sum() != tokens or lengths.min() < 1:
        return f"`{LENGTHS}` add up to {lengths.sum():,}, and there are {tokens:,} tokens"
    return None


def problem_of_turns(turns: Any, column: str) -> str | None:
    """What is wrong with a conversation, if anything."""
    role, content = TURNS.get(column, ("role", "content"))
    if not isinstance(turns, list) or not all(isinstance(turn, Mapping) for turn in turns):
        return f"`{column}` is {shortened(turns)}, not a list of messages with `{role}` and `{content}`"
    if not turns:
        return f"`{column}` is an empty conversation"
    for number, turn in enumerate(turns):
        if not isinstance(turn.get(role), str):
            return f"message {number} of `{column}` has no `{role}`: {shortened(turn)}"
        text = turn.get(content)
        says_more = any(value is not None for key, value in turn.items() if key not in (role, content))
        if not isinstance(text, str | list | Mapping) and (text is not None or not says_more):
            return f"`{content}` of message {number} of `{column}` is {shortened(text)}, not a text"
    return None


def problem_of_text(text: Any, column: str) -> str | None:
    """What is wrong with a text, if anything."""
    return None if isinstance(text, str) else f"`{column}` is {shortened(text)}, not a text"


def shortened(value: Any) -> str:
    """A value as a message shows it."""
    shown = repr(value)
    return f"{shown[:80]}…" if len(shown) > 80 else shown
