"""Value and gradients of the fused head loss against autograd on the naive formula over full logits, in float64."""

from __future__ import annotations

import pytest
import torch
from head_cases import (
    PADDED,
    POST,
    ROWS,
    STUDENT,
    TEACHER,
    VOCAB,
    both_backends,
    compare,
    hidden_states,
    make_head,
    make_signal,
)
from textbook import CASES

from llm_distill.divergences import make_divergence
from llm_distill.losses.fused import fused_head_loss
from llm_distill.signals import HiddenSignal

pytestmark = pytest.mark.usefixtures("several_chunks")


@both_backends
@pytest.mark.parametrize(("name", "parameters"), CASES)
@pytest.mark.parametrize("kind", ["hidden", "mixture", "top 5", "top 1", "all"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_value_and_gradients_equal_autograd(
    backend: str, name: str, parameters: dict[str, float], kind: str, temperature: float
) -> None:
    compare(name, parameters, kind, make_head(STUDENT, 0), temperature=temperature)


@both_backends
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_sampled_tokens_give_the_gradient_of_their_cross_entropy(backend: str, temperature: float) -> None:
    compare("forward_kl", {}, "sampled", make_head(STUDENT, 0), temperature=temperature)


@both_backends
@pytest.mark.parametrize(("scale", "soft_cap"), POST)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [VOCAB, PADDED])
def test_scale_soft_cap_and_bias_are_in_the_gradient(
    backend: str, scale: float, soft_cap: float | None, bias: bool, rows: int
) -> None:
    for kind in ("hidden", "top 5", "sampled", "none"):
        compare("forward_kl", {}, kind, make_head(STUDENT, 0, scale, soft_cap, bias, rows), temperature=1.5)


@both_backends
@pytest.mark.parametrize("kind", ["hidden", "top 5", "sampled", "none"])
@pytest.mark.parametrize("weights", [{"ce_weight": 0.0}, {"kd_weight": 0.0}, {"kd_weight": 0.0, "ce_weight": 0.0}])
def test_each_weight_may_be_zero(backend: str, kind: str, weights: dict[str, float]) -> None:
    for rows in (VOCAB, PADDED):
        compare("forward_kl", {}, kind, make_head(STUDENT, 0, bias=False, rows=rows), temperature=1.5, **weights)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_identical_models_give_zero(backend: str, name: str, parameters: dict[str, float], dtype: torch.dtype) -> None:
    head = make_head(STUDENT, 0, rows=VOCAB)
    head.module.to(dtype)
    hidden = hidden_states(STUDENT, 5).to(dtype).requires_grad_()
    signal = HiddenSignal(hidden.detach(), head)
    loss, metrics = fused_head_loss(hidden, head, signal, make_divergence(name, **parameters), temperature=2.0)
    assert abs(loss.item()) < 1e-6
    assert metrics["kl"].abs().max() < 1e-6
    assert metrics["top1_agreement"].min() == 1
    torch.testing.assert_close(metrics["acceptance"], torch.ones(ROWS), rtol=0, atol=1e-5)


@both_backends
@pytest.mark.parametrize("kind", ["hidden", "top 5"])
def test_at_a_low_temperature_the_gradient_still_sums_to_zero(backend: str, kind: str) -> None:
    head, hidden = make_head(STUDENT, 0), (20 * hidden_states(STUDENT, 5)).float().requires_grad_()
    head.module.float()
    signal, _ = make_signal(kind, temperature=1e-2)
    loss, _ = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"), temperature=1e-2)
    (gradient,) = torch.autograd.grad(loss, head.module.bias)
    assert gradient.sum().abs() < 1e-4 * gradient.abs().sum()


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same() -> None:
    signal, _ = make_signal("hidden")
    gradients = []
    for frozen in (False, True):
        head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).requires_grad_()
        head.module.requires_grad_(not frozen)
        loss, _ = fused_head_loss(hidden, head, signal, make_divergence("jsd"))
        loss.backward()
        gradients.append(hidden.grad)
        assert (head.module.weight.grad is None) == frozen
    assert torch.equal(*gradients)


@both_backends
def test_no_grad_gives_the_value_alone(backend: str) -> None:
    signal, _ = make_signal("hidden")
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).requires_grad_()
    with torch.no_grad():
        value, _ = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))
    assert not value.requires_grad
    assert torch.equal(value, fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))[0].detach())


@both_backends
def test_no_rows_give_a_differentiable_zero(backend: str) -> None:
    head, hidden = make_head(STUDENT, 0), torch.zeros(0, STUDENT, dtype=torch.float64, requires_grad=True)
    signal = HiddenSignal(torch.zeros(0, TEACHER, dtype=torch.float64), make_head(TEACHER, 1))
    loss, _ = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"), num_rows=7)
    loss.backward()
    assert loss.item() == 0
    assert head.module.weight.grad.abs().max() == 0


def test_a_second_backward_is_refused() -> None:
    signal, _ = make_signal("hidden")
    hidden = hidden_states(STUDENT, 5).requires_grad_()
    loss, _ = fused_head_loss(hidden, make_head(STUDENT, 0), signal, make_divergence("forward_kl"))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given the gradients away"):
        loss.backward()
