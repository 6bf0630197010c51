"""How far a figure would move, had other items been drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES, SEED = 1000, 0
"""The same seed draws the same items, so figures over the same items move together."""
DRAWS_AT_ONCE = 2**21
"""Items drawn in one pass: what bounds the memory, at 24 bytes each."""


class Interval(TypedDict):
    """A figure with its 95 % interval. A plain dict, as JSON keeps it; NaN where there is no item."""

    value: float
    low: float
    high: float


def interval(numerators: ArrayLike, denominators: ArrayLike) -> Interval:
    """Σ numerators / Σ denominators over independent items, with the percentile bootstrap's 95 % interval.

    Whole items are drawn again with replacement, each with its numerator and denominator, so items of unequal weight (a
    text with its nats and its tokens) are no trouble. Let texts be the items, not their tokens: those of one text are
    not independent of each other. A mean over items has ones for denominators. Few items make the interval too narrow;
    a single one makes it a point.

    Args:
        numerators: a number per item, [n].
        denominators: its weight, [n], of the same sign throughout; items of weight 0 take part in the drawing.

    Raises:
        ValueError: the two differ in length.
    """
    return bootstrap(_columns(numerators, denominators), lambda sums: sums[0] / sums[1])


def bootstrap(per_item: NDArray[np.float64], figure: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Interval:
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
        drawn = figure(_resampled_sums(per_item))
    low, high = np.quantile(drawn[np.isfinite(drawn)], (0.025, 0.975))  # a draw may hold only items of weight 0
    # Rounding: a constant's sums differ in their last digit.
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))


def correlation(x: ArrayLike, y: ArrayLike) -> Interval:
    """Pearson's correlation of two numbers per item, [n] each, with the same interval. NaN where one is constant.

    Raises:
        ValueError: the two differ in length.
    """
    pairs = _columns(x, y)
    n = pairs.shape[1]
    spread = pairs.std(1) if n else np.zeros(2)
    if n < 3 or not np.isfinite(spread).all() or (spread <= 1e-12 * np.abs(pairs).max(1)).any():
        return Interval(value=float("nan"), low=float("nan"), high=float("nan"))
    a, b = (pairs - pairs.mean(1, keepdims=True)) / spread[:, None]
    moments = np.stack([a, b, a * a, b * b, a * b])
    drawn = _resampled_sums(moments) / n
    variances = drawn[2:4] - drawn[:2] ** 2
    varied = (variances > 1e-9).all(0)  # a draw may hold one item n times
    covariance = drawn[4] - drawn[0] * drawn[1]
    correlations = np.clip(covariance[varied] / np.sqrt(variances[:, varied].prod(0)), -1, 1)
    value = float(np.clip((a * b).mean(), -1, 1))
    low, high = np.quantile(correlations, (0.025, 0.975))
    return Interval(value=value, low=min(float(low), value), high=max(float(high), value))


def format_interval(figure: Interval | None, form: str = ".3f") -> str:
    """For a table: `0.312 (0.290 to 0.334)`; a dash for what is not known, which JSON keeps as null."""
    if figure is None or figure["value"] is None or np.isnan(figure["value"]):
        return "–"
    value, low, high = (format(end, form) for end in (figure["value"], figure["low"], figure["high"]))
    return value if low == value == high else f"{value} ({low} to {high})"


def _columns(*per_item: ArrayLike) -> NDArray[np.float64]:
    """Each argument as a row of float64, [arguments, n]."""
    rows = [np.asarray(values, dtype=np.float64).reshape(-1) for values in per_item]
    if len({len(row) for row in rows}) > 1:
        raise ValueError(f"one number per item in each, got {' and '.join(str(len(row)) for row in rows)}.")
    return np.stack(rows)


def _resampled_sums(per_item: NDArray[np.float64]) -> NDArray[np.float64]:
    """The sums over n items drawn with replacement, RESAMPLES times: [columns, draws]."""
    columns, n = per_item.shape
    sums, random = np.empty((columns, RESAMPLES)), np.random.default_rng(SEED)
    at_once = max(1, DRAWS_AT_ONCE // n)
    for start in range(0, RESAMPLES, at_once):
        items = random.integers(n, size=(min(at_once, RESAMPLES - start), n))
        for column in range(columns):
            sums[column, start : start + len(items)] = per_item[column][items].sum(1)
    return sums
