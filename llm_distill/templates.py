"""A conversation becomes text by its tokenizer's chat template, which may refuse it."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

RAISED = (TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What a template may end with: its own `raise_exception`, or an operation that a value does not have."""


def apply_template(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], **options: Any) -> Any:
    """As the tokenizer's `apply_chat_template`.

    Raises:
        ValueError: the template refuses the conversation, with what it says.
    """
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except RAISED as error:
        reason = f"KeyError: {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"the chat template refuses this conversation: {reason}") from error
