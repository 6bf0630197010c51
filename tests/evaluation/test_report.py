"""What a report shows of its figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llm_distill.evaluation.report import GapReport

FIGURE = {"value": 0.5, "low": 0.25, "high": 0.75}
WRITTEN = "<script>alert(1)</script> | **bold** `code` [link](x) $m$"


@pytest.fixture
def content() -> dict[str, Any]:
    """A report as it was saved, of models that have different tokens."""
    losses = dict.fromkeys(("loss", "perplexity", "bits_per_byte"), FIGURE)
    calibration = {"ece": FIGURE, "accuracy": FIGURE, "bins": [{"tokens": 9, "confidence": 1.0, "accuracy": 0.5}]}
    domain = {
        "texts": 3,
        "tokens": 9,
        "bytes": 30,
        "behind": FIGURE,
        "gap_closed": None,
        "likeness": None,
        "models": {"teacher": losses, "student": losses},
        "calibration": {"teacher": calibration, "student": calibration},
    }
    machine = {"device": "a processor", "cores": 2, "threads": 2}
    return {
        "format": 1,
        "date": "2026-01-01",
        "command": "llm-distill evaluate",
        "machine": machine,
        "versions": {},
        "student": {"model": "small"},
        "teacher": {"model": "large"},
        "comparable": "other *ids*",
        "domains": {"code": domain},
    }


@pytest.fixture
def report(content: dict[str, Any], tmp_path: Path) -> GapReport:
    (tmp_path / "report.json").write_text(json.dumps(content))
    return GapReport.load(tmp_path)


def test_a_report_that_was_saved_shows_itself_again(report: GapReport, tmp_path: Path) -> None:
    page = report.save(tmp_path / "again").read_text()
    for text in (page, report.as_markdown()):
        assert "Likeness is not comparable: other" in text
        assert "0.5 (0.25 to 0.75)" in text
        assert "gap closed" not in text, "there is no baseline"
    assert json.loads((tmp_path / "again" / "report.json").read_text()) == report.content


def test_tasks_have_their_table_and_what_was_skipped_its_reason(report: GapReport) -> None:
    figures = {"higher_is_better": True, "models": {"student": {**FIGURE, "stderr": 0.1}}}
    tasks = {"arc_easy": {"n": 1000, "metrics": {"acc": figures}}}
    report.content["tasks"] = {"tasks": tasks, "skipped": {"gone": "no network"}}
    report.content["bias"] = {"skipped": "a sentence has 300 tokens"}
    markdown = report.as_markdown()
    assert "| arc_easy | 1,000 | acc ↑ | 0.500 (0.250 to 0.750) |" in markdown
    assert "Skipped: gone (no network)." in markdown
    assert "## Bias transfer\n\nSkipped: a sentence has 300 tokens" in markdown
    assert "<td>arc_easy</td>" in report._repr_html_()


def test_what_models_wrote_is_shown_and_neither_run_nor_rendered(report: GapReport) -> None:
    report.content["generations"] = {
        "code": {
            "prompts": 1,
            "references": 0,
            "left_out": 0,
            "models": {"student": {"words": FIGURE}},
            "examples": [{"prompt": WRITTEN, "reference": None, "answers": {"student": WRITTEN}}],
        }
    }
    token = {"token": WRITTEN, "kl": 1.0, "student": 0.5, "teacher": 0.5, "student_top": [[WRITTEN, 0.5]]}
    token["teacher_top"] = token["student_top"]
    passage = {"text": 0, "kl": 1.0, "before": WRITTEN, "tokens": [token]}
    report.content["domains"]["code"]["passages"] = [passage]
    assert "<script" not in report._repr_html_()
    assert report._repr_html_().count("**bold** `code` [link](x) $m$") >= 4
    assert r"\<script>alert(1)\</script> \| \*\*bold\*\* \`code\` \[link](x) \$m\$" in report.as_markdown()
