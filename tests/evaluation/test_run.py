"""`llm-distill evaluate`, and the report of a trainer."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from runs import save
from tiny import tiny_llama
from transformers import PreTrainedTokenizerBase

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.cli import main
from llm_distill.data.corpus import train_tokenizer
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
        f"report_{x}.png" for x in ("quality", "furthest", "calibration")
    }
    assert not re.search(r"""(src|href)=["'](?!#)""", page), "it needs nothing beside it"
    assert "<b>" not in page, "what a model or a text says is shown, not run"
    assert str(folder) not in page + markdown + json.dumps(content)
    assert GapReport.load(out).as_markdown() == markdown
    assert "<svg" in GapReport.load(out / "report.json")._repr_html_()


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
