"""What the teacher is asked: texts to go on with or conversations to answer, each known by what it says."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import remove_none_values

from llm_distill.loading import end_no_text
from llm_distill.templates import apply_template

COLUMNS = ("prompt", "messages", "question", "instruction", "text")
"""Where prompts are looked for, in this order."""
OUR_COLUMNS = (
    *("prompt", "completion", "prompt_id", "sample", "finished", "tokens", "mean_log_prob", "seed", "time", "teacher"),
    *("prompt_ids", "completion_ids", "reason"),
)
"""Columns of what is written, which the dataset's own cannot have."""

SYSTEM_ROLES = ("system", "developer")

Content = str | list[dict[str, Any]]
"""A text, or the messages of a conversation."""


class Prompt(NamedTuple):
    """One question to the teacher."""

    id: str
    """A hash of `content` and `options`: the same question is the same prompt, wherever it stands."""
    content: Content
    row: dict[str, Any]
    """The other columns of its row: a verifier may need them, and they are handed on."""
    options: dict[str, Any]
    """What the chat template gets besides a conversation: the row's `tools` and `chat_template_kwargs`."""


def make_prompt(content: Content, row: Mapping[str, Any]) -> Prompt:
    """Raises ValueError for tools or template options of another form, TypeError for what is no JSON."""
    options = {} if isinstance(content, str) else _template_options(row)
    text = json.dumps([content, options] if options else content, sort_keys=True, ensure_ascii=False)
    return Prompt(hashlib.blake2b(text.encode(), digest_size=16).hexdigest(), content, dict(row), options)


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
        content = _content(row.get(column), number, column, as_chat, system_prompt)
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
        try:
            prompt = make_prompt(content, others)
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {number} cannot be sent to a teacher: {error}.") from error
        if prompt.id not in seen:
            seen.add(prompt.id)
            yield prompt
        if limit is not None and len(seen) >= limit:
            return


def prompt_ids(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens after which the teacher writes.

    Raises:
        ValueError: a conversation, and a tokenizer without a chat template, or with one that refuses it.
    """
    if isinstance(prompt.content, str):
        end_no_text(tokenizer)
        return tokenizer(prompt.content)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError(
            "the prompts are conversations and the teacher's tokenizer has no chat template: it is a base model. Ask "
            "one that has learned to chat, or give the prompts as text."
        )
    options = {"add_generation_prompt": True, **prompt.options.get("chat_template_kwargs", {})}
    return apply_template(tokenizer, prompt.content, tools=prompt.options.get("tools"), return_dict=True, **options)[
        "input_ids"
    ]


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
    if last is None or not str(value[last].get("content") or "").strip():
        raise ValueError(f"row {number} of {column!r} is a conversation in which no user asks.")
    messages = [{"content": message.get("content"), **remove_none_values(message)} for message in value[: last + 1]]
    if system_prompt is None or any(message["role"] in SYSTEM_ROLES for message in messages):
        return messages
    return [{"role": "system", "content": system_prompt}, *messages]


def _template_options(row: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a row's `tools` and `chat_template_kwargs` that say something. What is null in them is what the columns
    of the dataset have filled up, but in JSON text.
    """
    tools, template_kwargs = row.get("tools") or [], row.get("chat_template_kwargs") or {}
    tools = json.loads(tools) if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"its `tools` must be a list of JSON schemas, or that as JSON text, got {str(tools)[:80]!r}")
    if not isinstance(template_kwargs, dict):
        raise ValueError(f"its `chat_template_kwargs` must be a mapping, got {str(template_kwargs)[:80]!r}")
    options = {
        "tools": tools if isinstance(row.get("tools"), str) else remove_none_values(tools),
        "chat_template_kwargs": remove_none_values(template_kwargs),
    }
    return {name: value for name, value in options.items() if value}
