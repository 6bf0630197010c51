"""What is added up between two logs: the metrics over the rows that count, and the time spent in the teacher."""

from __future__ import annotations

import time
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

METRICS = ("kd", "ce", "kl", "entropy", "top1_agreement", "acceptance", "teacher_ce", "aux_loss", "skipped_share")
"""The values per row of `fused_head_loss`; the router's auxiliary loss, a value per micro-batch; the share of rows that
are left out because a stored teacher lacks their text."""

Tally = Float[Tensor, "2 metrics"]
"""Sums of METRICS, and over how many values each of them was taken: a signal may not know them all."""


def empty_tally(device: torch.device, *samples: int) -> Tensor:
    """Zeros [*samples, 2, metrics], in the widest type that the device adds up."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros(*samples, 2, len(METRICS), dtype=dtype, device=device)


def tally_by_sample(
    metrics: dict[str, Float[Tensor, " rows"]],
    sample: Int[Tensor, " rows"],
    samples: int,
    aux_loss: Tensor | None,
    skipped: Int[Tensor, " samples"] | None = None,
) -> Float[Tensor, "samples 2 metrics"]:
    """A tally for each sequence of a batch, so that those that only fill up a batch can be left out."""
    tallies = empty_tally(sample.device, samples)
    for column, name in enumerate(METRICS):
        if (values := metrics.get(name)) is None:
            continue
        tallies[:, 0, column].index_add_(0, sample, values.to(tallies.dtype))
        tallies[:, 1, column].index_add_(0, sample, torch.ones_like(values, dtype=tallies.dtype))
    if aux_loss is not None:
        tallies[0, :, METRICS.index("aux_loss")] = torch.stack([aux_loss.detach(), torch.ones_like(aux_loss)]).to(
            tallies
        )
    if skipped is not None:
        column = METRICS.index("skipped_share")
        tallies[:, 0, column] = skipped.to(tallies)
        tallies[:, 1, column] = skipped.to(tallies) + torch.bincount(sample, minlength=samples)
    return tallies


def means(tally: Tally) -> dict[str, float]:
    """The mean of each metric that was seen at all."""
    return {name: total / n for name, total, n in zip(METRICS, *tally.tolist(), strict=True) if n}


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
