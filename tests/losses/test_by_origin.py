"""What the student wrote has a divergence of its own and no cross-entropy, in one sum over all rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from head_cases import ROWS, STUDENT, VOCAB, hidden_states, make_head, make_signal, naive_loss

from llm_distill.divergences import make_divergence
from llm_distill.losses.objective import HeadLoss
from llm_distill.models import Kept
from llm_distill.rows import Positions

TARGETS = torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(3))
MIXED = torch.arange(ROWS) % 3 == 0
SKEWED = HeadLoss(
    make_divergence("skew_kl"),
    kd_weight=0.7,
    ce_weight=0.3,
    on_policy_divergence=make_divergence("skew_reverse_kl", lam=0.2),
)


@pytest.mark.parametrize("kind", ["hidden", "mixture", "top 5"])
@pytest.mark.parametrize("written", [MIXED, torch.zeros(ROWS).bool(), torch.ones(ROWS).bool()], ids=["mixed", "0", "1"])
def test_each_origin_has_its_own_formula_and_all_rows_one_divisor(kind: str, written: torch.Tensor) -> None:
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).requires_grad_()
    signal, p = make_signal(kind)
    assert signal is not None
    positions = Positions(torch.zeros(ROWS).long(), torch.arange(ROWS), TARGETS, torch.zeros(ROWS).long())
    loss, values = SKEWED(Kept(hidden, head), signal, positions, 50, written)

    shared: dict[str, Any] = {"temperature": 1.0, "kd_weight": 0.7, "num_rows": 50}
    expected = torch.zeros((), dtype=torch.float64)
    for rows, name, kwargs, weight in (
        (~written, "skew_kl", {"lam": 0.1}, 0.3),
        (written, "skew_reverse_kl", {"lam": 0.2}, 0.0),
    ):
        if rows.any():
            options = shared | {"ce_weight": weight, "targets": TARGETS[rows]}
            expected = expected + naive_loss(hidden[rows], head, signal.select(rows), p[rows], name, kwargs, **options)
    inputs = [hidden, *head.module.parameters()]
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    for gradient, reference in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-11)
    log_q = head.module(hidden).log_softmax(-1)
    torch.testing.assert_close(values["ce"], -log_q.gather(-1, TARGETS[:, None])[:, 0].detach())


def test_of_one_rule_there_is_one_pass_whoever_wrote() -> None:
    plain, (signal, _) = HeadLoss(make_divergence("jsd")), make_signal("hidden")
    student = Kept(hidden_states(STUDENT, 5), make_head(STUDENT, 0))
    positions = Positions(torch.zeros(ROWS).long(), torch.arange(ROWS), TARGETS, torch.zeros(ROWS).long())
    assert torch.equal(plain(student, signal, positions, None, MIXED)[0], plain(student, signal, positions, None)[0])
