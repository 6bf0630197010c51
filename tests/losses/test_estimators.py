"""What is learned from one log-probability a token, in expectation over the tokens that the student samples: the
gradient of the exact reverse KL, which none of the estimators of its value gives when it is differentiated as it is.

All expectations are sums over the five tokens of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from head_cases import both_backends
from torch import Tensor, nn

from llm_distill.divergences import ForwardKL, ReverseKL
from llm_distill.heads import LMHead
from llm_distill.losses.fused import fused_head_loss
from llm_distill.losses.fused.sparse import LARGEST_ADVANTAGE
from llm_distill.losses.objective import HeadLoss
from llm_distill.models import Kept
from llm_distill.rows import Positions
from llm_distill.signals import TokenSignal

VOCAB = 5
LOG_P = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64).log()
LOGITS = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.4], dtype=torch.float64)


def forward_kl(log_q: Tensor) -> Tensor:
    return (LOG_P.exp() * (LOG_P - log_q)).sum()


def reverse_kl(log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_q - LOG_P)).sum()


def gradient(value: Callable[[Tensor], Tensor]) -> Tensor:
    logits = LOGITS.clone().requires_grad_()
    return torch.autograd.grad(value(logits.log_softmax(-1)), logits)[0]


def expected(estimator: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Σ q(y) · estimator at y, differentiated as a sampled one is: not through the sampling."""
    return lambda log_q: (log_q.exp().detach() * estimator(log_q)).sum()


def test_what_the_estimators_of_the_value_teach() -> None:
    k1 = gradient(expected(lambda log_q: log_q - LOG_P))
    k2 = gradient(expected(lambda log_q: (log_q - LOG_P) ** 2 / 2))
    k3 = gradient(expected(lambda log_q: (LOG_P - log_q).exp() - 1 - (LOG_P - log_q)))
    torch.testing.assert_close(k1, torch.zeros(VOCAB).double())
    torch.testing.assert_close(k2, gradient(reverse_kl))
    torch.testing.assert_close(k3, gradient(forward_kl))
    assert (gradient(reverse_kl) - gradient(forward_kl)).abs().max() > 0.1


def head_of(logits: Tensor) -> tuple[LMHead, Tensor]:
    """A head that gives these logits for each of five rows, of which each is of another token."""
    linear = nn.Linear(VOCAB, VOCAB, bias=False, dtype=torch.float64)
    linear.weight.data.copy_(torch.eye(VOCAB))
    return LMHead(linear, VOCAB), logits.repeat(VOCAB, 1).requires_grad_()


@both_backends
@pytest.mark.parametrize("past_vocabulary", [0, 3])
def test_the_policy_gradient_is_that_of_the_exact_reverse_kl(backend: str, past_vocabulary: int) -> None:
    head, hidden = head_of(LOGITS)
    if past_vocabulary:
        weight = torch.cat([head.module.weight.data, torch.full((past_vocabulary, VOCAB), -1e3).double()])
        head.module.weight = nn.Parameter(weight)
    signal = TokenSignal(LOG_P, VOCAB)
    loss, values = fused_head_loss(
        hidden, head, signal, ReverseKL(), kd_weight=0.7, targets=torch.arange(VOCAB), num_rows=1
    )
    (by_token,) = torch.autograd.grad(loss, hidden)
    q = LOGITS.softmax(-1)
    torch.testing.assert_close(q @ by_token, 0.7 * gradient(reverse_kl))
    torch.testing.assert_close((q * values["kd"]).sum(), reverse_kl(LOGITS.log_softmax(-1)))
    torch.testing.assert_close(values["teacher_ce"], -LOG_P)


def test_a_token_that_the_teacher_takes_for_impossible_does_not_outweigh_the_others() -> None:
    head, hidden = head_of(LOGITS)
    log_p = LOG_P.clone()
    log_p[0] = -torch.inf
    signal, targets = TokenSignal(log_p, VOCAB), torch.arange(VOCAB)
    loss, values = fused_head_loss(hidden, head, signal, ReverseKL(), targets=targets, num_rows=1)
    loss.backward()
    assert values["kd"][0] == LARGEST_ADVANTAGE
    assert hidden.grad is not None
    torch.testing.assert_close(hidden.grad[0, 0], LARGEST_ADVANTAGE * (1 - LOGITS.softmax(-1)[0]))


def test_a_teacher_that_is_the_student_teaches_nothing() -> None:
    head, hidden = head_of(LOGITS)
    itself = TokenSignal(LOGITS.log_softmax(-1), VOCAB)
    loss, _ = fused_head_loss(hidden, head, itself, ReverseKL(), targets=torch.arange(VOCAB))
    loss.backward()
    assert loss == 0
    assert hidden.grad is not None
    assert hidden.grad.abs().max() == 0


def test_of_text_that_the_student_did_not_write_only_the_cross_entropy_is_learned() -> None:
    head, hidden = head_of(LOGITS)
    signal, targets = TokenSignal(LOG_P, VOCAB), torch.arange(VOCAB)
    written = targets >= 2
    positions = Positions(torch.zeros(VOCAB).long(), torch.arange(VOCAB), targets, torch.zeros(VOCAB).long())
    loss, values = HeadLoss(ReverseKL(), ce_weight=0.5)(Kept(hidden, head), signal, positions, VOCAB, written)
    log_q = LOGITS.log_softmax(-1)
    torch.testing.assert_close(loss, (0.5 * -log_q[:2].sum() + (log_q - LOG_P)[2:].sum()) / VOCAB)
    assert values["kd"].isnan().tolist() == (~written).tolist()
    torch.testing.assert_close(values["teacher_ce"], -LOG_P)
    unwritten = HeadLoss(ReverseKL(), ce_weight=0.5)(Kept(hidden, head), signal, positions, VOCAB)
    assert "kd" not in unwritten[1], "as in evaluation"


@pytest.mark.parametrize(("divergence", "temperature"), [(ForwardKL(), 1.0), (ReverseKL(), 2.0)])
def test_nothing_else_can_be_made_of_it(divergence: ForwardKL | ReverseKL, temperature: float) -> None:
    head, hidden = head_of(LOGITS)
    options = {"temperature": temperature, "targets": torch.arange(VOCAB)}
    with pytest.raises(ValueError, match="gives the gradient of reverse_kl at loss_temperature=1"):
        fused_head_loss(hidden, head, TokenSignal(LOG_P, VOCAB), divergence, **options)
