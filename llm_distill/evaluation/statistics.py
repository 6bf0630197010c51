"""How far a figure would move, had other items been drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS_AT_ONCE = 2**21
"""Items drawn in one pass: what bounds the memory, at 24 bytes each."""


class Interval(TypedDict):
    """A figure with its 95 % interval. A plain dict, as JSON keeps it; NaN where there is no item."""

    value: float
    low: float
    high: float


def interval(numerators: ArrayLike, denominators: ArrayLike, *, resamples: int = 1000, seed: int = 0) -> Interval:
    """Σ numerators / Σ denominators over independent items, with the percentile bootstrap's 95 % interval.

    Whole items are drawn again with replacement, each with its numerator and denominator, so items of unequal weight (a
    text with its nats and its tokens) are no trouble. Let texts be the items, not their tokens: those of one text are
    not independent of each other. A mean over items has ones for denominators. The same seed draws the same items, so
    figures over the same items move together. Few items make the interval too narrow; a single one makes it a point.

    Args:
        numerators: a number per item, [n].
        denominators: its weight, [n], of the same sign throughout; items of weight 0 take part in the drawing.

    Raises:
        ValueError: the two differ in length.
    """
    return bootstrap(_columns(numerators, denominators), lambda sums: sums[0] / sums[1], resamples=resamples, seed=seed)


def bootstrap(
    per_item: NDArray[np.float64],
    figure: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """A figure made of sums over items, as in `interval`.

    Args:
        per_item: [columns, n].
        figure: what it is, from the columns' sums [columns, draws] to [draws].
    """
    n = per_item.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(figure(per_item.sum(1, keepdims=True))[0])
        if n <= 1 or not np.isfinite(value):
            value = value if np.isfinite(value) else float("nan")
            return Interval(value=value, low=value, high=value)
        drawn = figure(_resampled_sums(per_item, resamples, np.random.default_rng(seed)))
    low, high = np.quantile(drawn[np.isfinite(drawn)], (0.025, 0.975))  # a draw may hold only items of weight 0
    # Rounding: a constant's sums differ in their last digit.
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))


def _columns(*per_item: ArrayLike) -> NDArray[np.float64]:
    """Each argument as a row of float64, [arguments, n]; tensors may lie on any device."""
    rows = [np.asarray(_on_cpu(values), dtype=np.float64).reshape(-1) for values in per_item]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"one number per item in each, got {' and '.join(str(len(row)) for row in rows)}.")
    return np.stack(rows)


def _on_cpu(values: Any) -> Any:
    return values.detach().double().cpu() if hasattr(values, "detach") else values


def _resampled_sums(sums: NDArray[np.float64], resamples: int, random: np.random.Generator) -> NDArray[np.float64]:
    """The sums over n items drawn with replacement, `resamples` times: [columns, resamples]."""
    columns, n = sums.shape
    drawn = np.empty((columns, resamples))
    at_once = max(1, DRAWS_AT_ONCE // n)
    for start in range(0, resamples, at_once):
        items = random.integers(n, size=(min(at_once, resamples - start), n))
        for column in range(columns):
            drawn[column, start : start + len(items)] = sums[column][items].sum(1)
    return drawn
