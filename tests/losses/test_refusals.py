"""What does not fit together is refused, with its shapes."""

from __future__ import annotations

from typing import Any

import jaxtyping
import pytest
import torch
from head_cases import (
    ROWS,
    STUDENT,
    VOCAB,
    hidden_states,
    make_head,
    make_signal,
)
from torch import Tensor

from llm_distill.divergences import make_divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused import fused_head_loss
from llm_distill.signals import HiddenSignal, MixtureSignal, SparseSignal

pytestmark = pytest.mark.usefixtures("several_chunks")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"signal": "short"}, r"\(37, 8\) and a signal of 3 rows"),
        ({"targets": torch.zeros(3, dtype=torch.long)}, r"\(37, 8\) and targets \(3,\)"),
        ({"ce_weight": 1.0}, "needs the targets"),
        ({"targets": torch.full((ROWS,), -100)}, "from -100 to -100, outside the student's 29"),
        ({"targets": torch.full((ROWS,), VOCAB)}, "to 29, outside"),
        ({"targets": torch.zeros(ROWS, dtype=torch.int32)}, "int64, got torch.int32"),
        ({"signal": "vocabulary"}, "29 tokens and the signal 20"),
        ({"signal": "device"}, r"student_hidden is on cpu, the signal on \['meta'\]"),
        ({"signal": "sampled", "divergence": "reverse_kl"}, "forward_kl only"),
        ({"signal": "sampled", "temperature": 2.0}, "those at temperature 1.0"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_shapes(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = dict(change)
    signal, _ = make_signal("sampled" if change.get("signal") == "sampled" else "hidden")
    if change.get("signal") == "short":
        signal = HiddenSignal(signal.hidden[:3], signal.head)
    if change.get("signal") == "vocabulary":
        signal = HiddenSignal(signal.hidden, LMHead(signal.head.module, 20))
    if change.get("signal") == "device":
        signal = HiddenSignal(signal.hidden.to("meta"), signal.head)
    change.pop("signal", None)
    divergence = make_divergence(change.pop("divergence", "forward_kl"))
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # what a user sees, without the tests' own checks
    with pytest.raises(ValueError, match=message):
        fused_head_loss(hidden_states(STUDENT, 5), make_head(STUDENT, 0), signal, divergence, **change)


@pytest.mark.parametrize(
    ("ids", "log_probs", "log_tail", "message"),
    [
        (torch.tensor([[0, VOCAB]]), torch.zeros(1, 2), torch.zeros(1), "outside the vocabulary"),
        (torch.tensor([[0, -1]]), torch.zeros(1, 2), torch.zeros(1), "from -1"),
        (torch.zeros(1, VOCAB + 1, dtype=torch.long), torch.zeros(1, VOCAB + 1), torch.zeros(1), "larger than the voc"),
        (torch.tensor([[0, 1]]), torch.zeros(1, 3), torch.zeros(1), "shapes differ"),
        (torch.tensor([[0, 1]]), torch.zeros(1, 2), torch.zeros(2), "shapes differ"),
    ],
)
def test_a_sparse_signal_checks_itself(ids: Tensor, log_probs: Tensor, log_tail: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseSignal(ids, log_probs, log_tail, VOCAB)


def test_a_mixture_checks_itself() -> None:
    signal, _ = make_signal("hidden")
    with pytest.raises(ValueError, match="sum to 1"):
        MixtureSignal((signal, signal), (0.5, 0.6))
    with pytest.raises(ValueError, match="share rows"):
        MixtureSignal((signal, HiddenSignal(signal.hidden[:3], signal.head)), (0.5, 0.5))
