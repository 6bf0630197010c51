"""The fused head loss in 16 bits: what is rounded, and what is summed in float32."""

from __future__ import annotations

import pytest
import torch
from head_cases import (
    ROWS,
    STUDENT,
    TEACHER,
    VOCAB,
    both_backends,
    hidden_states,
    make_head,
    make_signal,
)
from torch import nn

from llm_distill.divergences import make_divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused import cpp_backend, fused_head_loss, head_loss, products
from llm_distill.losses.fused.task import HeadLossTask, Projection
from llm_distill.signals import HiddenSignal, SparseSignal

pytestmark = pytest.mark.usefixtures("several_chunks")


@both_backends
@pytest.mark.parametrize("kind", ["hidden", "top 5", "sampled"])
@pytest.mark.parametrize("sure", [0.9, 0.999])
def test_in_bfloat16_the_targets_own_gradient_is_right(backend: str, kind: str, sure: float) -> None:
    """−ce_weight must be added before the rounding, or a token that is nearly learned would be pushed down."""
    head, hidden = make_head(STUDENT, 0, bias=False, rows=VOCAB), hidden_states(STUDENT, 5)
    with torch.no_grad():  # the student is this sure of the target
        head.module.weight.zero_()
        others = torch.tensor((1 - sure) / (VOCAB - 1) / sure).log()
        head.module.weight[1:VOCAB, 0], hidden[:, 0] = others, 1.0
    head.module.bfloat16()
    x = hidden.bfloat16()
    signal, _ = make_signal(kind)
    if kind == "sampled":  # many repetitions of the target
        ids = torch.zeros(ROWS, 50, dtype=torch.long)
        signal = SparseSignal(ids, torch.full(ids.shape, -torch.tensor(50.0).log().item()), None, VOCAB)
    targets = torch.zeros(ROWS, dtype=torch.long)
    weights = {"kd_weight": 1.0, "ce_weight": 0.0} if kind == "sampled" else {"kd_weight": 0.0, "ce_weight": 1.0}
    loss, _ = fused_head_loss(x, head, signal, make_divergence("forward_kl"), targets=targets, **weights)
    (gradient,) = torch.autograd.grad(loss, head.module.weight)
    q = head(x[:1]).float().softmax(-1)[0, 0]
    torch.testing.assert_close(gradient[0, 0].float(), q - 1, rtol=2e-2, atol=0)


@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_compiled", [True, False])
def test_16_bit_products_are_summed_in_float32(
    weight: torch.dtype, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one tensor of float32, or in two of which the one becomes the gradient."""
    monkeypatch.setattr(products, "VOCAB_TILE", {"cpu": 7})  # 29 rows in tiles of 7 and 1
    d_logits, x = torch.randn(5, 64, VOCAB).bfloat16(), torch.randn(5, 64, STUDENT).bfloat16()
    head = torch.zeros(VOCAB, STUDENT, dtype=weight)
    student = Projection(LMHead(nn.Linear(STUDENT, VOCAB), VOCAB), x[0], head.bfloat16(), None)
    task = HeadLossTask(student, None, [], make_divergence("forward_kl"), 1.0, 0.0, 1.0, 0.0, None)
    kernels = cpp_backend.kernels_of(task) if is_compiled else None
    gradient = products.WeightGradient(head, torch.bfloat16, len(x), kernels)
    for d, h in zip(d_logits, x, strict=True):
        gradient.add(d, h)
    expected = sum((d.T @ h).float() for d, h in zip(d_logits, x, strict=True))
    in_halves = is_compiled and weight == torch.bfloat16
    assert (gradient.rest is not None) == in_halves
    assert torch.equal(gradient.total, expected.bfloat16() if in_halves else expected)


@pytest.mark.parametrize("rows", [128, 64, 16])
def test_a_weight_gradient_in_bfloat16_is_as_near_as_float32_would_be(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many products it is the sum of: one, two (both straight into bfloat16) or eight."""
    monkeypatch.setattr(head_loss, "chunk_rows", lambda *_: rows)
    torch.manual_seed(0)
    head = LMHead(nn.Linear(STUDENT, VOCAB).bfloat16(), VOCAB)
    x = torch.randn(128, STUDENT).bfloat16()
    chunks = (torch.randn(128, VOCAB).bfloat16() + 1).split(rows)  # all of one sign, so that the sum only grows
    parts = [(slice(i * rows, (i + 1) * rows), chunk) for i, chunk in enumerate(chunks)]
    monkeypatch.setattr(head_loss, "_chunks", lambda *_: parts)
    loss, _ = fused_head_loss(x, head, None, make_divergence("forward_kl"))
    (gradient,) = torch.autograd.grad(loss, head.module.weight)
    exact = torch.cat(chunks).double().T @ x.double() / 128
    assert (gradient.double() - exact).norm() < 3e-3 * exact.norm()


def test_float16_gradients_survive_many_rows_under_a_loss_scale() -> None:
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5)
    head.module.half()
    signal, _ = make_signal("hidden")
    hidden16 = hidden.half().requires_grad_()
    loss, _ = fused_head_loss(hidden16, head, signal, make_divergence("forward_kl"), num_rows=10**7)
    (loss * 2.0**20).backward()
    exact = make_head(STUDENT, 0)
    loss, _ = fused_head_loss(hidden.requires_grad_(), exact, signal, make_divergence("forward_kl"), num_rows=10**7)
    (loss * 2.0**20).backward()
    for gradient, expected in ((hidden16.grad, hidden.grad), (head.module.weight.grad, exact.module.weight.grad)):
        assert torch.nn.functional.cosine_similarity(gradient.double().flatten(), expected.flatten(), 0) > 0.999


@both_backends
def test_under_autocast_products_run_in_its_precision_and_gradients_in_the_parameters(backend: str) -> None:
    signal, _ = make_signal("hidden")
    gradients = []
    for enabled in (False, True):
        head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).float().requires_grad_()
        head.module.float()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))[0].backward()
        assert head.module.weight.grad.dtype == hidden.grad.dtype == torch.float32
        gradients.append(head.module.weight.grad.flatten())
    assert not torch.equal(*gradients)
    assert torch.nn.functional.cosine_similarity(*gradients, 0) > 0.999


@both_backends
def test_gradients_in_bfloat16_are_near_those_in_float64(backend: str) -> None:
    signal, _ = make_signal("hidden")
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).requires_grad_()
    fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))[0].backward()
    exact = head.module.weight.grad.clone(), hidden.grad.clone()
    low = make_head(STUDENT, 0)
    low.module.bfloat16()
    signal_low = HiddenSignal(signal.hidden.bfloat16(), make_head(TEACHER, 1, 0.5, 4.0))
    signal_low.head.module.bfloat16()
    hidden_low = hidden.detach().bfloat16().requires_grad_()
    fused_head_loss(hidden_low, low, signal_low, make_divergence("forward_kl"))[0].backward()
    for gradient, expected in zip((low.module.weight.grad, hidden_low.grad), exact, strict=True):
        assert gradient.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(gradient.double().flatten(), expected.flatten(), 0) > 0.999
