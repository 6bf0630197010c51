"""What was learned from before, to be learned from again: a uniform sample of a stream, in bounded memory."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import numpy as np

Item = TypeVar("Item")


class Reservoir(Generic[Item]):
    """A uniform sample of all that was ever added. Each item gets a random number, and those with the lowest are kept
    (bottom-k sampling; Cohen & Kaplan, 2007): which they are depends on the seed and the order in which they came.

    Args:
        capacity: what the kept items may have together: their number, or the sum of their sizes.
        seed: of the draws.
        size_of: an item's size, such as its bytes; by default each counts 1. What comes after a large item is kept more
            seldom, but with the same chance each, however large.
    """

    def __init__(self, capacity: float, seed: int, size_of: Callable[[Item], float] = lambda item: 1) -> None:
        self.capacity, self.seed, self.size_of = capacity, seed, size_of
        self.seen = 0
        """How many were ever added."""
        self.size = 0.0
        self._limit = 2**64  # the lowest number of an item that had to go
        self._kept: list[tuple[int, int, Item]] = []  # a heap with the highest number first: (−number, place, item)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, items: Iterable[Item]) -> None:
        """Keeps them, or some, or some of those before. Raises ValueError for one larger than the capacity."""
        for item in items:
            number, size = self._draw(self.seen), self.size_of(item)
            if size > self.capacity:
                raise ValueError(f"an item of size {size:,} is more than the reservoir holds, {self.capacity:,}.")
            if number < self._limit:
                heapq.heappush(self._kept, (-number, self.seen, item))
                self.size += size
            while self.size > self.capacity:
                number, _, gone = heapq.heappop(self._kept)
                self._limit = -number
                self.size -= self.size_of(gone)
            self.seen += 1

    def sample(self, count: int, draw: int) -> list[Item]:
        """So many of those that are kept, in random order, none twice: all of them where there are fewer.

        Args:
            draw: with the seed it decides which, so that nothing has to be remembered; a step's number will do.
        """
        in_order = sorted(self._kept, key=lambda kept: kept[1])
        places = np.random.default_rng((self.seed, draw)).permutation(len(in_order))[:count]
        return [in_order[place][2] for place in places]

    def state(self) -> dict[str, Any]:
        """What `load` goes on from, as JSON if the items are."""
        return {"seen": self.seen, "limit": self._limit, "kept": [kept[1:] for kept in self._kept]}

    def load(self, state: dict[str, Any]) -> None:
        """As it was when `state` was called, over the same seed and capacity."""
        self.seen, self._limit = state["seen"], state["limit"]
        self._kept = [(-self._draw(place), place, item) for place, item in state["kept"]]
        heapq.heapify(self._kept)
        self.size = sum(self.size_of(item) for _, _, item in self._kept)

    def _draw(self, place: int) -> int:
        """An item's number, from 0 to 2⁶⁴."""
        return draw(8, self.seed, place)


def draw(size: int, *parts: Any) -> int:
    """A number of so many bytes that looks random, and is the same for the same parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=size).digest())
