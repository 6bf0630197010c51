"""The one thing a distillation needs of a teacher: what it says where it speaks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from llm_distill.alignment import Alignment
from llm_distill.divergences import Divergence
from llm_distill.models import HEAD, LanguageModel, Needs, millions
from llm_distill.probes import Collator
from llm_distill.rows import View
from llm_distill.signals import HiddenSignal, Signal


class Teacher(ABC):
    """Subclass it with `score` and `describe` to distil from anything."""

    can: frozenset[str] = frozenset({"head"})
    """The kinds of needs that it can serve: {"head"} at least, and those in LAYERS too for a model in memory."""
    k: int | None = None
    """How many tokens of each row it tells of: None for all, 0 for the text's own alone."""
    width: int | None = None
    """Of its hidden states, where they are stored; None where a model in memory tells it."""
    reader: Callable[[MutableMapping[str, Any]], MutableMapping[str, Any]] | None = None
    """Called with every batch where batches are made, in the loader's workers: what it puts into one, under SIGNAL,
    travels with it and is its view's `fetched`. It may mask the labels of what shall not count.
    """
    exchange: Callable[[View, HiddenSignal], Signal] | None = None
    """In place of `score` in a step of training, for one that must know what the student says at the same time: called
    within the student's forward, with the teacher's view and what the student says where it speaks.
    """
    is_student: bool = False
    """Whether it is the student itself, in another state."""
    alignment: Alignment | None = None
    """Where it reads other tokens than the student: how a text in those becomes one in its own."""
    is_stored: bool = False
    """Whether all that it can say was said before, so that a text may be unknown to it."""

    @abstractmethod
    def score(self, view: View, needs: Needs = HEAD) -> Signal:
        """What the teacher says about the positions of a view, in their order. `needs` are of the kinds in `can`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Who it is, as JSON: what a cache, a report and a model card record. No path and no secret."""

    def summary(self) -> str:
        """Who it is, in a line."""
        described = [model.describe() for model in self.models] or [self.describe()]
        return "; ".join(_in_words(description) for description in described)

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        """Those of it that are models in memory."""
        return ()

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

    def require_documents_apart(self, collate: Collator, accelerator: Accelerator) -> None:  # noqa: B027
        """Raises ValueError if the documents of a row that `collate` packs would see each other; called after
        `prepare`, where rows are packed.
        """

    def update(self) -> None:  # noqa: B027
        """Called after each optimizer step of the student."""

    def log(self) -> dict[str, float]:
        """Figures of its own, for each log; every rank calls it."""
        return {}

    def save_state(self, folder: Path) -> None:  # noqa: B027
        """Writes into a checkpoint, on the first rank, what changes of it while the student is trained."""

    def load_state(self, folder: Path) -> None:  # noqa: B027
        """Goes on from there."""

    def flush(self) -> None:  # noqa: B027
        """Writes what it keeps of its answers: called after each epoch, with each checkpoint and when training ends."""


def _in_words(description: dict[str, Any]) -> str:
    bits, parameters = description.get("bits"), description.get("parameters")
    name = description.get("model") or description.get("architecture")
    parts = [name, parameters and millions(parameters), description.get("dtype"), bits and f"{bits} bits"]
    return ", ".join(str(part) for part in parts if part)


class TellTeacher(TrainerCallback):
    """Tells the teacher of each step, and lets one that keeps its answers write them when the student is saved."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.teacher.update()

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self.teacher.flush()

    on_epoch_end = on_train_end = on_evaluate = on_predict = on_save
