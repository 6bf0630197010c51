"""Mixtures of hidden and sparse signals, weights by row and votes, beside what they are in full and in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_cases import ROWS, TEACHER, VOCAB, hidden_states, make_head
from torch import Tensor

from llm_distill.divergences import ForwardKL
from llm_distill.losses.fused import fused_head_loss
from llm_distill.rows import Positions
from llm_distill.signals import HiddenSignal, MixtureSignal, SparseSignal
from llm_distill.teachers.mixing import (
    give_to_best,
    mean_over_texts,
    merge_tokens,
    mix_draws,
    mix_top_tokens,
    opinion_of,
    take_votes,
    weigh_by,
)

TARGETS = torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(3))


def full(seed: int) -> HiddenSignal:
    return HiddenSignal(hidden_states(TEACHER, seed), make_head(TEACHER, seed))


def probabilities(signal: HiddenSignal, temperature: float = 1.0) -> Tensor:
    return (signal.head(signal.hidden) / temperature).softmax(-1).detach()


def top(signal: HiddenSignal, k: int, temperature: float = 1.0) -> SparseSignal:
    p, ids = probabilities(signal, temperature).topk(k)
    rest = torch.full((ROWS,), -torch.inf, dtype=torch.float64) if k == VOCAB else (1 - p.sum(-1)).log()
    return SparseSignal(ids, p.log(), rest, VOCAB, temperature)


def in_full(signal: SparseSignal) -> Tensor:
    return torch.zeros(ROWS, VOCAB, dtype=torch.float64).scatter_add(-1, signal.ids, signal.log_probs.double().exp())


def row_weights(members: int) -> Tensor:
    return torch.rand(ROWS, members, generator=torch.Generator().manual_seed(8), dtype=torch.float64).softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_live_teacher_and_its_own_full_cache_are_the_live_one(temperature: float) -> None:
    teacher = full(1)
    mixed = mix_top_tokens([teacher, top(teacher, VOCAB, temperature)], row_weights(2))
    torch.testing.assert_close(in_full(mixed), probabilities(teacher, temperature), rtol=1e-5, atol=1e-7)
    assert mixed.log_tail.exp().max() < 1e-6
    assert mixed.disagreement.max() < 1e-5


def test_tokens_of_several_are_mixed_exactly_where_all_know_them_and_within_the_tail_elsewhere() -> None:
    teachers, weights = [full(1), full(2), full(3)], row_weights(3)
    signals = [teachers[0], top(teachers[1], 6), top(teachers[2], 4)]
    mixed = mix_top_tokens(signals, weights)
    p = sum(w[:, None] * probabilities(teacher) for w, teacher in zip(weights.T, teachers, strict=True))
    named = in_full(mixed) > 0
    torch.testing.assert_close(in_full(mixed).sum(-1) + mixed.log_tail.double().exp(), torch.ones(ROWS).double())
    wrong = ((in_full(mixed) - p) * named).abs().sum(-1)
    bound = weights[:, 1] * signals[1].log_tail.exp() + weights[:, 2] * signals[2].log_tail.exp()
    assert (wrong <= bound + 1e-6).all()
    assert wrong.max() > 1e-3, "or nothing was unknown"
    both = [torch.zeros(ROWS, VOCAB).scatter(-1, signal.ids, 1.0) > 0 for signal in signals[1:]]
    exact = both[0] & both[1]
    torch.testing.assert_close(in_full(mixed)[exact], p[exact], rtol=1e-5, atol=1e-7)
    likeliest = probabilities(teachers[0]).argmax(-1, keepdim=True)
    assert named.gather(-1, likeliest).all(), "whoever tells everything is heard with its own likeliest tokens"


def test_fair_draws_of_several_are_fair_draws_of_the_mixture() -> None:
    weights = row_weights(2)
    draws = [
        SparseSignal(
            torch.multinomial(
                probabilities(full(seed)), 3, replacement=True, generator=torch.Generator().manual_seed(seed)
            ),
            torch.full((ROWS, 3), 1 / 3, dtype=torch.float64).log(),
            None,
            VOCAB,
        )
        for seed in (1, 2)
    ]
    expected = sum(w[:, None] * in_full(signal) for w, signal in zip(weights.T, draws, strict=True))
    torch.testing.assert_close(in_full(mix_draws(draws, weights)), expected)


@pytest.mark.parametrize("is_geometric", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_whole_distributions_with_weights_by_row_give_the_loss_of_their_mixture(
    is_geometric: bool, temperature: float
) -> None:
    teachers, weights, student = [full(1), full(2)], row_weights(2), make_head(8, 5)
    hidden = hidden_states(8, 5).requires_grad_()
    signal = MixtureSignal(tuple(teachers), weights, is_geometric)
    loss, metrics = fused_head_loss(hidden, student, signal, ForwardKL(), temperature=temperature, targets=TARGETS)
    (gradient,) = torch.autograd.grad(loss, hidden)

    def mixture(T: float) -> Tensor:
        ps = [probabilities(teacher, T) for teacher in teachers]
        if not is_geometric:
            return sum(w[:, None] * p for w, p in zip(weights.T, ps, strict=True))
        product = torch.stack([p ** w[:, None] for w, p in zip(weights.T, ps, strict=True)]).prod(0)
        return product / product.sum(-1, keepdim=True)

    logits = student.post_process(student.module(hidden))
    log_q = (logits[:, :VOCAB] / temperature).log_softmax(-1)
    outside = logits.logsumexp(-1) - logits[:, :VOCAB].logsumexp(-1)
    kd = temperature**2 * (mixture(temperature) * (mixture(temperature).log() - log_q)).sum(-1)
    (expected,) = torch.autograd.grad((kd + outside).mean(), hidden)
    torch.testing.assert_close(metrics["kd"], kd.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(gradient, expected, rtol=1e-8, atol=1e-11)
    ps, m = [probabilities(teacher) for teacher in teachers], mixture(1.0)
    pairs = [(m, p) if is_geometric else (p, m) for p in ps]
    differ = sum(w * (a * (a.log() - b.log())).sum(-1) for w, (a, b) in zip(weights.T, pairs, strict=True))
    torch.testing.assert_close(metrics["disagreement"], differ, rtol=1e-8, atol=1e-11)


def test_an_opinion_is_the_same_of_a_whole_distribution_and_of_all_its_tokens() -> None:
    teacher, p = full(1), probabilities(full(1))
    for signal in (teacher, top(teacher, VOCAB)):
        opinion = opinion_of(signal, TARGETS)
        torch.testing.assert_close(opinion.log_text.double(), p.gather(-1, TARGETS[:, None])[:, 0].log())
        torch.testing.assert_close(opinion.entropy.double(), -(p * p.log()).sum(-1))
        assert torch.equal(opinion.likeliest, p.argmax(-1))


def test_a_token_that_is_not_named_is_as_likely_as_the_others_of_the_tail() -> None:
    signal = top(full(1), 2)
    named = (signal.ids == TARGETS[:, None]).any(-1)
    log_text = opinion_of(signal, TARGETS).log_text
    torch.testing.assert_close(log_text[~named], (signal.log_tail.exp() / (VOCAB - 2)).log()[~named])


@pytest.mark.parametrize("temperature", [0.01, 1.0, 100.0])
def test_weights_by_row_sum_to_1_and_a_silent_member_has_none(temperature: float) -> None:
    scores, prior = -4 * torch.rand(ROWS, 3, dtype=torch.float64), row_weights(3)
    prior[::2, 1] = 0
    for weights in (weigh_by(scores, prior, temperature), give_to_best(scores, prior)):
        torch.testing.assert_close(weights.sum(-1), torch.ones(ROWS, dtype=torch.float64))
        assert (weights[::2, 1] == 0).all()
    expected = prior * (scores / temperature).exp()
    torch.testing.assert_close(weigh_by(scores, prior, temperature), expected / expected.sum(-1, keepdim=True))


def test_a_text_weighs_as_a_whole() -> None:
    sample, start = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 0, 5, 0, 0])
    position = torch.tensor([1, 2, 6, 3, 4])
    values = torch.tensor([[1.0], [3.0], [7.0], [0.0], [5.0]])
    means = mean_over_texts(values, Positions(sample, position, position, start))
    assert means[:, 0].tolist() == [2.0, 2.0, 7.0, 2.5, 2.5]


def test_votes_are_the_weights_on_the_likeliest_tokens() -> None:
    likeliest, weights = torch.tensor([[3, 5, 3], [1, 2, 0]]), torch.tensor([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    votes = take_votes(likeliest, weights, VOCAB)
    assert votes.temperature is None
    assert [
        dict(zip(*row, strict=True)) for row in zip(votes.ids.tolist(), votes.log_probs.exp().tolist(), strict=True)
    ][1] == pytest.approx({1: 0.6, 2: 0.3, 0: 0.1})
    p = torch.zeros(2, VOCAB).scatter_add(-1, votes.ids, votes.log_probs.exp())
    torch.testing.assert_close(p[0, [3, 5]], torch.tensor([0.5, 0.5]))


@pytest.mark.parametrize("token", [0, VOCAB - 1])
def test_one_that_lies_moves_the_vote_by_no_more_than_its_share(token: int) -> None:
    weights, likeliest = row_weights(4), torch.stack([probabilities(full(s)).argmax(-1) for s in (1, 2, 3, 4)], -1)
    lie = likeliest.clone()
    lie[:, 2] = token
    honest, moved = (in_full(take_votes(votes, weights, VOCAB)) for votes in (likeliest, lie))
    distance = (honest - moved).abs().sum(-1) / 2
    assert (distance <= weights[:, 2] + 1e-12).all()
    assert distance.max() > 0


def test_tokens_are_merged_whatever_their_order_and_padding() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.0], [0.4, 0.1, 0.1, 0.4]])
    ids, log_p = merge_tokens(torch.tensor([[7, 2, 7, 0], [0, 1, 2, 3]]), p.log(), VOCAB)
    assert ids[0, :2].tolist() == [7, 2]
    torch.testing.assert_close(log_p[0].exp(), torch.tensor([0.4, 0.2, 0.0, 0.0]))
    assert sorted(ids[1].tolist()) == [0, 1, 2, 3]


def test_draws_have_no_opinion() -> None:
    signal: Any = SparseSignal(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1), None, VOCAB)
    with pytest.raises(ValueError, match="cache_method=top_k"):
        opinion_of(signal, TARGETS[:1])
