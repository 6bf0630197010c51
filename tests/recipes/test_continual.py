"""The recipe of continual distillation, and the commands that it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import continual
import pytest
from commands import as_flags, refused
from datasets import Dataset
from runs import save
from tiny import tiny_llama
from transformers import PreTrainedTokenizerBase
from warm import run_python

from llm_distill import TeacherCache
from llm_distill.cli.capture import capture
from llm_distill.cli.evaluate import evaluate
from llm_distill.cli.train import train


def write_texts(path: Path, name: str, rows: int = 20) -> Path:
    Dataset.from_dict({"text": [f"def {name}{i}(): return {i}" for i in range(rows)]}).to_json(path)
    return path


@pytest.fixture
def options(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "model_name_or_path": save(tiny_llama(1), tmp_path / "student", tokenizer),
        "teacher_model_name_or_path": save(tiny_llama(2), tmp_path / "teacher", tokenizer),
        "output_dir": tmp_path / "out",
        "max_steps": 2,
        "max_length": 32,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def test_each_method_goes_on_from_its_own_last_student(tmp_path: Path, options: dict[str, Any]) -> None:
    texts = {name: Dataset.from_json(str(write_texts(tmp_path / f"{name}.jsonl", name))) for name in ("mail", "law")}
    text = continual.run(as_flags(options), continual.split_domains(texts), tmp_path / "out", ("naive", "both"))
    content = json.loads((tmp_path / "out" / "continual.json").read_text())
    assert list(content) == ["naive", "both"]
    first = {method: figures["losses"]["mail"][0]["value"] for method, figures in content.items()}
    last = {method: figures["losses"]["mail"][1]["value"] for method, figures in content.items()}
    assert len(set(first.values())) == 1  # before the second stage there is nothing to remember
    assert len(set(last.values())) == 2
    assert "## both" in text
    assert (tmp_path / "out" / "both" / "earlier_texts.jsonl").is_file()
    record = json.loads((tmp_path / "out" / "both" / "law" / "distillation.json").read_text())
    assert [teacher["model"] for teacher in record["teacher.ensemble"]] == ["teacher", "mail"]


def test_an_empty_stage_is_refused_before_the_first(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    write_texts(tmp_path / "mail.jsonl", "mail")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 3)
    domains = [f"{name}={tmp_path / name}.jsonl" for name in ("mail", "empty")]
    assert "stage 2, empty, has 0 texts" in refused(capsys, continual.main, [*as_flags(options), "--domains", *domains])
    assert not (tmp_path / "out").exists()


def test_commands_go_on_with_new_text_a_cache_and_earlier_texts(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The teacher is asked about what is new alone, and of the second run is not there any more."""
    common = options | {"teacher_cache": tmp_path / "cache"}
    learning = common | {"earlier_texts": tmp_path / "earlier", "earlier_share": 0.5, "check": False}
    del learning["teacher_model_name_or_path"]
    students, texts = [options["model_name_or_path"]], list[int]()
    for name in ("mail", "law"):
        data = {"dataset_name": write_texts(tmp_path / f"{name}.jsonl", name)}
        capture(as_flags(common | data | {"output_dir": tmp_path / f"capture-{name}"}))
        texts.append(len(TeacherCache.open(tmp_path / "cache")))
        students.append(tmp_path / name)
        train(as_flags(learning | data | {"model_name_or_path": students[-2], "output_dir": students[-1]}))
    assert texts == [20, 40]
    capsys.readouterr()
    models = {"student": students[-1], "previous": students[-2], "teacher": options["teacher_model_name_or_path"]}
    parts = {"bias": "none", "resources": False, "generations": 0, "output_dir": tmp_path / "report"}
    sources = [f"{name}={tmp_path / name}.jsonl" for name in ("mail", "law")]
    evaluate([*as_flags(models | parts), "--data", *sources])
    assert "What was learned and forgotten" in capsys.readouterr().out
    figures = json.loads((tmp_path / "report" / "report.json").read_text())
    loss = figures["domains"]["mail"]["models"]["student"]["loss"]["value"]
    assert figures["previous"]["losses"]["mail"][-1]["value"] == pytest.approx(loss, rel=1e-5)
    assert "2 students and 1 domains" in refused(capsys, evaluate, [*as_flags(models | parts), "--data", sources[0]])


def test_help_trains_nothing(tmp_path: Path) -> None:
    assert "--domains" in run_python(continual.__file__, "--help", folder=tmp_path)
    assert not list(tmp_path.iterdir())
