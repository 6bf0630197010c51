"""Heads, signals and the naive loss over full logits, with which the fused one is compared in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from textbook import from_the_paper
from torch import Tensor, nn

from llm_distill.divergences import Divergence, make_divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused import fused_head_loss
from llm_distill.signals import HiddenSignal, MixtureSignal, Signal, SparseSignal

ROWS, STUDENT, TEACHER, VOCAB, PADDED = 37, 8, 12, 29, 32
both_backends = pytest.mark.parametrize("backend", ["compiled", "torch"], indirect=True)
POST = [(1.0, None), (0.3, None), (1.0, 2.0), (1.7, 3.0)]


@dataclass(frozen=True)
class Squared(Divergence):
    """A divergence of the user's own, with a function that the compiled back ends do not have."""

    @staticmethod
    def formula(p: Any, q: Any, log_p: Any, log_q: Any) -> tuple[Any, Any]:
        return torch.square(p - q), -2 * (p - q) * q


def make_head(
    width: int, seed: int, scale: float = 1.0, soft_cap: float | None = None, bias: bool = True, rows: int = PADDED
) -> LMHead:
    """By default with rows past the vocabulary."""
    torch.manual_seed(seed)
    return LMHead(nn.Linear(width, rows, bias=bias, dtype=torch.float64), VOCAB, scale, soft_cap)


def hidden_states(width: int, seed: int) -> Tensor:
    return 4 * torch.randn(ROWS, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_signal(kind: str, divergence: str = "forward_kl", temperature: float = 1.0) -> tuple[Signal | None, Tensor]:
    """A signal, and the teacher distribution [rows, vocab] (for sparse ones: what it says, in full) it stands for."""
    if kind == "none":
        return None, torch.empty(0)
    first = HiddenSignal(hidden_states(TEACHER, 1), make_head(TEACHER, 1, scale=0.5, soft_cap=4.0))
    p = (first.head(first.hidden) / temperature).softmax(-1).detach()
    if kind == "hidden":
        return first, p
    if kind == "mixture":
        second = HiddenSignal(hidden_states(TEACHER, 2), make_head(TEACHER, 2))
        p2 = (second.head(second.hidden) / temperature).softmax(-1).detach()
        return MixtureSignal((first, second), (0.3, 0.7)), 0.3 * p + 0.7 * p2
    if kind == "sampled":
        ids = torch.multinomial(p, 50, replacement=True, generator=torch.Generator().manual_seed(0))
        log_weights = torch.full(ids.shape, -torch.tensor(50.0).log().item(), dtype=torch.float64)
        counts = torch.zeros_like(p).scatter_add(-1, ids, log_weights.exp())
        return SparseSignal(ids, log_weights, None, VOCAB, temperature), counts
    k = {"top 5": 5, "top 1": 1, "all": VOCAB}[kind]
    top, ids = p.topk(k)
    log_tail = (1 - top.sum(-1)).clamp(min=0).log() if k < VOCAB else torch.full((ROWS,), -torch.inf).double()
    return SparseSignal(ids, top.log(), log_tail, VOCAB, temperature), p


def naive_loss(
    hidden: Tensor,
    head: LMHead,
    signal: Signal | None,
    p: Tensor,
    name: str,
    parameters: dict[str, float],
    **options: Any,
) -> Tensor:
    all_logits = head.post_process(head.module(hidden))
    logits = all_logits[:, :VOCAB]
    T = options["temperature"]
    q = (logits / T).softmax(-1)
    outside = all_logits.logsumexp(-1) - logits.logsumexp(-1)  # −log (1 − m)
    ce = nn.functional.cross_entropy(all_logits, options["targets"], reduction="none")
    if signal is None:
        return options["ce_weight"] * ce.sum() / options["num_rows"]
    if isinstance(signal, SparseSignal) and signal.log_tail is not None and signal.ids.shape[1] < VOCAB:
        lumped = [torch.cat([x.gather(-1, signal.ids), 1 - x.gather(-1, signal.ids).sum(-1, True)], -1) for x in (p, q)]
        kd = from_the_paper(name, *lumped, **parameters)
    elif isinstance(signal, SparseSignal) and signal.log_tail is None:
        kd = -(p * q.log()).sum(-1)
    else:
        kd = from_the_paper(name, p, q, **parameters)
    loss = options["kd_weight"] * (T**2 * kd + outside) + options["ce_weight"] * ce
    return loss.sum() / options["num_rows"]


def compare(name: str, parameters: dict[str, float], kind: str, head: LMHead, **options: Any) -> None:
    defaults = {"temperature": 1.0, "kd_weight": 0.7, "ce_weight": 0.3, "num_rows": 50}
    options = (
        defaults | options | {"targets": torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(3))}
    )
    signal, p = make_signal(kind, name, options["temperature"])
    hidden = hidden_states(STUDENT, 5).requires_grad_()
    parameters_of_head = list(head.module.parameters())

    loss, _ = fused_head_loss(hidden, head, signal, make_divergence(name, **parameters), **options)
    gradients = torch.autograd.grad(2 * loss, [hidden, *parameters_of_head])
    expected = naive_loss(hidden, head, signal, p, name, parameters, **options)
    expected_gradients = torch.autograd.grad(2 * expected, [hidden, *parameters_of_head])
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, expected_gradient, rtol=1e-8, atol=1e-11)


def check_banned_token(kind: str, temperature: float, soft_cap: float | None, parameter: str) -> None:
    """A token that the weight or the bias forbids has no mass, gets no gradient and makes nothing infinite."""
    signal, _ = make_signal(kind, temperature=temperature)
    hidden, banned = hidden_states(STUDENT, 5).abs(), VOCAB - 1
    if kind == "hidden":
        teacher = make_head(TEACHER, 1, bias=parameter == "bias")
        getattr(teacher.module, parameter).data[banned] = -torch.inf
        signal = HiddenSignal(hidden_states(TEACHER, 1).abs(), teacher)
    elif isinstance(signal, SparseSignal):
        banned = int(torch.bincount(signal.ids.flatten(), minlength=VOCAB).argmin())
        signal = replace(signal, ids=torch.where(signal.ids == banned, (banned + 2) % VOCAB, signal.ids))
    head, without = (make_head(STUDENT, 0, soft_cap=soft_cap, bias=parameter == "bias") for _ in range(2))
    getattr(head.module, parameter).data[banned] = -torch.inf
    options = {"targets": torch.full((ROWS,), (banned + 1) % VOCAB), "ce_weight": 0.5, "temperature": temperature}
    hidden.requires_grad_(parameter == "bias")  # with an infinite weight there is none
    loss, metrics = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"), **options)
    loss.backward()
    assert all(values.isfinite().all() for values in metrics.values())
    assert hidden.grad is None or hidden.grad.isfinite().all()
    for gradient in (values.grad for values in head.module.parameters()):
        assert gradient.isfinite().all()
        assert gradient[banned].abs().max() < 1e-30
    if soft_cap is None:  # it would give the token some mass, as the least of all logits
        q = without(hidden)[:, [token for token in range(VOCAB) if token != banned]].softmax(-1)
        torch.testing.assert_close(metrics["entropy"], -(q * q.log()).sum(-1))
