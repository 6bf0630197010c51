"""Which layers are alike: what the figure is, what it does not depend on, and that the report has it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_distill.evaluation.cka import layers_parts, linear_cka


def states(seed: int, rows: int = 40, width: int = 12) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_it_is_what_the_paper_says_with_sums_without_bias() -> None:
    x, y = states(0), states(0)[:, :5] ** 2 + states(1)[:, :5]
    n = len(x)

    def hsic(k: Tensor, l: Tensor) -> float:  # noqa: E741
        k, l = (m - m.diag().diag() for m in (k, l))  # noqa: E741
        ones = torch.ones(n, dtype=k.dtype)
        first, second = (k @ l).trace(), (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
        return float(first + second - 2 / (n - 2) * (ones @ k @ l @ ones)) / (n * (n - 3))

    k, l = x @ x.T, y @ y.T  # noqa: E741
    expected = hsic(k, l) / (hsic(k, k) * hsic(l, l)) ** 0.5
    assert float(linear_cka([x], [y])) == pytest.approx(expected, rel=1e-4)


def test_rotation_scale_and_a_constant_change_nothing() -> None:
    x = states(0)
    rotation = torch.linalg.qr(states(3, 12, 12)).Q
    assert float(linear_cka([x], [3 * x @ rotation + 7])) == pytest.approx(1, abs=1e-4)


def test_of_unrelated_layers_it_is_near_0_even_where_they_are_wider_than_there_are_tokens() -> None:
    values = linear_cka([states(seed, 64, 256) for seed in range(3)], [states(seed, 64, 200) for seed in range(5, 9)])
    assert values.shape == (3, 4)
    assert float(values.abs().max()) < 0.1


def test_the_table_names_the_layer_that_is_most_alike() -> None:
    table, note = layers_parts({"cka": [[0.9, 0.1, 0.2], [0.0, 0.3, 0.8]], "tokens": 1024})
    assert table.rows == [["1", "1", "0.90"], ["2", "3", "0.80"]]
    assert "1,024 tokens" in note
