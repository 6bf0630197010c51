"""A reservoir keeps a uniform sample of a stream, the same for the same seed, however often it is interrupted."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from llm_distill.data.replay import Reservoir

CHI_SQUARE_19 = 43.8
"""19 degrees of freedom pass it once in a thousand times."""


def chi_square(counts: Counter, cells: int) -> float:
    expected = counts.total() / cells
    return sum((count - expected) ** 2 for count in counts.values()) / expected + (cells - len(counts)) * expected


def test_every_subset_of_a_stream_is_kept_equally_often() -> None:
    """3 of 6: 20 subsets, added one by one or together."""
    kept = Counter()
    for seed in range(4000):
        reservoir = Reservoir[int](3, seed)
        reservoir.add([0])
        reservoir.add(range(1, 6))
        assert len(reservoir) == 3
        kept[tuple(sorted(reservoir.sample(3, draw=0)))] += 1
    assert {*kept} == {*itertools.combinations(range(6), 3)}
    assert chi_square(kept, 20) < CHI_SQUARE_19


def test_every_ordered_pair_of_what_is_kept_is_drawn_equally_often() -> None:
    """2 of 5: 20 of them, and with another seed other ones."""
    reservoir, other = Reservoir[int](5, seed=1), Reservoir[int](5, seed=2)
    reservoir.add(range(5))
    other.add(range(5))
    pairs = [tuple(reservoir.sample(2, draw)) for draw in range(4000)]
    assert chi_square(Counter(pairs), 20) < CHI_SQUARE_19
    assert pairs[:20] != [tuple(other.sample(2, draw)) for draw in range(20)]
    assert sorted(reservoir.sample(9, draw=0)) == [0, 1, 2, 3, 4], "none twice"
    assert Reservoir[int](5, seed=1).sample(2, draw=0) == []


def test_bounded_by_size_every_item_is_kept_equally_often_wherever_it_came() -> None:
    """Of 20 items those of an odd place have twice the size of the others: within a size, only chance decides."""
    kept = Counter()
    for seed in range(4000):
        reservoir = Reservoir[int](12, seed, size_of=lambda item: 1 + item % 2)
        reservoir.add(range(20))
        assert 11 <= reservoir.size <= 12
        kept.update(reservoir.sample(20, draw=0))
    for size in (0, 1):
        counts = Counter({item: count for item, count in kept.items() if item % 2 == size})
        assert chi_square(counts, 10) < 27.9, "9 degrees of freedom, once in a thousand times"
    with pytest.raises(ValueError, match=r"size 13 is more than the reservoir holds, 12"):
        Reservoir[int](12, 0, size_of=lambda item: item).add([13])


def test_a_reservoir_goes_on_from_its_state_as_it_would_have() -> None:
    whole, first = Reservoir[list[int]](4, seed=3), Reservoir[list[int]](4, seed=3)
    whole.add([item] for item in range(50))
    first.add([item] for item in range(20))
    resumed = Reservoir[list[int]](4, seed=3)
    resumed.load(json.loads(json.dumps(first.state())))
    resumed.add([item] for item in range(20, 50))
    assert (resumed.seen, resumed.size) == (whole.seen, whole.size)
    assert resumed.sample(4, draw=7) == whole.sample(4, draw=7)
