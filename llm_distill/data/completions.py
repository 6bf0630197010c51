"""Some of what the student wrote, as a table: `log_completions`, as TRL's trainers have it."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.utils import is_rich_available
from trl.trainer.utils import print_prompt_completions_sample

from llm_distill.rows import IGNORED, WRITTEN, Batch, View
from llm_distill.tables import Table

TRACKERS = ("wandb", "trackio")
"""Those that take tables, by the names of their modules."""


class Shown(NamedTuple):
    """A text of the student's."""

    prompt: str
    completion: str
    teacher_log_prob: float
    """The teacher's mean, in nats a token; NaN where it does not tell that of the text's own tokens."""
    kd: float
    """The mean of the divergence that is minimised, in nats a token."""
    is_cut: bool
    """Whether the limit ended it, and not its author."""


class CompletionLog:
    """The texts of the step that is logged, as they were learned from; of what is masked there is nothing to see.

    Args:
        tokenizer: the student's.
        ends: tokens that end a text.
        most: how many are printed; None for all.
        report_to: the trackers, which get all of them.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ends: set[int], most: int | None, report_to: list[str]
    ) -> None:
        self.tokenizer, self.ends, self.most = tokenizer, ends, most
        self.trackers = [name for name in TRACKERS if name in report_to]
        self.clear()

    def clear(self) -> None:
        """Forgets what it has seen."""
        self._step = -1
        self._seen: list[tuple[Batch, View, Mapping[str, Tensor]]] = []

    def add(self, step: int, batch: Batch, view: View, metrics: Mapping[str, Float[Tensor, " rows"]]) -> None:
        """A micro-batch and its losses. Nothing waits for them before they are shown."""
        if step != self._step:
            self.clear()
        self._step = step
        if WRITTEN in batch:
            needed = {name: metrics[name] for name in ("kd", "teacher_ce") if name in metrics}
            self._seen.append(({name: batch[name] for name in ("input_ids", "labels", WRITTEN)}, view, needed))

    def log(self, step: int, accelerator: Accelerator) -> Table | None:
        """Those to show, on the first rank, evenly spread over the texts of all; every rank calls it."""
        texts = gather_object([text for seen in self._seen for text in self._texts_of(*seen)])
        self.clear()
        if not texts or not accelerator.is_main_process:
            return None
        for tracker in map(importlib.import_module, self.trackers):
            if getattr(tracker, "run", tracker) is not None:  # wandb's, once it is initialised
                _send(tracker, step, texts)
        return table_of(texts if self.most is None else texts[:: -(-len(texts) // self.most)])

    def _texts_of(self, batch: Batch, view: View, metrics: Mapping[str, Tensor]) -> list[Shown]:
        kd, teacher_ce = (
            _means(metrics[name], view, len(batch["labels"]))
            if name in metrics
            else [float("nan")] * len(batch["labels"])
            for name in ("kd", "teacher_ce")
        )
        texts = []
        for row in (batch[WRITTEN] & (batch["labels"] != IGNORED).any(1)).nonzero()[:, 0].tolist():
            counted = (batch["labels"][row] != IGNORED).nonzero()[:, 0]
            ids, first, last = batch["input_ids"][row], int(counted[0]), int(counted[-1])
            start = int(view.positions.start[view.positions.sample == row][0])
            prompt, completion = (self.tokenizer.decode(part) for part in (ids[start:first], ids[first : last + 1]))
            texts.append(Shown(prompt, completion, -teacher_ce[row], kd[row], int(ids[last]) not in self.ends))
        return texts


def _means(values: Float[Tensor, " rows"], view: View, samples: int) -> list[float]:
    """The mean over the rows of each sequence of a batch, of the values that are known; NaN where none is."""
    known = ~values.isnan()
    sample, values = view.positions.sample[known], values[known].double()
    sums = torch.zeros(samples, dtype=values.dtype, device=values.device).index_add_(0, sample, values)
    return (sums / torch.bincount(sample, minlength=samples)).tolist()


def _send(tracker: Any, step: int, texts: list[Shown]) -> None:
    import pandas as pd

    frame = pd.DataFrame([{"step": step, **text._asdict()} for text in texts])
    tracker.log({"completions": tracker.Table(dataframe=frame)})


def table_of(texts: list[Shown]) -> Table:
    """What a person reads of them, without a column in which nothing is known."""
    rows = [
        [text.prompt, text.completion, _number(text.teacher_log_prob), _number(text.kd), "yes" if text.is_cut else "no"]
        for text in texts
    ]
    return Table(["Prompt", "Completion", "Teacher's log p", "kd", "Cut"], rows).without_empty_columns()


def print_completions(step: int, table: Table) -> None:
    """On the console, by rich if it is installed."""
    if not is_rich_available():
        print(f"Step {step}\n{table.markdown()}")
        return
    prompts, completions, *rest = (list(column) for column in zip(*table.rows, strict=True))
    extra = dict(zip(table.header[2:], rest, strict=True))
    print_prompt_completions_sample(prompts, completions, {}, None, step, extra=extra)


def _number(value: float) -> str:
    return "" if value != value else f"{value:.3f}"
