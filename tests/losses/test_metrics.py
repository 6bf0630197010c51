"""What the fused head loss reports beside the loss."""

from __future__ import annotations

import pytest
import torch
from head_cases import (
    POST,
    ROWS,
    STUDENT,
    VOCAB,
    both_backends,
    hidden_states,
    make_head,
    make_signal,
)
from textbook import from_the_paper
from torch import nn

from llm_distill.divergences import make_divergence
from llm_distill.losses.fused import fused_head_loss

pytestmark = pytest.mark.usefixtures("several_chunks")


@both_backends
def test_metrics_are_what_they_say(backend: str) -> None:
    signal, p = make_signal("hidden")
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5)
    targets = torch.where(torch.arange(ROWS) % 3 == 0, p.argmax(-1), head(hidden).argmax(-1))
    targets = torch.where(torch.arange(ROWS) % 3 == 1, torch.arange(ROWS) % VOCAB, targets)
    options = {"temperature": 2.0, "targets": targets, "ce_weight": 0.5}
    _, metrics = fused_head_loss(hidden, head, signal, make_divergence("reverse_kl"), **options)
    q = head(hidden).softmax(-1).detach()
    outside_mass = head.module(hidden).softmax(-1)[:, VOCAB:].sum(-1).detach()
    p_T, q_T = ((head_(x) / 2).softmax(-1).detach() for head_, x in ((signal.head, signal.hidden), (head, hidden)))
    expected = {
        "kd": 4 * from_the_paper("reverse_kl", p_T, q_T),
        "ce": nn.functional.cross_entropy(head.module(hidden), targets, reduction="none").detach(),
        "teacher_ce": -p.log().gather(-1, targets[:, None])[:, 0],
        "kl": from_the_paper("forward_kl", p, q),
        "entropy": -(q * q.log()).sum(-1),
        "top1_agreement": (p.argmax(-1) == q.argmax(-1)).double(),
        "acceptance": torch.minimum(p, q).sum(-1),
        "confidence": q.amax(-1),
        "teacher_confidence": p.amax(-1),
        "correct": (q.argmax(-1) == targets).double(),
        "teacher_correct": (p.argmax(-1) == targets).double(),
        "outside_mass": outside_mass,
        "outside_loss": -torch.log1p(-outside_mass),
    }
    assert 0 < metrics["correct"].mean() < 1
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(metrics[name], value, msg=lambda m, n=name: f"{n}: {m}")


@both_backends
@pytest.mark.parametrize(("scale", "soft_cap"), POST)
@pytest.mark.parametrize("kind", ["hidden", "mixture", "top 5", "all", "sampled", "none"])
def test_with_targets_every_signal_says_whether_the_likeliest_token_came_next(
    backend: str, kind: str, scale: float, soft_cap: float | None
) -> None:
    signal, _ = make_signal(kind)
    head, hidden = make_head(STUDENT, 0, scale, soft_cap), hidden_states(STUDENT, 5)
    likeliest = head(hidden).argmax(-1)
    targets = torch.where(torch.arange(ROWS) % 2 == 0, likeliest, torch.arange(ROWS) % VOCAB)
    _, metrics = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"), targets=targets)
    assert torch.equal(metrics["correct"], (likeliest == targets).double())
    assert "correct" not in fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))[1]
