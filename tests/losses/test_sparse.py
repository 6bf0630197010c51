"""Signals of a few tokens a row: top-k with the mass outside, and samples."""

from __future__ import annotations

import pytest
import torch
from head_cases import (
    ROWS,
    STUDENT,
    VOCAB,
    both_backends,
    hidden_states,
    make_head,
    make_signal,
)
from torch import Tensor

from llm_distill.divergences import make_divergence
from llm_distill.losses.fused import fused_head_loss
from llm_distill.signals import SparseSignal

pytestmark = pytest.mark.usefixtures("several_chunks")


@both_backends
def test_a_sparse_row_with_fewer_tokens_is_padded_with_minus_infinity(backend: str) -> None:
    signal, _ = make_signal("top 5")
    short = SparseSignal(signal.ids[:, :3], signal.log_probs[:, :3], log_tail_of(signal, 3), VOCAB)
    padding = torch.zeros(ROWS, 2, dtype=torch.long)
    padded = SparseSignal(
        torch.cat([short.ids, padding], -1),
        torch.cat([short.log_probs, torch.full((ROWS, 2), -torch.inf)], -1),
        short.log_tail,
        VOCAB,
    )
    results = []
    for sparse in (short, padded):
        hidden = hidden_states(STUDENT, 5).requires_grad_()
        loss, _ = fused_head_loss(hidden, make_head(STUDENT, 0), sparse, make_divergence("reverse_kl"))
        results.append((loss, torch.autograd.grad(loss, hidden)[0]))
    torch.testing.assert_close(results[0], results[1])


def log_tail_of(signal: SparseSignal, k: int) -> Tensor:
    return (1 - signal.log_probs[:, :k].exp().sum(-1)).log()


def test_sampling_is_unbiased_over_many_draws() -> None:
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05] + [0.0] * (VOCAB - 4)], dtype=torch.float64)
    hidden, head = hidden_states(STUDENT, 5)[:1].requires_grad_(), make_head(STUDENT, 0, rows=VOCAB)
    ids = torch.multinomial(p, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))
    signal = SparseSignal(ids, torch.full(ids.shape, -torch.tensor(20_000.0).log().item()).double(), None, VOCAB)
    loss, _ = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))
    (gradient,) = torch.autograd.grad(loss, hidden)
    (expected,) = torch.autograd.grad(-(p * head(hidden).log_softmax(-1)).sum(), hidden)
    assert torch.nn.functional.cosine_similarity(gradient, expected).item() > 0.999


def test_an_empty_tail_leaves_reverse_kl_finite() -> None:
    signal, _ = make_signal("top 5")
    empty = SparseSignal(signal.ids, signal.log_probs, torch.full((ROWS,), -torch.inf).double(), VOCAB)
    hidden = hidden_states(STUDENT, 5).requires_grad_()
    loss, _ = fused_head_loss(hidden, make_head(STUDENT, 0), empty, make_divergence("reverse_kl"))
    loss.backward()
    assert 0 < loss < 100
    assert hidden.grad.abs().max() < 1000
