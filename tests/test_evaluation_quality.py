"""Quality of the gap report: intervals, generations, lm-evaluation-harness, bias transfer."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from llm_distill.evaluation import statistics
from llm_distill.evaluation.statistics import interval


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_distribution():
    items = np.random.default_rng(1).normal(3.0, 2.0, size=2_000)
    found = interval(items, np.ones(2_000))
    half = 1.96 * items.std() / np.sqrt(2_000)
    assert found["value"] == pytest.approx(items.mean())
    assert found["low"] == pytest.approx(items.mean() - half, abs=0.15 * half)
    assert found["high"] == pytest.approx(items.mean() + half, abs=0.15 * half)


def test_bootstrap_interval_covers_the_true_ratio_of_unequal_items():
    """Nats per token of texts of very unequal length, whose true ratio is 2."""
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        tokens = random.integers(5, 400, size=80)
        nats = 2.0 * tokens + random.normal(size=80) * tokens**0.5 * 3
        found = interval(nats, tokens, resamples=300)
        covered += found["low"] <= 2.0 <= found["high"]
    assert 0.90 <= covered / 200 <= 0.98


def test_bootstrap_is_deterministic_takes_tensors_and_counts_an_items_weight():
    numerators, denominators = torch.tensor([1.0, 6.0, 2.0]), torch.tensor([1, 3, 0])
    found = interval(numerators, denominators)
    assert found == interval(numerators.numpy(), [1, 3, 0])
    assert found["value"] == 9 / 4
    assert found["low"] <= 9 / 4 <= found["high"]
    many = np.random.default_rng(3).random(50)
    assert interval(many, np.ones(50)) != interval(many, np.ones(50), seed=1)


def test_bootstrap_of_one_item_constant_items_and_none():
    assert interval([6.0], [2.0]) == {"value": 3.0, "low": 3.0, "high": 3.0}
    assert interval([0.1] * 7, [1.0] * 7) == pytest.approx({"value": 0.1, "low": 0.1, "high": 0.1})
    assert all(np.isnan(value) for value in interval([], []).values())
    assert np.isnan(interval([1.0], [0.0])["value"])
    with pytest.raises(ValueError, match="3 and 2"):
        interval([1, 2, 3], [1, 2])


def test_bootstrap_does_not_depend_on_the_pieces_and_stays_small(monkeypatch: pytest.MonkeyPatch):
    items = np.random.default_rng(2).random(1_000)
    whole = interval(items, np.ones(1_000), resamples=50)
    monkeypatch.setattr(statistics, "DRAWS_AT_ONCE", 3_000)
    assert interval(items, np.ones(1_000), resamples=50) == whole
    monkeypatch.undo()
    many = np.ones(100_000)
    tracemalloc.start()
    interval(many, many, resamples=60)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()
