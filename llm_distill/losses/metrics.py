"""What is added up between two logs: the metrics over the rows that count, and the time spent waiting."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float, Int
from torch import Tensor

METRICS = {
    "kd": "kd",
    "ce": "ce",
    "kl": "kl",
    "reverse_kl": "reverse_kl",
    "top_k_mass": "top_k_mass",
    "top_k_overlap": "top_k_overlap",
    "entropy": "entropy",
    "top1_agreement": "top1_agreement",
    "acceptance": "acceptance",
    "teacher_ce": "teacher_ce",
    "disagreement": "disagreement",
    "kd_row_weight": "kd_row_weight",
    "mean_token_accuracy": "correct",
    "outside_mass": "outside_mass",
    "outside_loss": "outside_loss",
    "aux_loss": "aux_loss",
    "skipped_share": "skipped_share",
}
"""What a log calls each metric, and the value per row (see `fused_head_loss` and `measure_likeness`) whose mean it is.
The router's auxiliary loss is a value per micro-batch, and the share of rows that are left out, because a stored
teacher lacks their text, one per sequence."""
LABELS = {
    "loss": "loss, nats a token",
    "ce": "cross-entropy, nats a token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits a byte",
    "teacher_ce": "the teacher's cross-entropy",
    "kl": "KL(teacher‖student), nats",
    "reverse_kl": "KL(student‖teacher), nats",
    "top_k_mass": "the student's mass on the teacher's top tokens",
    "top_k_overlap": "the teacher's top tokens among the student's",
    "top1_agreement": "same likeliest token",
    "acceptance": "Σ min(p, q)",
    "disagreement": "how much the teachers differ, nats",
}
"""In words, wherever a person reads them: reports, model cards, notebooks."""

Tally = Float[Tensor, "2 metrics"]
"""The sums of some metrics, and over how many values each was taken: a signal may not know them all."""


class Meter:
    """Adds up the metrics, the tokens and the seconds since the last log.

    Args:
        names: of the metrics, as METRICS has them and, of a term beside divergence and cross-entropy, its own.
        device: where they are added up, so that no step waits for it.
    """

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        self.names, self.device = tuple(names), device
        self.in_teacher, self.in_data = Stopwatch(device), Stopwatch(torch.device("cpu"))
        self.num_tokens = 0.0
        """Of all ranks, since training began."""
        self.reset()

    def reset(self) -> None:
        self.tally = self.zeros()
        self.tokens: Tensor | int = 0
        self.in_teacher.reset()
        self.in_data.reset()
        self.since = time.perf_counter()

    def zeros(self, *samples: int) -> Tensor:
        """Zeros [*samples, 2, metrics], in the widest type that the device adds up."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return torch.zeros(*samples, 2, len(self.names), dtype=dtype, device=self.device)

    def by_sample(
        self,
        values: Mapping[str, Float[Tensor, " rows"]],
        sample: Int[Tensor, " rows"],
        samples: int,
        aux_loss: Tensor | None = None,
        skipped: Int[Tensor, " samples"] | None = None,
    ) -> Float[Tensor, "samples 2 metrics"]:
        """A tally for each sequence of a batch, so that those that only fill up a batch can be left out.

        Args:
            values: per row, by the names that the losses give them; NaN where one is not known.
            sample: which sequence each row is of.
            aux_loss: the router's.
            skipped: how many rows of each sequence are left out.
        """
        tallies = self.zeros(samples)
        for column, name in enumerate(self.names):
            if (value := values.get(METRICS.get(name, name))) is not None:
                is_known = ~value.isnan()
                tallies[:, 0, column].index_add_(0, sample, value.where(is_known, 0).to(tallies))
                tallies[:, 1, column].index_add_(0, sample, is_known.to(tallies))
        if aux_loss is not None:
            column = self.names.index("aux_loss")
            tallies[0, :, column] = torch.stack([aux_loss.detach(), torch.ones_like(aux_loss)]).to(tallies)
        if skipped is not None:
            column = self.names.index("skipped_share")
            tallies[:, 0, column] = skipped.to(tallies)
            tallies[:, 1, column] = skipped.to(tallies) + torch.bincount(sample, minlength=samples)
        return tallies

    def means(self, tally: Tally) -> dict[str, float]:
        """The mean of each metric that was seen at all."""
        return {name: total / count for name, total, count in zip(self.names, *tally.tolist(), strict=True) if count}

    def log(self, accelerator: Accelerator) -> dict[str, float]:
        """The means over all ranks since the last log, and how fast it went; then everything starts from 0."""
        elapsed = time.perf_counter() - self.since
        tokens = torch.as_tensor(self.tokens).to(self.tally).reshape(1)
        totals = accelerator.reduce(torch.cat([self.tally.flatten(), tokens]), "sum")
        self.num_tokens += float(totals[-1])
        logs = {
            **self.means(totals[:-1].view_as(self.tally)),
            "num_tokens": self.num_tokens,
            "tokens_per_second": float(totals[-1]) / elapsed,
            "teacher_share": self.in_teacher.reset() / elapsed,
            "data_share": self.in_data.reset() / elapsed,
        }
        self.reset()
        return logs


class Stopwatch:
    """`with watch: …` adds up; on CUDA the ends are events on the stream, so that nothing waits for them."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
        self._seconds = 0.0
        self._start: Any = None

    def _now(self) -> Any:
        if not self._on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def __enter__(self) -> None:
        self._start = self._now()

    def __exit__(self, *error: object) -> None:
        self._spans.append((self._start, self._now()))
        if len(self._spans) > 1000:  # nobody has asked for a long time
            self._fold()

    def _fold(self) -> None:
        if self._on_cuda and self._spans:
            self._spans[-1][1].synchronize()
            self._seconds += sum(start.elapsed_time(end) for start, end in self._spans) / 1000
        else:
            self._seconds += sum(end - start for start, end in self._spans)
        self._spans = []

    def reset(self) -> float:
        """The seconds since the last reset."""
        self._fold()
        seconds, self._seconds = self._seconds, 0.0
        return seconds
