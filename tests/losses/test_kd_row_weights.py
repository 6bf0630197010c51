"""A divergence that weighs by row, by the teacher's entropy or by its correctness, beside the definition in float64."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from head_cases import ROWS, STUDENT, VOCAB, both_backends, hidden_states, make_head, make_signal
from runs import logged, make_trainer
from tiny import make_config, tiny_llama
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_distill import LiveTeacher
from llm_distill.divergences import ForwardKL, ReverseKL
from llm_distill.losses.fused import fused_head_loss
from llm_distill.signals import SparseSignal

TARGETS = torch.randint(0, VOCAB, (ROWS,), generator=torch.Generator().manual_seed(3))


def weights_of(by: str, p: Tensor) -> Tensor:
    """By the definition."""
    if by == "entropy":
        return 1 + (p * p.clamp(min=1e-300).log()).sum(-1) / math.log(VOCAB)
    return p.gather(-1, TARGETS[:, None])[:, 0] / p.amax(-1)


def spread_tail(signal: SparseSignal, p: Tensor) -> Tensor:
    """The distribution in which the tokens of the tail are equally likely."""
    named = torch.zeros(ROWS, VOCAB).scatter(-1, signal.ids, 1.0) > 0
    other = (p * ~named).sum(-1, keepdim=True) / (~named).sum(-1, keepdim=True).clamp(min=1)
    return torch.where(named, p, other)


@both_backends
@pytest.mark.parametrize("by", ["entropy", "correctness"])
@pytest.mark.parametrize("kind", ["hidden", "mixture", "top 5", "all"])
def test_each_row_weighs_by_the_definition_and_the_divisor_stays(kind: str, by: str, backend: str) -> None:
    signal, p = make_signal(kind)
    believed = spread_tail(signal, p) if isinstance(signal, SparseSignal) else p
    head, hidden = make_head(STUDENT, 5), hidden_states(STUDENT, 5).requires_grad_()
    options = {"targets": TARGETS, "ce_weight": 0.3, "kd_weight": 0.7, "num_rows": 50}
    loss, metrics = fused_head_loss(hidden, head, signal, ReverseKL(), kd_row_weights=by, **options)
    gradients = torch.autograd.grad(loss, [hidden, *head.module.parameters()])
    weights = weights_of(by, believed)
    torch.testing.assert_close(metrics["kd_row_weight"], weights, rtol=1e-9, atol=1e-11)

    expected, plain = torch.zeros((), dtype=torch.float64), {"targets": TARGETS, "num_rows": 50}
    for row in range(ROWS):
        one, part = torch.zeros(ROWS, dtype=torch.bool).index_fill(0, torch.tensor([row]), True), plain.copy()
        part["targets"] = TARGETS[one]
        alone, _ = fused_head_loss(
            hidden[one],
            head,
            signal.select(one),
            ReverseKL(),
            kd_weight=0.7 * float(weights[row]),
            ce_weight=0.3,
            **part,
        )
        expected = expected + alone
    of_outside = (
        0.7 * (1 - weights) * metrics["outside_loss"]
    ).sum() / 50  # what is past the vocabulary weighs as ever
    torch.testing.assert_close(loss - of_outside, expected.detach(), rtol=1e-9, atol=1e-11)
    outside = head.module(hidden)
    outside = head.post_process(outside).logsumexp(-1) - head.post_process(outside)[:, :VOCAB].logsumexp(-1)
    whole = expected + (0.7 * (1 - weights) * outside).sum() / 50
    for gradient, wanted in zip(
        gradients, torch.autograd.grad(whole, [hidden, *head.module.parameters()]), strict=True
    ):
        torch.testing.assert_close(gradient, wanted, rtol=1e-8, atol=1e-11)


def test_draws_weigh_by_the_entropy_that_is_stored_with_them() -> None:
    signal, _ = make_signal("sampled")
    assert isinstance(signal, SparseSignal)
    entropy = torch.linspace(0, math.log(VOCAB), ROWS, dtype=torch.float64)
    signal = SparseSignal(signal.ids, signal.log_probs, None, VOCAB, entropy=entropy)
    head, hidden = make_head(STUDENT, 5), hidden_states(STUDENT, 5)
    _, plain = fused_head_loss(hidden, head, signal, ForwardKL())
    _, weighed = fused_head_loss(hidden, head, signal, ForwardKL(), kd_row_weights="entropy")
    torch.testing.assert_close(weighed["kd"], (1 - entropy / math.log(VOCAB)) * plain["kd"])
    torch.testing.assert_close(weighed["kl"], plain["kl"])
    with pytest.raises(ValueError, match="it tells draws or single tokens"):
        fused_head_loss(hidden, head, signal, ForwardKL(), kd_row_weights="correctness", targets=TARGETS)


def test_a_run_weighs_its_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def run(**options: str) -> list[float]:
        teacher = LiveTeacher(tiny_llama(2), tokenizer)
        trainer = make_trainer(tmp_path, tokenizer, tiny_llama(1, hidden=16), teacher, **options)
        trainer.train()
        shares = logged(trainer, "kd_row_weight")
        assert bool(shares) == bool(options)
        assert all(0 < share < 1 for share in shares)
        return logged(trainer, "kd")

    assert run(kd_row_weights="entropy")[0] < run()[0]
    with pytest.raises(ValueError, match="is no text to be right about"):
        make_config(tmp_path, kd_row_weights="correctness", on_policy_share=1.0)
