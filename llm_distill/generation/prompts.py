"""What the teacher is asked: texts to go on with or conversations to answer, each known by what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from llm_distill.templates import apply_template

COLUMNS = ("prompt", "messages", "question", "instruction", "text")
"""Where prompts are looked for, in this order."""
OUR_COLUMNS = (
    *("prompt", "completion", "prompt_id", "sample", "finished", "tokens", "mean_log_prob", "seed", "time", "teacher"),
    *("prompt_ids", "completion_ids", "reason"),
)
"""Columns of what is written, which the dataset's own cannot have."""

Content = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""


class Prompt(NamedTuple):
    """One question to the teacher."""

    id: str
    """A hash of `content`: the same question is the same prompt, wherever it stands."""
    content: Content
    row: dict[str, Any]
    """The other columns of its row: a verifier may need them, and they are handed on."""


def make_prompt(content: Content, row: Mapping[str, Any]) -> Prompt:
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return Prompt(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), content, dict(row))


def prompts_of(
    dataset: Iterable[Mapping[str, Any]],
    *,
    column: str | None = None,
    as_chat: bool = False,
    system_prompt: str | None = None,
    prompt_tokens: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    limit: int | None = None,
) -> Iterator[Prompt]:
    """The prompts of a dataset, each once.

    Args:
        dataset: rows with a text or a list of messages in `column`; of a conversation, what follows the last turn of
            the user is left out. A `completion` that is there already is handed on as `reference`.
        column: by default the first of COLUMNS that is there.
        as_chat: makes a text the message of a user.
        system_prompt: put in front of every conversation that has no system turn of its own.
        prompt_tokens: keeps the first tokens of a text, for teachers that go on with it. Shorter texts are passed over.
        tokenizer: counts them.
        limit: how many prompts at most.

    Raises:
        ValueError: no such column, something else in it, or options that do not fit it.
    """
    seen: set[str] = set()
    for number, row in enumerate(dataset):
        if number == 0:
            column = _column(row, column)
        assert column is not None, "the first row has named it"
        content = _content(row[column], number, column, as_chat, system_prompt)
        if isinstance(content, str) and column == "text" and prompt_tokens is None:
            raise ValueError(
                "a column `text` holds whole texts and no prompts: --prompt_tokens 32 asks the teacher to go on from "
                "their first 32 tokens; --prompt_column names another column."
            )
        if prompt_tokens is not None:
            if not isinstance(content, str) or tokenizer is None:
                raise ValueError("prompt_tokens cuts texts by the teacher's tokenizer, not conversations.")
            ids = tokenizer(content[: 64 * prompt_tokens], add_special_tokens=False)["input_ids"]
            if len(ids) <= prompt_tokens:
                continue
            content = tokenizer.decode(ids[:prompt_tokens])
        others = {name: value for name, value in row.items() if name != column and name not in OUR_COLUMNS}
        if "completion" in row:
            others["reference"] = row["completion"]
        prompt = make_prompt(content, others)
        if prompt.id not in seen:
            seen.add(prompt.id)
            yield prompt
        if limit is not None and len(seen) >= limit:
            return


def prompt_ids(content: Content, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens after which the teacher writes.

    Raises:
        ValueError: a conversation, and a tokenizer without a chat template, or with one that refuses it.
    """
    if isinstance(content, str):
        return tokenizer(content)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompts are conversations and the teacher's tokenizer has no chat template: it is a base model. Ask "
            "one that has learned to chat, or give the prompts as text."
        )
    try:
        return apply_template(tokenizer, content, add_generation_prompt=True, return_dict=True)["input_ids"]
    except ValueError as error:
        raise ValueError(f"the prompt {str(content)[:80]!r}: {error}") from error


def _column(row: Mapping[str, Any], wanted: str | None) -> str:
    column = next((name for name in ([wanted] if wanted else COLUMNS) if name in row), None)
    if column is None:
        raise ValueError(
            f"the dataset has no column {wanted or ' or '.join(COLUMNS)!r} with prompts, only {', '.join(row)}. "
            "Name it with --prompt_column."
        )
    return column


def _content(value: Any, number: int, column: str, as_chat: bool, system_prompt: str | None) -> Content:
    is_chat = isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value)
    if not (is_chat or (isinstance(value, str) and value.strip())):
        raise ValueError(
            f"row {number} has no prompt in {column!r}: expected a text or messages with role and content, got "
            f"{str(value)[:80]!r}."
        )
    if isinstance(value, str):
        if not as_chat and system_prompt is None:
            return value
        value = [{"role": "user", "content": value}]
    last = max((i for i, message in enumerate(value) if message["role"] == "user"), default=None)
    if last is None:
        raise ValueError(f"row {number} of {column!r} is a conversation in which no user asks.")
    messages = [dict(message) for message in value[: last + 1]]
    if system_prompt is None or any(message["role"] == "system" for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]
