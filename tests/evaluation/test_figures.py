"""What scores come to, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from llm_distill.evaluation import figures
from llm_distill.evaluation.compare import Scores
from llm_distill.evaluation.figures import (
    by_frequency,
    by_position,
    calibration_figures,
    excess_bits_per_byte,
    furthest_tokens,
    gap_closed,
    loss_figures,
)


def make_scores(**columns: Any) -> Scores:
    """Two texts with three tokens and one."""
    token = np.array([5, 5, 7, 5])
    text = np.array([0, 0, 0, 1])
    return Scores(text, text, np.array([0, 1, 2, 0]), token, np.array([6, 2]), {
        name: np.array(values, dtype=np.float32) for name, values in columns.items()
    })  # fmt: skip


def test_figures_against_hand_worked_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    like = {"reverse_kl": [1, 1, 1, 5], "top1_agreement": [1, 0, 1, 1], "acceptance": [0.5, 0.5, 0.5, 0.9]}
    sure = {"confidence": [0.9, 0.95, 0.5, 0.5], "correct": [1, 0, 1, 0]}
    student = make_scores(ce=[1, 2, 3, 2], kl=[0.5, 0.5, 2, 1], **like, **sure)
    teacher, baseline = make_scores(ce=[1, 1, 1, 1], **sure), make_scores(ce=[3, 3, 3, 3])
    losses = loss_figures(student)
    assert losses["loss"]["value"] == 2
    assert losses["perplexity"]["value"] == pytest.approx(math.exp(2))
    assert losses["bits_per_byte"]["value"] == pytest.approx(8 / math.log(2) / 8)
    # 15 bins: 0.9 and 0.95 in two bins, each off by 0.1 and 0.95; both 0.5 in one, right half the time
    assert calibration_figures(student)["ece"]["value"] == pytest.approx((0.1 + 0.95 + 0) / 4)
    assert calibration_figures(student)["accuracy"]["value"] == 0.5
    assert gap_closed(student, teacher, baseline)["value"] == pytest.approx(0.5)
    assert excess_bits_per_byte(student, teacher)["value"] == pytest.approx((8 - 4) / math.log(2) / 8)
    assert gap_closed(teacher, teacher, baseline)["value"] == 1
    assert gap_closed(baseline, teacher, baseline)["value"] == 0
    assert gap_closed(student, baseline, teacher) is None, "the teacher is worse than the baseline"
    (first,) = by_position(student, teacher)
    assert (first["from"], first["to"], first["tokens"], first["kl"]["value"]) == (0, 7, 4, 1)
    assert (first["reverse_kl"]["value"], first["top1_agreement"]["value"]) == (2, 0.75)
    assert first["student_ece"]["value"] == first["teacher_ece"]["value"] == pytest.approx((0.1 + 0.95 + 0) / 4)
    once, often = by_frequency(student, teacher)
    assert once["student_ece"]["value"] == pytest.approx(0.5)
    assert (once["tokens"], once["kl"]["value"]) == (1, 2)
    assert (often["from"], often["to"], often["kl"]["value"]) == (2, 3, pytest.approx(2 / 3))
    monkeypatch.setattr(figures, "LEAST_OCCURRENCES", 2)
    (token,) = furthest_tokens(student, teacher)
    assert (token["id"], token["count"], token["teacher_loss"]) == (5, 3, 1)
