"""Logits in chunks, and the tokens that are chosen while their statistics are taken."""

from __future__ import annotations

import pytest
import torch
from head_cases import (
    STUDENT,
    VOCAB,
    hidden_states,
    make_head,
)
from torch import nn

from llm_distill.divergences import make_divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused import cpp_backend, logits
from llm_distill.losses.fused.head_loss import opened_projection
from llm_distill.losses.fused.logits import logits_in_chunks
from llm_distill.losses.fused.task import HeadLossTask, TokenChoice, TopTokens

pytestmark = pytest.mark.usefixtures("several_chunks")


@torch.no_grad()
@pytest.mark.parametrize("k", [1, 7, VOCAB, 100])
@pytest.mark.parametrize(("temperature", "scale", "soft_cap"), [(1.0, 1.0, None), (2.0, 1.7, 3.0)])
def test_the_likeliest_tokens_come_with_the_statistics(
    k: int, temperature: float, scale: float, soft_cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "chunk_rows", lambda *_: 16)
    head, hidden = make_head(STUDENT, 1, scale, soft_cap), hidden_states(STUDENT, 1)
    log_p = (head(hidden) / temperature).log_softmax(-1)
    for part in logits_in_chunks(hidden, head, temperature, TokenChoice(k)):
        assert isinstance(part.scores, TopTokens)
        expected = log_p[part.rows].topk(min(k, VOCAB))
        assert torch.allclose(part.scores.values - part.log_total[:, None], expected.values)
        assert torch.equal(part.scores.ids, expected.indices)


@torch.no_grad()
@pytest.mark.parametrize("threshold", [0.3, 0.02, 1e-3])
@pytest.mark.parametrize("vocab", [3, 64, 1000])
@pytest.mark.parametrize(("temperature", "soft_cap"), [(1.0, None), (2.0, 6.0)])
def test_fair_draws_come_with_the_statistics(
    vocab: int, threshold: float, temperature: float, soft_cap: float | None
) -> None:
    torch.manual_seed(0)
    head, draws = LMHead(nn.Linear(STUDENT, vocab), vocab, soft_cap=soft_cap), 2000
    hidden, choice = torch.randn(1, STUDENT) * 5, TokenChoice(int(1 / threshold) + 2, threshold)
    log_p = (head(hidden)[0] / temperature).log_softmax(-1)
    expected = (log_p.exp() / threshold).clamp(max=1)
    all_drawn = []
    for part in logits_in_chunks(hidden.expand(draws, -1), head, temperature, choice, torch.rand(draws)):
        assert isinstance(part.scores, TopTokens)
        drawn = part.scores.ids >= 0
        assert (part.scores.ids.diff() > 0)[drawn[:, 1:]].all()  # each once
        values = (part.scores.values - part.log_total[:, None])[drawn]
        assert torch.allclose(values, log_p[part.scores.ids[drawn]], atol=1e-5)
        assert ((drawn.sum(-1) - expected.sum()).abs() < 1 + 1e-3).all()
        all_drawn.append(part.scores.ids[drawn])
    share = torch.bincount(torch.cat(all_drawn), minlength=vocab) / draws
    assert (share[expected >= 1] == 1).all()
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / draws).sqrt() + 2 / draws).all()


@pytest.mark.parametrize("vocab", [3, 300, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_of_tied_tokens_the_first_are_the_likeliest(vocab: int, dtype: torch.dtype) -> None:
    raw = torch.randint(0, 9, (5, vocab)).to(dtype)
    raw[4, 1:] = -torch.inf
    head = LMHead(nn.Linear(1, vocab, bias=False), vocab)
    student = opened_projection(head, torch.zeros(5, 1, dtype=dtype), torch.zeros(vocab, 1, dtype=dtype), None)
    k = min(70, vocab)
    task = HeadLossTask(student, None, [], make_divergence("forward_kl"), 1.0, 0.0, 1.0, 0.0, None)
    kernels = cpp_backend.kernels_of(task)
    assert kernels is not None
    _, top = kernels.statistics_and_tokens(task, raw, TokenChoice(k))
    expected = raw.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top.values[:4], expected.values[:4, :k])
    assert torch.equal(top.ids[:4], expected.indices[:4, :k])
    assert top.ids[4].tolist() == [0] + [-1] * (k - 1)
    assert (top.values[4, 1:] < -1e29).all()
