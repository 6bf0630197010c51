"""Rows that weigh more or less: value and gradients of the fused loss against the naive formula, row by row."""

from __future__ import annotations

import pytest
import torch
from head_cases import ROWS, STUDENT, VOCAB, both_backends, hidden_states, make_head, make_signal, naive_loss

from llm_distill.divergences import make_divergence
from llm_distill.losses.fused import fused_head_loss

TARGETS = torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(3))
WEIGHTS = torch.exp(-torch.arange(ROWS).double() / 5)


@pytest.mark.usefixtures("several_chunks")
@both_backends
@pytest.mark.parametrize("kind", ["hidden", "mixture", "top 5", "none"])
def test_the_loss_is_the_weighted_mean_of_those_of_single_rows(backend: str, kind: str) -> None:
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).requires_grad_()
    signal, p = make_signal(kind, temperature=2.0)
    options = {"temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3}
    loss, _ = fused_head_loss(
        hidden, head, signal, make_divergence("jsd"), targets=TARGETS, row_weights=WEIGHTS, **options
    )
    expected = torch.zeros((), dtype=torch.float64)
    for row in torch.arange(ROWS).split(1):
        of_row = None if signal is None else signal.select(row)
        row_p = p if signal is None else p[row]
        shared = options | {"targets": TARGETS[row], "num_rows": 1}
        expected = expected + WEIGHTS[row] * naive_loss(
            hidden[row], head, of_row, row_p, "jsd", {"beta": 0.5}, **shared
        )
    expected = expected.sum() / WEIGHTS.sum()
    inputs = [hidden, *head.module.parameters()]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for gradient, reference in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-11)
