"""The figures of what the student wrote, against sums over whole distributions."""

from __future__ import annotations

import pytest
import torch
from head_cases import ROWS, STUDENT, VOCAB, hidden_states, make_head, make_signal

from llm_distill.losses import likeness
from llm_distill.losses.likeness import measure_likeness
from llm_distill.models import Kept
from llm_distill.signals import HiddenSignal, TokenSignal

WRITTEN = torch.arange(ROWS) >= 9


@pytest.mark.parametrize("kind", ["hidden", "mixture", "top 5", "top 1"])
def test_the_figures_are_those_of_the_distributions(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likeness, "TOP_K", 5)
    student, (signal, p) = Kept(hidden_states(STUDENT, 5), make_head(STUDENT, 0)), make_signal(kind)
    q = student.head(student.hidden).softmax(-1).detach()
    assert signal is not None
    figures = measure_likeness(student, signal, WRITTEN)
    measured = ~figures["top_k_mass"].isnan()
    assert not measured[~WRITTEN].any()
    assert measured[9]
    assert 4 < measured.sum() <= likeness.ROWS
    top_p, top_q = (x.topk(1 if kind == "top 1" else 5).indices.tolist() for x in (p, q))
    for row in measured.nonzero()[:, 0].tolist():
        assert figures["top_k_mass"][row] == pytest.approx(float(q[row, top_p[row]].sum()), rel=1e-5)
        overlap = len({*top_p[row]} & {*top_q[row]}) / len(top_p[row])
        assert figures["top_k_overlap"][row] == pytest.approx(overlap)
        if kind in ("hidden", "mixture"):
            reverse_kl = float((q[row] * (q[row] / p[row]).log()).sum())
            assert figures["reverse_kl"][row] == pytest.approx(reverse_kl, rel=1e-4)
    assert ("reverse_kl" in figures) == (kind in ("hidden", "mixture"))


def test_a_teacher_that_is_the_student_is_exactly_like_it() -> None:
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5)
    figures = measure_likeness(Kept(hidden, head), HiddenSignal(hidden, head), WRITTEN)
    assert figures["reverse_kl"].nansum() == 0
    assert figures["top_k_overlap"].nanmean() == 1


def test_of_no_row_and_of_single_tokens_nothing_is_measured() -> None:
    student, (signal, _) = Kept(hidden_states(STUDENT, 5), make_head(STUDENT, 0)), make_signal("hidden")
    assert signal is not None
    none = measure_likeness(student, signal, torch.zeros(ROWS).bool())
    assert all(values.isnan().all() for values in none.values())
    assert measure_likeness(student, TokenSignal(torch.zeros(ROWS), VOCAB), WRITTEN) == {}
