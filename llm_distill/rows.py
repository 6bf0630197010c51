"""Which positions count: the one place where labels are shifted.

Position t predicts token t+1, so the rows that count are those whose *next* label is not -100. Everything after this
file speaks of N rows and never of padding, masks or shifts again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
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


Batch = Mapping[str, Any]
"""What the collator made: `input_ids`, `labels` and either `attention_mask` or, packed, `position_ids`; and what
`Teacher.reader` put into it, under SIGNAL."""

SIGNAL = "signal"

SKIPPED = "skipped"
"""In what lies under SIGNAL, if labels were masked there: of how many rows, [batch]."""
KEY_BYTES = 16


class Example(NamedTuple):
    """One sequence of a batch."""

    key: bytes
    sample: int
    """Which row of the batch it is in,"""
    positions: np.ndarray
    """and where: [tokens]."""
    rows: int
    """How many of its positions count."""


def examples_of(batch: Mapping[str, Any]) -> Iterator[Example]:
    """The sequences of a collated batch that have rows that count, in the order of `counted_rows`."""
    ids, labels = _numpy(batch["input_ids"]), _numpy(batch["labels"])
    counts = np.zeros(labels.shape, dtype=bool)
    counts[:, :-1] = labels[:, 1:] != IGNORED
    for sample in np.flatnonzero(counts.any(1)):
        for positions in _sequences(batch, int(sample), ids.shape[1]):
            counted = counts[sample, positions]
            if counted.any():
                yield Example(example_key(ids[sample, positions], counted), int(sample), positions, int(counted.sum()))


def example_key(input_ids: np.ndarray, counted: np.ndarray) -> bytes:
    """16 bytes of BLAKE2b over the ids, as little-endian 32-bit numbers, and a bit for each position that counts.

    Args:
        input_ids: [tokens].
        counted: [tokens], whether the next token is learned there.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES, person=b"llm_distill v1")
    digest.update(len(input_ids).to_bytes(8, "little"))
    digest.update(input_ids.astype("<i4").tobytes())
    digest.update(np.packbits(counted, bitorder="little").tobytes())
    return digest.digest()


def _sequences(batch: Mapping[str, Any], sample: int, length: int) -> list[np.ndarray]:
    if "attention_mask" in batch:
        return [np.flatnonzero(_numpy(batch["attention_mask"])[sample])]
    if "position_ids" not in batch:
        return [np.arange(length)]
    starts = np.flatnonzero(_numpy(batch["position_ids"])[sample] == 0)
    return np.split(np.arange(length), starts[starts > 0])


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
