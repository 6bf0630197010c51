"""What a signal is looked up by: the tokens of one example and which of them count, never a position in a dataset.

An example is what attention sees as one sequence: a row without its padding, or one document of a packed row. So a
cache filled from unpacked data serves packed training, in any order, batch size and number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from llm_distill.rows import KEY_BYTES


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

    def shared_with(self, others: Iterable[KeyIndex]) -> tuple[int, int]:
        """How many keys are in all of them, and how many in any."""
        pairs = [np.ascontiguousarray(index._keys).view("<u8,<u8")[:, 0] for index in (self, *others)]
        _, counts = np.unique(np.concatenate([np.unique(of_one) for of_one in pairs]), return_counts=True)
        return int((counts == len(pairs)).sum()), len(counts)

    def with_keys(self, keys: Iterable[bytes]) -> KeyIndex:
        more = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, KEY_BYTES)
        return KeyIndex(np.concatenate([self._keys, more]))
