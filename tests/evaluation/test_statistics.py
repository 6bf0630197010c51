"""Intervals of figures, by the bootstrap."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch

from llm_distill.evaluation import statistics
from llm_distill.evaluation.statistics import correlation, format_interval, interval


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_distribution():
    items = np.random.default_rng(1).normal(3.0, 2.0, size=2_000)
    figure = interval(items, np.ones(2_000))
    half = 1.96 * items.std() / np.sqrt(2_000)
    assert figure["value"] == pytest.approx(items.mean())
    assert figure["low"] == pytest.approx(items.mean() - half, abs=0.15 * half)
    assert figure["high"] == pytest.approx(items.mean() + half, abs=0.15 * half)


def test_bootstrap_interval_covers_the_true_ratio_of_unequal_items(monkeypatch: pytest.MonkeyPatch):
    """Nats per token of texts of very unequal length, whose true ratio is 2."""
    monkeypatch.setattr(statistics, "RESAMPLES", 300)
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        tokens = random.integers(5, 400, size=80)
        nats = 2.0 * tokens + random.normal(size=80) * tokens**0.5 * 3
        figure = interval(nats, tokens)
        covered += figure["low"] <= 2.0 <= figure["high"]
    assert 0.90 <= covered / 200 <= 0.98


def test_bootstrap_is_deterministic_takes_tensors_and_counts_an_items_weight():
    numerators, denominators = torch.tensor([1.0, 6.0, 2.0]), torch.tensor([1, 3, 0])
    figure = interval(numerators, denominators)
    assert figure == interval(numerators.numpy(), [1, 3, 0])
    assert figure["value"] == 9 / 4
    assert figure["low"] <= 9 / 4 <= figure["high"]


def test_bootstrap_of_one_item_constant_items_and_none():
    assert interval([6.0], [2.0]) == {"value": 3.0, "low": 3.0, "high": 3.0}
    assert interval([0.1] * 7, [1.0] * 7) == pytest.approx({"value": 0.1, "low": 0.1, "high": 0.1})
    assert all(np.isnan(value) for value in interval([], []).values())
    assert np.isnan(interval([1.0], [0.0])["value"])
    with pytest.raises(ValueError, match="3 and 2"):
        interval([1, 2, 3], [1, 2])


def test_bootstrap_does_not_depend_on_the_pieces_and_stays_small(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(statistics, "RESAMPLES", 60)
    items = np.random.default_rng(2).random(1_000)
    whole = interval(items, np.ones(1_000))
    with monkeypatch.context() as pieces:
        pieces.setattr(statistics, "DRAWS_AT_ONCE", 3_000)
        assert interval(items, np.ones(1_000)) == whole
    many = np.ones(100_000)
    tracemalloc.start()
    interval(many, many)
    assert tracemalloc.get_traced_memory()[1] < 64 * 2**20
    tracemalloc.stop()


def test_bootstrap_of_a_correlation_is_fishers():
    random = np.random.default_rng(0)
    x = random.normal(size=400)
    y = 0.6 * x + 0.8 * random.normal(size=400)
    figure, r = correlation(x, y), np.corrcoef(x, y)[0, 1]
    assert figure["value"] == pytest.approx(r)
    for side, sign in (("low", -1), ("high", 1)):
        assert figure[side] == pytest.approx(np.tanh(np.arctanh(r) + sign * 1.96 / np.sqrt(397)), abs=0.02)
    assert correlation(x, -3 * x + 1) == pytest.approx({"value": -1.0, "low": -1.0, "high": -1.0})
    assert np.isnan(correlation(x, np.full(400, 0.1))["value"])
    assert np.isnan(correlation([1.0, 2.0], [1.0, 3.0])["value"])


def test_an_unknown_figure_is_a_dash_in_a_table():
    unknown = interval([], [])
    assert format_interval(unknown) == format_interval(None) == "–"
    assert format_interval({"value": None, "low": None, "high": None}) == "–", "as JSON keeps it"
    assert format_interval({"value": 0.5, "low": 0.25, "high": 1.0}, ".2f") == "0.50 (0.25 to 1.00)"
    assert format_interval({"value": 0.5, "low": 0.5, "high": 0.5}, ".2f") == "0.50"
