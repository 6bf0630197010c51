"""Each divergence against its definition, its gradient against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from textbook import CASES, from_the_paper
from torch import Tensor

from llm_distill.divergences import DIVERGENCES, Divergence, Terms, make_divergence


def terms(divergence: Divergence, log_p: Tensor, log_q: Tensor) -> Terms:
    return divergence.terms(log_p.exp(), log_q.exp(), log_p, log_q)


def random_logits(rows: int = 5, vocab: int = 11, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    teacher, student = (3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    return teacher, student


def test_every_divergence_of_the_table_is_tried_here() -> None:
    assert {name for name, _ in CASES} == set(DIVERGENCES)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_value_equals_the_textbook_formula(name: str, parameters: dict[str, float]) -> None:
    teacher, student = random_logits()
    phi, _ = terms(make_divergence(name, **parameters), teacher.log_softmax(-1), student.log_softmax(-1))
    expected = from_the_paper(name, teacher.softmax(-1), student.softmax(-1), **parameters)
    torch.testing.assert_close(phi.sum(-1), expected, rtol=1e-12, atol=1e-12)
    assert (expected > 0).all()


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_slope_gives_the_gradient_on_the_logits(name: str, parameters: dict[str, float]) -> None:
    teacher, student = random_logits()
    student.requires_grad_()
    (expected,) = torch.autograd.grad(
        from_the_paper(name, teacher.softmax(-1), student.softmax(-1), **parameters).sum(), student
    )
    log_q = student.detach().log_softmax(-1)
    _, psi = terms(make_divergence(name, **parameters), teacher.log_softmax(-1), log_q)
    torch.testing.assert_close(psi - log_q.exp() * psi.sum(-1, keepdim=True), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_a_slope_sum_is_what_it_says(name: str, parameters: dict[str, float]) -> None:
    divergence = make_divergence(name, **parameters)
    psi = terms(divergence, *(logits.log_softmax(-1) for logits in random_logits())).psi.sum(-1)
    assert (divergence.slope_sum is not None) == (psi.std() < 1e-9)
    if divergence.slope_sum is not None:
        torch.testing.assert_close(psi, torch.full_like(psi, divergence.slope_sum))


@pytest.mark.parametrize(("name", "parameters"), CASES)
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_identical_distributions_have_divergence_zero(name: str, parameters: dict[str, float], scale: float) -> None:
    log_p = (scale * random_logits()[0]).float().log_softmax(-1)
    phi, _ = terms(make_divergence(name, **parameters), log_p, log_p.clone())
    assert phi.sum(-1).abs().max() < 1e-7


@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_distributions_without_overlap_stay_finite(name: str, parameters: dict[str, float]) -> None:
    log_p = torch.tensor([[1e4, 0.0, -1e4]]).log_softmax(-1)
    phi, psi = terms(make_divergence(name, **parameters), log_p, log_p.flip(-1))
    assert phi.isfinite().all()
    assert psi.isfinite().all()


def test_alpha_beta_ends_at_the_two_kls() -> None:
    log_p, log_q = (logits.log_softmax(-1) for logits in random_logits())
    for (alpha, beta), name in {(1.0, 1e-7): "forward_kl", (1e-7, 1.0): "reverse_kl"}.items():
        near = terms(make_divergence("alpha_beta", alpha=alpha, beta=beta), log_p, log_q).phi.sum(-1)
        torch.testing.assert_close(near, terms(make_divergence(name), log_p, log_q).phi.sum(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("forwrad_kl", {}, "Did you mean 'forward_kl'"),
        ("forward_kl", {"beta": 0.5}, "takes no parameter; got beta"),
        ("jsd", {"lam": 0.5}, "takes beta; got lam"),
        ("jsd", {"beta": 0.0}, "use forward_kl for the end at 0"),
        ("jsd", {"beta": 1.0}, "reverse_kl for the end at 1"),
        ("skew_kl", {"lam": 0.0}, "0 is forward_kl"),
        ("skew_reverse_kl", {"lam": 1.0}, "0 is reverse_kl"),
        ("alpha_beta", {"alpha": 0.0}, "alpha > 0"),
        ("alpha_beta", {"beta": math.nan}, "beta=nan"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(name: str, parameters: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_divergence(name, **parameters)
