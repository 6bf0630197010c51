"""What a signal is looked up by: the tokens of one example and which of them count, never a position in a dataset.

An example is what attention sees as one sequence: a row without its padding, or one document of a packed row. So a
cache filled from unpacked data serves packed training, in any order, batch size and number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from llm_distill.rows import IGNORED

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


class KeyIndex:
    """Where a key stands in a list of them: `index.find(key)`, `key in index`."""

    def __init__(self, keys: np.ndarray) -> None:
        """`keys` are [n, KEY_BYTES] of bytes."""
        prefixes = np.ascontiguousarray(keys[:, :8]).view("<u8")[:, 0]
        self._keys, self._order = keys, np.argsort(prefixes, kind="stable")
        self._prefixes = prefixes[self._order]

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: bytes) -> bool:
        return self.find(key) is not None

    def find(self, key: bytes) -> int | None:
        prefix = np.frombuffer(key, "<u8", 1)[0]
        for at in range(self._prefixes.searchsorted(prefix), self._prefixes.searchsorted(prefix, "right")):
            if self._keys[self._order[at]].tobytes() == key:
                return int(self._order[at])
        return None

    def with_keys(self, keys: Iterable[bytes]) -> KeyIndex:
        more = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        return KeyIndex(np.concatenate([self._keys, more]))


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
