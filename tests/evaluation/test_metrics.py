"""The figures as modules of `evaluate`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import evaluate
import pytest

from llm_distill.evaluation.compare import Scores
from llm_distill.evaluation.figures import domain_figures
from llm_distill.evaluation.metrics import METRICS, rows_of


def test_evaluate_modules_load_combine_and_say_what_the_report_says(
    measure_scores: Callable[..., dict[str, Scores]], tmp_path: Path
) -> None:
    scores = measure_scores()["student"]
    names = ("held_out_loss", "teacher_likeness", "calibration")
    metrics = evaluate.combine([evaluate.load(str(METRICS / name), cache_dir=str(tmp_path)) for name in names])
    metrics.add_batch(**rows_of(scores))
    results = metrics.compute()
    expected = domain_figures({"student": scores, "teacher": scores}, comparable=True)
    for part in (expected["models"]["student"], expected["likeness"], expected["calibration"]["student"]):
        for name, figure in part.items():
            assert results[name] == (figure if name == "bins" else pytest.approx(figure, rel=1e-6)), name
