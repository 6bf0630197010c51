"""Numbers at which a loss breaks: very large logits, infinities, what is not a number."""

from __future__ import annotations

import pytest
import torch
from head_cases import (
    ROWS,
    STUDENT,
    TEACHER,
    VOCAB,
    both_backends,
    check_banned_token,
    hidden_states,
    make_head,
    make_signal,
)

from llm_distill.divergences import make_divergence
from llm_distill.losses.fused import fused_head_loss
from llm_distill.losses.fused.logits import logits_in_chunks
from llm_distill.losses.fused.task import TokenChoice

pytestmark = pytest.mark.usefixtures("several_chunks")


@both_backends
@pytest.mark.parametrize("kind", ["hidden", "top 5", "sampled"])
def test_large_logits_stay_finite(backend: str, kind: str) -> None:
    head, hidden = make_head(STUDENT, 0), (1e4 * hidden_states(STUDENT, 5)).float().requires_grad_()
    head.module.float()
    signal, _ = make_signal(kind)
    targets = torch.arange(ROWS) % VOCAB
    loss, metrics = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"), targets=targets, ce_weight=0.5)
    loss.backward()
    assert loss.isfinite()
    assert hidden.grad.isfinite().all()
    assert head.module.weight.grad.isfinite().all()
    assert all(values.isfinite().all() for values in metrics.values())


@both_backends
def test_a_logit_that_is_not_a_number_is_seen_in_the_loss(backend: str) -> None:
    signal, _ = make_signal("hidden")
    hidden = hidden_states(STUDENT, 5)
    hidden[3, 0] = torch.nan
    loss, metrics = fused_head_loss(hidden, make_head(STUDENT, 0), signal, make_divergence("forward_kl"))
    assert loss.isnan()
    assert metrics["kd"].isnan().sum() == 1


@both_backends
@pytest.mark.parametrize("kind", ["hidden", "top 5", "sampled", "none"])
@pytest.mark.parametrize(("temperature", "soft_cap"), [(1.0, None), (2.0, None), (1.0, 3.0)])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_a_logit_of_minus_infinity_is_a_token_without_mass(
    backend: str, kind: str, temperature: float, soft_cap: float | None, parameter: str
) -> None:
    """The student's, and the teacher's."""
    check_banned_token(kind, temperature, soft_cap, parameter)


@torch.no_grad()
@pytest.mark.parametrize("choice", [None, TokenChoice(4), TokenChoice(60, 0.02)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_captured_of_such_a_row_is_finite(choice: TokenChoice | None, dtype: torch.dtype) -> None:
    head = make_head(TEACHER, 1, bias=False)
    head.module.to(dtype).weight[7] = -torch.inf
    hidden = hidden_states(TEACHER, 1).abs().to(dtype)
    for part in logits_in_chunks(hidden, head, 1.0, choice, torch.zeros(ROWS)):
        assert part.entropy.isfinite().all()
        assert part.log_total.isfinite().all()
