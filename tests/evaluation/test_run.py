"""`llm-distill evaluate`, and the report of a trainer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from reports import gap_report
from runs import save
from tiny import tiny_llama
from transformers import PreTrainedTokenizerBase

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.cli import main
from llm_distill.data.corpus import train_tokenizer
from llm_distill.evaluation import harness
from llm_distill.evaluation import run as evaluation
from llm_distill.evaluation.report import GapReport


@pytest.fixture
def folder(tmp_path: Path, saved: Path, tokenizer: PreTrainedTokenizerBase, texts: Dataset) -> Path:
    """Two domains, one of prompts and completions, and a baseline, as files."""
    save(tiny_llama(7, hidden=16), tmp_path / "baseline", tokenizer)
    Dataset.from_dict({"text": texts["text"][:20]}).to_json(tmp_path / "code.jsonl")
    pairs = {"prompt": [f"def f{i}(" for i in range(9)], "completion": [f"):\n    return {i} <b>" for i in range(9)]}
    Dataset.from_dict(pairs).to_json(tmp_path / "functions.jsonl")
    return tmp_path


def run(folder: Path, saved: Path, *more: str, domains: tuple[str, ...] = ("code", "functions")) -> Path:
    data = [f"{name}={folder / name}.jsonl" for name in domains]
    out = folder / "out"
    models = ["--student", str(saved / "student"), "--teacher", str(saved / "teacher")]
    main(["evaluate", *models, "--data", *data, "--output_dir", str(out), *more])
    return out


def test_the_command_writes_a_report_in_every_form(
    folder: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(
        folder,
        saved,
        "--baseline",
        str(folder / "baseline"),
        "--generations",
        "4",
        "--max_new_tokens",
        "8",
        "--resources",
        "false",
    )
    content = json.loads((out / "report.json").read_text())
    assert content["format"] == 1
    assert content["comparable"] is True
    assert list(content["domains"]) == ["code", "functions"]
    for domain in content["domains"].values():
        assert set(domain["models"]) == {"teacher", "student", "baseline"}
        assert set(domain["likeness"]) == {"kl", "reverse_kl", "top1_agreement", "acceptance"}
    assert content["generations"]["functions"]["prompts"] == 4
    assert content["bias"]["pairs"] > 40
    passage = content["domains"]["code"]["passages"][0]
    assert passage["kl"] >= content["domains"]["code"]["likeness"]["kl"]["value"], "it is the worst window of all"
    markdown, page = (out / "report.md").read_text(), (out / "report.html").read_text()
    assert markdown in capsys.readouterr().out
    for part in ("bits a byte", "same likeliest token", "Bias transfer", "What they write", "functions"):
        assert part in markdown, part
        assert part in page, part
    assert {path.name for path in out.glob("*.png")} == {
        f"report_{x}.png" for x in ("quality", "furthest", "calibration", "layers")
    }
    assert not re.search(r"""(src|href)=["'](?!#)""", page), "it needs nothing beside it"
    assert "<b>" not in page, "what a model or a text says is shown, not run"
    assert str(folder) not in page + markdown + json.dumps(content)
    assert GapReport.load(out).as_markdown() == markdown
    assert "<svg" in GapReport.load(out / "report.json")._repr_html_()


QUICKLY = ("--resources", "false", "--bias", "none", "--max_length", "64", "--max_texts", "6", "--generations")


def interrupt(*_: Any, **__: Any) -> None:
    """As Ctrl-C does."""
    raise KeyboardInterrupt


def test_a_rerun_goes_on_where_an_earlier_one_ended(
    folder: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (*QUICKLY, "2", "--max_new_tokens", "4")
    with monkeypatch.context() as killed:
        killed.setattr(evaluation, "compare_generations", interrupt)
        with pytest.raises(SystemExit):
            run(folder, saved, *options)
    first = GapReport.load(folder / "out").content
    assert list(first["domains"]) == ["code", "functions"], "each is saved as soon as it is measured"
    capsys.readouterr()
    with monkeypatch.context() as counted:
        counted.setattr(evaluation, "measure_domain", None)
        second = GapReport.load(run(folder, saved, *options)).content
    assert second["domains"] == first["domains"]
    assert second["generations"]["code"]["prompts"] == 2
    out = capsys.readouterr().out
    assert "Measuring generations, about" in out
    assert "Measuring code" not in out
    with monkeypatch.context() as killed:
        killed.setattr(evaluation, "measure_domain", interrupt)
        with pytest.raises(SystemExit):
            run(folder, saved, *options, "--seed", "1")
    assert "Measuring code, about" in capsys.readouterr().out, "of other inputs it is measured anew"


def test_a_row_without_text_costs_itself_alone(folder: Path, saved: Path) -> None:
    texts = [json.loads(line)["text"] for line in (folder / "code.jsonl").read_text().splitlines()[:4]]
    (folder / "gaps.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [None, "", *texts, " "]))
    pairs = [{"prompt": "def f(", "completion": "): pass"}, {"prompt": "x", "completion": ""}, {"prompt": None}]
    (folder / "pairs.jsonl").write_text("".join(json.dumps({"completion": None} | row) + "\n" for row in pairs))
    report = GapReport.load(
        run(folder, saved, *QUICKLY, "2", "--max_new_tokens", "4", "--max_texts", "9", domains=("gaps", "pairs"))
    )
    assert {name: domain["texts"] for name, domain in report.domains.items()} == {"gaps": 4, "pairs": 1}
    assert "Left out of gaps: 3 of its 7 rows" in report.as_markdown().replace("\n", " ")
    assert report.content["generations"]["gaps"]["prompts"] == 2


def test_a_domain_may_have_any_name(folder: Path, saved: Path) -> None:
    """Also one that matplotlib takes for a formula, or a system for a path."""
    names = [r"cost$\b$", "a/b", "[x](y) <b>"]
    data = [f"{name}={folder / 'code'}.jsonl" for name in names]
    report = GapReport.load(run(folder, saved, *QUICKLY, "0", "--data", *data))
    assert list(report.domains) == names
    assert (folder / "out" / "report_quality.png").stat().st_size > 1000


def test_what_models_take_is_measured_last_and_the_rest_is_saved_by_then(
    folder: Path, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(models: dict[str, str], **_: object) -> dict[str, object]:
        assert set(GapReport.load(folder / "out").domains) == {"code"}
        raise ValueError("no room")

    monkeypatch.setattr(evaluation, "measure_resources", measure)
    out = run(folder, saved, *QUICKLY, "0", "--resources", "true", domains=("code",))
    assert GapReport.load(out).content["resources"] == {"skipped": "no room"}


def test_another_report_in_the_folder_is_left_alone(
    folder: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "out").mkdir()
    for name, content, message in (
        ("report.md", "My own notes.", "there is no report"),
        ("report.json", "{}", "is no gap report"),
        (
            "report.json",
            json.dumps(gap_report()),
            "holds the report on another teacher, large, and this one is teacher",
        ),
    ):
        (folder / "out" / name).write_text(content)
        with pytest.raises(SystemExit):
            run(folder, saved, *QUICKLY, "0", domains=("code",))
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert (folder / "out" / name).read_text() == content


def test_a_wrong_task_is_refused_before_anything_is_loaded(
    folder: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def match(patterns: list[str], include_path: None) -> None:  # the harness reads its own for seconds
        raise ValueError(f"there is no task {patterns[0]}")

    monkeypatch.setattr(evaluation, "_load", None)
    monkeypatch.setattr(harness, "_match_tasks", match)
    with pytest.raises(SystemExit):
        run(folder, saved, *QUICKLY, "0", "--tasks", "arc_eazy")
    assert "there is no task arc_eazy" in capsys.readouterr().err.splitlines()[-1]


def test_of_a_domain_that_takes_long_some_texts_are_measured_first(
    folder: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluation, "FIRST_LOOK_SECONDS", 0)
    report = GapReport.load(run(folder, saved, *QUICKLY, "0", domains=("code",)))
    out = capsys.readouterr().out
    assert out.count("Measuring code") == out.count("On code, the student takes") - 1 == 2, "the last is the report"
    assert report.domains["code"]["texts"] == 6


def test_every_domain_is_looked_at_before_one_is_read_to_its_end(
    folder: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], texts: Dataset
) -> None:
    """With other tokens too: of the same texts, without those that are too long for one of the models."""
    monkeypatch.setattr(evaluation, "FIRST_LOOK_SECONDS", 0)
    other = train_tokenizer(Dataset.from_dict({"text": ["0123456789"]}), 270)
    save(tiny_llama(5, hidden=16, vocab_size=270), folder / "other", other)
    long = next(text for text in texts["text"] if len(text) > 70)[:70]
    pairs = {"prompt": [long, "def f(", "def g("], "completion": ["): pass"] * 3}
    Dataset.from_dict(pairs).to_json(folder / "functions.jsonl")
    options = ["--student", str(folder / "other"), "--max_length", "64", *QUICKLY, "0"]
    report = GapReport.load(run(folder, saved, *options))
    order = [line.split()[1].strip(",.") for line in capsys.readouterr().out.splitlines() if line[:9] == "Measuring"]
    assert order == ["code", "functions", "code", "functions"]
    assert report.domains["functions"]["texts"] == 2
    assert report.domains["code"]["texts"] == 6


def test_models_with_other_tokens_are_compared_in_bits_a_byte(folder: Path, saved: Path, texts: Dataset) -> None:
    other = train_tokenizer(Dataset.from_dict({"text": [text[::-1] for text in texts["text"]]}), 300)
    save(tiny_llama(5, hidden=16, vocab_size=300), folder / "other", other)
    options = ["--student", str(folder / "other"), "--baseline", str(saved / "student")]
    out = run(
        folder,
        saved,
        *options,
        "--generations",
        "2",
        "--max_new_tokens",
        "8",
        "--bias",
        "none",
        "--resources",
        "false",
        domains=("code",),
    )
    content = json.loads((out / "report.json").read_text())
    assert "different ids" in content["comparable"]
    domain = content["domains"]["code"]
    assert domain["likeness"] is None
    assert set(domain["models"]) == {"teacher", "student", "baseline"}
    assert domain["models"]["student"]["bits_per_byte"]["value"] > 0
    assert "not comparable" in (out / "report.md").read_text()
    assert content["generations"]["code"]["prompts"] == 2


def test_the_student_of_a_run_reports_on_itself_and_shows_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, texts: Dataset, config: Callable[..., DistillationConfig]
) -> None:
    trainer = DistillationTrainer(
        model=tiny_llama(1, hidden=16),
        teacher=LiveTeacher(tiny_llama(2), tokenizer),
        args=config(),
        train_dataset=texts.select(range(4)),
        eval_dataset={"one": texts.select(range(4, 16)), "two": texts.select(range(20, 30))},
        processing_class=tokenizer,
    )
    report = trainer.report(max_texts=8)
    assert report.content["domains"]["one"]["texts"] == 8
    assert (tmp_path / "out" / "report.html").is_file()
    assert report._repr_html_() in (tmp_path / "out" / "report.html").read_text()
    trainer.train()  # the report has left nothing behind
    metrics = trainer.evaluate()
    after = trainer.report(max_texts=None).content["domains"]["one"]
    assert after["likeness"]["kl"]["value"] == pytest.approx(metrics["eval_one_kl"], rel=1e-4)
    assert after["models"]["student"]["loss"]["value"] == pytest.approx(metrics["eval_one_ce"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--student", "nobody/nothing"], "cannot be loaded"),
        (["--data", "x=nowhere.jsonl"], "'nowhere.jsonl' cannot be loaded"),
        (["--data", "a=stdlib", "a=stdlib"], "a name of its own"),
        (["--data", "=stdlib"], "a name of its own"),
        (["--data", "a="], "a name of its own and a source"),
        (["--data", "stdlib:valid"], "no split 'valid'"),
        (["--bais", "none"], "Did you mean 'bias'"),
        (["--bias", "nofile.csv"], "nofile.csv"),
        (["--task_limit", "3"], "without effect"),
        (["--max_texts", "-1"], "must not be negative"),
        (["--resource_batch_sizes", "0"], "at least 1 each"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(
    folder: Path, saved: Path, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        run(folder, saved, "--resources", "false", *more)
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1], error


@pytest.mark.parametrize("rows", [[], [{"prompt": "x = 1\n" * 100, "completion": "y"}]])
def test_an_empty_domain_is_named(
    folder: Path, saved: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, str]]
) -> None:
    (folder / "hollow.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        run(folder, saved, "--resources", "false", "--max_length", "16", domains=("code", "hollow"))
    assert "hollow" in capsys.readouterr().err.splitlines()[-1]
