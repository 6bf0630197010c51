"""What a student learned and forgot over the stages of its training."""

from __future__ import annotations

import numpy as np
import pytest

from llm_distill.evaluation.stages import Losses, increase, stage_figures, stage_parts


def losses(mean: float, texts: int, seed: int) -> Losses:
    random = np.random.default_rng(seed)
    tokens = random.integers(5, 50, texts).astype(float)
    return Losses(tokens * (mean + 0.1 * random.standard_normal(texts)), tokens)


STAGES = [
    {"code": losses(1.0, 30, 1), "mail": losses(3.0, 20, 2), "law": losses(4.0, 40, 3)},
    {"code": losses(1.5, 30, 1), "mail": losses(2.0, 20, 2), "law": losses(3.5, 40, 3)},
    {"code": losses(2.0, 30, 1), "mail": losses(2.25, 20, 2), "law": losses(1.0, 40, 3)},
]


def ratio(part: Losses) -> float:
    return float(part.nats.sum() / part.tokens.sum())


@pytest.mark.parametrize("before", [[], [STAGES[2]]], ids=["from the first stage", "and before it"])
def test_forgetting_is_what_was_lost_since_a_domains_own_stage(before: list[dict[str, Losses]]) -> None:
    figures = stage_figures([*before, *STAGES])
    assert list(figures["forgotten"]) == ["code", "mail"]
    assert figures["forgotten"]["code"]["value"] == pytest.approx(1.0)
    assert figures["forgotten"]["mail"]["value"] == pytest.approx(0.25)
    transfer = figures["backward_transfer"]
    assert transfer["value"] == pytest.approx(-0.625)
    assert transfer["low"] <= transfer["value"] <= transfer["high"] < 0
    assert figures["average"][-1]["value"] == pytest.approx(np.mean([ratio(part) for part in STAGES[-1].values()]))
    assert figures["average"][-1]["low"] < figures["average"][-1]["value"] < figures["average"][-1]["high"]
    table, said, _ = stage_parts(figures)
    assert "after 3" in table.markdown()
    assert ("before" in table.markdown()) == bool(before)
    assert "-0.625" in said


def test_an_interval_of_a_mean_over_domains_is_that_of_independent_ones() -> None:
    """Against a bootstrap of each domain alone."""
    random, parts = np.random.default_rng(0), list(STAGES[0].values())
    drawn = []
    for _ in range(4000):
        choices = [random.integers(len(part.nats), size=len(part.nats)) for part in parts]
        drawn.append(np.mean([p.nats[i].sum() / p.tokens[i].sum() for p, i in zip(parts, choices, strict=True)]))
    average = stage_figures(STAGES)["average"][0]
    assert average["high"] - average["low"] == pytest.approx(np.diff(np.quantile(drawn, (0.025, 0.975)))[0], rel=0.15)


def test_the_same_texts_are_drawn_for_both_sides_of_an_increase() -> None:
    before = losses(1.0, 40, 0)
    change = increase(before, Losses(before.nats + 0.5 * before.tokens, before.tokens))
    assert [change["low"], change["high"]] == pytest.approx([0.5, 0.5])


def test_students_and_domains_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="3 students and 1 domains"):
        stage_figures([{"code": stage["code"]} for stage in STAGES])
    with pytest.raises(ValueError, match="2 students and 3 domains"):
        stage_figures(STAGES[:2])
