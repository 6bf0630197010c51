"""A conversation becomes text by its tokenizer's chat template, which may refuse it."""

from __future__ import annotations

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
