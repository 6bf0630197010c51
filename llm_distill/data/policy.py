"""Who wrote the text of a step: what a policy puts into its batches is what is learned from."""

from __future__ import annotations

from typing import Any, Protocol


class Policy(Protocol):
    """Called with the micro-batches of one optimizer step, before their rows are counted."""

    def __call__(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The batches to learn from: the same, or others in their place."""


def keep_dataset_text(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The dataset's own text, as it came."""
    return batches
