"""The one thing a distillation needs of a teacher: what it says about the rows that count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from llm_distill.divergences import Divergence
from llm_distill.signals import Signal

Batch = Mapping[str, Any]
"""What the collator made: `input_ids`, `labels` and either `attention_mask` or, packed, `position_ids`; and what
`Teacher.reader` put into it, under SIGNAL."""
SIGNAL = "signal"
SKIPPED = "skipped"
"""In what lies under SIGNAL, if labels were masked there: of how many rows, [batch]."""


def refuse_past_context(length: int, max_length: int | None, where: str) -> None:
    """Raises ValueError if a sequence is longer than the teacher can read."""
    if max_length is not None and length > max_length:
        raise ValueError(
            f"{where} has a sequence of {length:,} tokens, longer than the teacher's context of {max_length:,}. Set "
            f"max_length={max_length} or less."
        )


def different_ids(teachers: str, student: PreTrainedTokenizerBase, what: str) -> ValueError:
    """To be raised. `teachers` follows "the teacher's tokenizer", and `what` names what has other ids."""
    return ValueError(
        f"the teacher's tokenizer ({teachers}) and the student's ({len(student.get_vocab()):,} tokens, "
        f"{type(student).__name__}) give different ids for {what}, so their distributions cannot be compared token by "
        "token. Distil from the teacher's text instead (sequence-level distillation), or give both the same tokenizer."
    )


class Teacher(ABC):
    """Subclass it with `score` and `describe` to distil from anything."""

    k: int | None = None
    """How many tokens of each row it tells of; None for all."""
    reader: Callable[[MutableMapping[str, Any]], MutableMapping[str, Any]] | None = None
    """Called with every batch where batches are made, in the loader's workers: what it puts into one, under SIGNAL,
    travels with it. It may mask the labels of what shall not count.
    """

    @abstractmethod
    def score(self, batch: Batch) -> Signal:
        """What the teacher says about `counted_rows(batch["labels"])`, in that order."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Who it is, as JSON: what a cache, a report and a model card record. No path and no secret."""

    def check(self, divergence: Divergence, temperature: float) -> None:  # noqa: B027
        """Raises ValueError if its signals cannot serve this; called when a trainer is built."""

    def fit_to(self, tokenizer: PreTrainedTokenizerBase) -> None:  # noqa: B027
        """Raises ValueError if its tokens are not the student's; called when a trainer is built."""

    @property
    def max_length(self) -> int | None:
        """The longest sequence that it can read, in tokens; None if there is no limit."""
        return None

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:  # noqa: B027
        """Moves to the device, shards over ranks: called once, before the first `score`."""

    def flush(self) -> None:  # noqa: B027
        """Writes what it keeps of its answers: called after each epoch, with each checkpoint and when training ends."""
