"""Which positions count: the one place where labels are shifted.

Position t predicts token t+1, so the rows that count are those whose *next* label is not -100. Everything after this
file speaks of N rows and never of padding, masks or shifts again.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Int
from torch import Tensor

IGNORED = -100


class Rows(NamedTuple):
    """The N positions of a batch that count, in reading order."""

    sample: Int[Tensor, " rows"]
    """Which sequence of the batch."""
    position: Int[Tensor, " rows"]
    """Which position t in it."""
    targets: Int[Tensor, " rows"]
    """The token at t+1."""


def counted_rows(labels: Int[Tensor, "batch time"]) -> Rows:
    """The positions whose next label counts, with that label."""
    next_labels = labels[:, 1:]
    sample, position = (next_labels != IGNORED).nonzero(as_tuple=True)
    return Rows(sample, position, next_labels[sample, position])


def count_rows(labels: Int[Tensor, "batch time"]) -> Int[Tensor, ""]:
    """How many positions count: what a batch's loss is divided by."""
    return (labels[:, 1:] != IGNORED).sum()
