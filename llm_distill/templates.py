"""A conversation becomes text by its tokenizer's chat template, which may refuse it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

RAISED = (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a template may end with: its own `raise_exception`, or an operation that a value does not have."""


class TemplateRefusedError(ValueError):
    """The template refuses a conversation, and says why."""


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> Any:
    """As the tokenizer's `apply_chat_template`.

    Raises:
        TemplateRefusedError: with what the template says.
    """
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except RAISED as error:
        reason = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)
        raise TemplateRefusedError(f"the chat template refuses this conversation: {reason}") from error


def read_template(template: str) -> str:
    """A chat template: the text of a Jinja file, or the text that was given.

    Raises:
        ValueError: it is neither.
    """
    if "{" in template:
        return template
    if not Path(template).is_file():
        raise ValueError(f"teacher_chat_template={template!r} is no file, and no Jinja: there is no {{ in it.")
    return Path(template).read_text(encoding="utf-8")
