"""What a report shows of its figures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from reports import FIGURE, domain, gap_report

from llm_distill.evaluation.report import GapReport

WRITTEN = "<script>alert(1)</script> | **bold** `code` [link](x) $m$"


@pytest.fixture
def report(tmp_path: Path) -> GapReport:
    """As it was saved, of models that have different tokens."""
    (tmp_path / "report.json").write_text(json.dumps(gap_report()))
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


@pytest.mark.parametrize("place", ["date", "command", "comparable", "model", "text"])
def test_a_report_of_somebody_else_is_inert(tmp_path: Path, place: str) -> None:
    """Whatever field of it holds what a page or a card would run or fetch."""
    bad = "`</code><script>alert(1)</script> ![](http://tracker.example/x.png) [see](javascript:alert(1))"
    passage = {"text": bad if place == "text" else 0, "kl": 1.0, "before": "", "tokens": []}
    content = gap_report({bad: domain(passages=[passage])})
    content["student"]["model"] = content[place] = bad
    (tmp_path / "report.json").write_text(json.dumps(content))
    if place == "text":
        with pytest.raises(ValueError, match="with some that are none"):
            GapReport.load(tmp_path)
        return
    page = GapReport.load(tmp_path).save(tmp_path).read_text()
    assert not re.search(r"<(script|img|a)\b", page)
    assert """default-src 'none'""" in page
    outside_of_code = re.sub(r"(?<![\\`])(`+)(?!`).*?(?<!`)\1(?!`)", "", (tmp_path / "report.md").read_text())
    assert not re.search(r"(?<!\\)<script|(?<!\\)\[", outside_of_code)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', '{"format": 1, "domains": {"a": {}}}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(ValueError, match=r"no gap report|is a gap report without"):
        GapReport.load(tmp_path)
