"""Who wrote the text of a step: what a policy puts into its batches is what is learned from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_distill.teachers import Teacher

Row = dict[str, list[int]]
"""`input_ids` and `labels` of one sequence, without padding."""
Collate = Callable[[Sequence[Row]], dict[str, Any]]


class Policy:
    """The dataset's own text, as it came. A child puts other text in its place."""

    writes = False
    """Whether it makes batches of its own, so that the teacher reads what it made and not what the dataset has."""
    rows_per_row = 1
    """How many rows it makes of each that comes: of those, so many times fewer are in a batch."""

    def begin(
        self,
        student: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        teacher: Teacher | None,
        collate: Collate,
        accelerator: Accelerator,
    ) -> None:
        """Called once, when both models are ready. Raises ValueError for what it cannot work with.

        Args:
            collate: makes batches of rows, with what the teacher's reader fetches for them.
        """

    def __call__(self, coming: Iterator[list[dict[str, Any]]], step: int) -> list[dict[str, Any]]:
        """The micro-batches of optimizer step `step`, before their rows are counted; none where nothing comes.

        Args:
            coming: the dataset's micro-batches of this step, and of those that come after it in this epoch.
        """
        return next(coming, [])

    def save(self, folder: Path) -> None:
        """Writes into a checkpoint's folder what a resumed run needs to go on as this one; every rank calls it."""

    def load(self, folder: Path) -> None:
        """Goes on from what `save` wrote. Raises ValueError where it cannot."""

    def log(self) -> dict[str, float]:
        """Figures of what it has done since the last log, over all ranks; every rank calls it."""
        return {}
