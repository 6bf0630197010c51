"""The model card, from what lies in a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from reports import domain, gap_report

from llm_distill.publish.card import MARK, write_model_card

RECORD = {
    "objective.divergence": "ForwardKL()",
    "objective.kd_weight": 1.0,
    "objective.ce_weight": 0.0,
    "teacher.model": "big",
    "teacher.parameters": 7_000_000,
    "student.model": "small",
    "student.revision": None,
    "data.name": "texts.jsonl",
}


def write_card(folder: Path, options: dict[str, Any] | None = None, **record: Any) -> ModelCard:
    (folder / "distillation.json").write_text(json.dumps(RECORD | record))
    if options is not None:
        (folder / "run.yaml").write_text(yaml.safe_dump(options))
    write_model_card(folder, name="mine")
    return ModelCard.load(folder / "README.md")


def test_the_card_shows_the_figures_of_each_dataset(tmp_path: Path) -> None:
    figures = {"eval_code_ce": 1.75, "eval_code_teacher_ce": 1.5, "eval_prose_ce": 3.0, "eval_code_runtime": 9.0}
    card = write_card(tmp_path, **{"run.figures": figures})
    assert "| cross-entropy, nats a token (code) | 1.75 |" in card.text
    assert "| the teacher's cross-entropy (code) | 1.5 |" in card.text
    assert "| cross-entropy, nats a token (prose) | 3 |" in card.text
    assert "from `big` (7.0 M parameters)" in card.text
    shown = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results}
    assert shown == {("code", "ce"): 1.75, ("code", "teacher_ce"): 1.5, ("prose", "ce"): 3.0}


def test_the_card_says_what_is_not_known(tmp_path: Path) -> None:
    card = write_card(tmp_path, {"max_length": 2048}, **{"teacher.bits": 4})
    assert "It was not evaluated: nothing is known" in card.text
    assert "The teacher was loaded in 4 bits" in card.text
    assert "at most 2,048 tokens at a time" in card.text
    assert card.text.count("not known here") == 2, "the licences of a local teacher and a local student"
    assert {"license", "base_model", "base_model_relation", "datasets", "model-index"}.isdisjoint(card.data.to_dict())
    without = write_card(tmp_path, {}, **{"objective.kd_weight": 0.0})
    assert "on text alone" in without.text
    assert "big" not in without.text


def test_a_report_that_does_not_compare_says_why(tmp_path: Path) -> None:
    report = gap_report({"code": domain({"student": 3.0, "teacher": 2.0})}, comparable="other tokens")
    (tmp_path / "report.json").write_text(json.dumps(report))
    card = write_card(tmp_path)
    assert "not compared with its teacher token by token: other tokens." in card.text
    assert "| code | student | 1,234 | 3 (2.7 to 3.3) |" in card.text
    assert "How like" not in card.text


def test_only_what_was_not_measured_is_called_so(tmp_path: Path) -> None:
    parts = {
        "tasks": {"tasks": {"arc": {"n": 1, "metrics": {}}}, "skipped": {"gone": "no network"}},
        "bias": {"skipped": "no such pairs"},
    }
    (tmp_path / "report.json").write_text(json.dumps(gap_report({}, **parts)))
    assert "Not measured: what it writes, bias, speed and memory." in write_card(tmp_path).text


def test_a_card_is_written_anew_unless_somebody_has_made_it_their_own(tmp_path: Path) -> None:
    assert MARK in write_card(tmp_path).content
    assert "`other`" in write_card(tmp_path, **{"teacher.model": "other"}).text
    path = tmp_path / "README.md"
    path.write_text(path.read_text().replace(MARK, "Edited."))
    assert "Edited." in write_card(tmp_path, **{"teacher.model": "third"}).text
    path.write_text("---\nbase_model: /home/me/model\n---\n[More Information Needed]")  # as PEFT leaves it
    assert "/home/me" not in write_card(tmp_path).content


def test_an_ensemble_is_named_with_each_member(tmp_path: Path) -> None:
    teachers = [{"model": "lab/a", "revision": "0" * 40}, {"model": "lab/b", "revision": "1" * 40}]
    record = {"teacher.ensemble": teachers, "teacher.weights": [0.5, 0.5], "teacher.model": None}
    card = write_card(tmp_path, **record)
    assert "an ensemble of 2 teachers" in card.text
    assert {"distilled-from:lab/a", "distilled-from:lab/b"} <= set(card.data.tags)
    assert "[lab/b](https://huggingface.co/lab/b)" in card.text
