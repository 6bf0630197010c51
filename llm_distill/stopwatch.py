"""Time spent in one part of a step, without making an accelerator wait for it."""

from __future__ import annotations

import time
from typing import Any

import torch


class Stopwatch:
    """`with watch: …` adds up; on CUDA the ends are events on the stream, which are read only in `seconds()`."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._spans: list[tuple[Any, Any]] = []
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

    def reset(self) -> float:
        """The seconds since the last reset."""
        if self._on_cuda and self._spans:
            self._spans[-1][1].synchronize()
            seconds = sum(start.elapsed_time(end) for start, end in self._spans) / 1000
        else:
            seconds = sum(end - start for start, end in self._spans)
        self._spans = []
        return seconds
