"""The gap report: what the models give to each token, what is made of it, and the command."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
from datasets import Dataset
from runs import save
from tiny import VOCAB, tiny_llama
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.cli import main
from llm_distill.data.corpus import train_tokenizer
from llm_distill.evaluation.compare import Scores, compare
from llm_distill.evaluation.domains import windows_of
from llm_distill.evaluation.figures import (
    behind,
    by_frequency,
    by_position,
    calibration_figures,
    domain_figures,
    furthest_tokens,
    gap_closed,
    loss_figures,
)
from llm_distill.evaluation.html import as_page
from llm_distill.evaluation.metrics import METRICS, rows_of
from llm_distill.evaluation.report import GapReport
from llm_distill.rows import IGNORED

COLUMNS = {"ce", "confidence", "correct", "kl", "reverse_kl", "top1_agreement", "acceptance"}


@pytest.fixture
def rows(texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Eleven texts of unequal length, of which one has its first half masked."""
    ids = [tokenizer(text)["input_ids"][: 10 + 7 * i] for i, text in enumerate(texts["text"][:11])]
    labels = [list(each) for each in ids]
    labels[3][: len(ids[3]) // 2] = [IGNORED] * (len(ids[3]) // 2)
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.fixture
def measured(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Callable[..., dict[str, Scores]]:
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    models = {"student": tiny_llama(1, hidden=16), "baseline": tiny_llama(3, hidden=16)}

    def measure(models: dict[str, Any] = models, teacher: Any = None, **options: Any) -> dict[str, Scores]:
        teacher = teacher or LiveTeacher(tiny_llama(2), tokenizer)
        options = {"collate": collate, "tokenizer": tokenizer, "vocab_size": VOCAB, **options}
        return compare(models, teacher, rows, **options)

    return measure


def naive(model: torch.nn.Module, row: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """log-probabilities [counted, vocab] in float64 and the tokens that came, of one text alone."""
    ids, counts = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:] != IGNORED
    with torch.no_grad():
        log_q = model(ids).logits[0, :-1].double().log_softmax(-1)
    return log_q[counts], ids[0, 1:][counts]


def test_scores_are_those_of_full_logits_in_float64(
    measured: Callable[..., dict[str, Scores]], rows: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = measured(batch_size=3)
    student, teacher = tiny_llama(1, hidden=16).eval(), tiny_llama(2).eval()
    expected: dict[str, list[Tensor]] = {name: [] for name in (*COLUMNS, "teacher_ce")}
    for row in rows:
        (log_q, targets), (log_p, _) = naive(student, row), naive(teacher, row)
        p, q = log_p.exp(), log_q.exp()
        of_row = {
            "ce": -log_q.gather(-1, targets[:, None])[:, 0],
            "teacher_ce": -log_p.gather(-1, targets[:, None])[:, 0],
            "confidence": q.amax(-1),
            "correct": q.argmax(-1) == targets,
            "kl": (p * (log_p - log_q)).sum(-1),
            "reverse_kl": (q * (log_q - log_p)).sum(-1),
            "top1_agreement": p.argmax(-1) == q.argmax(-1),
            "acceptance": torch.minimum(p, q).sum(-1),
        }
        for name, values in of_row.items():
            expected[name].append(values.double())
    assert found["student"].columns.keys() == COLUMNS
    for name, values in expected.items():
        scores = found["teacher" if name == "teacher_ce" else "student"]
        ours = scores.columns[name.removeprefix("teacher_")]
        np.testing.assert_allclose(ours, torch.cat(values).numpy(), atol=1e-5, rtol=1e-4, err_msg=name)
    text = tokenizer.decode(rows[0]["input_ids"][1:])
    assert found["student"].num_bytes[0] == len(text.encode())
    assert found["student"].per_text()[3] == sum(label != IGNORED for label in rows[3]["labels"][1:])


def test_scores_do_not_depend_on_batches_or_on_who_else_is_measured(
    measured: Callable[..., dict[str, Scores]],
) -> None:
    together, alone = measured(batch_size=4), measured({"student": tiny_llama(1, hidden=16)}, batch_size=1)
    assert set(together) == {"student", "teacher", "baseline"}
    for name, values in alone["student"].columns.items():
        np.testing.assert_allclose(values, together["student"].columns[name], atol=1e-5, rtol=1e-4)
    np.testing.assert_array_equal(alone["student"].token, together["student"].token)


def test_a_student_that_is_its_teacher_is_exactly_like_it(
    measured: Callable[..., dict[str, Scores]], tokenizer: PreTrainedTokenizerBase
) -> None:
    found = measured({"student": tiny_llama(2)})
    figures = domain_figures(found, comparable=True)
    assert figures["likeness"]["kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert figures["likeness"]["top1_agreement"]["value"] == 1
    assert figures["likeness"]["acceptance"]["value"] == pytest.approx(1, abs=1e-5)
    assert figures["models"]["student"]["loss"] == pytest.approx(figures["models"]["teacher"]["loss"], rel=1e-6)


def test_the_memory_does_not_hold_logits_of_all_rows(measured: Callable[..., dict[str, Scores]]) -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self.elements = max(self.elements, tensor.numel())
            return result

    teacher = LiveTeacher(tiny_llama(2))
    teacher.language_model.head = teacher.head.__class__(teacher.head.module, VOCAB)
    with pytest.MonkeyPatch.context() as patch, Largest() as largest:
        patch.setattr("llm_distill.losses.fused.head_loss.BUFFER_MIB", {"cpu": 0})
        patch.setattr("llm_distill.losses.fused.head_loss.MIN_CHUNK_ROWS", 16)
        scores = measured(teacher=teacher, batch_size=11)["student"]
    assert len(scores.token) > 2 * 16
    assert largest.elements < len(scores.token) * VOCAB


def made(**columns: Any) -> Scores:
    """Two texts with three tokens and one."""
    token = np.array([5, 5, 7, 5])
    text = np.array([0, 0, 0, 1])
    return Scores(text, text, np.array([0, 1, 2, 0]), token, np.array([6, 2]), {
        name: np.array(values, dtype=np.float32) for name, values in columns.items()
    })  # fmt: skip


def test_figures_against_hand_worked_numbers() -> None:
    like = {"reverse_kl": [1, 1, 1, 5], "top1_agreement": [1, 0, 1, 1], "acceptance": [0.5, 0.5, 0.5, 0.9]}
    sure = {"confidence": [0.9, 0.95, 0.5, 0.5], "correct": [1, 0, 1, 0]}
    student = made(ce=[1, 2, 3, 2], kl=[0.5, 0.5, 2, 1], **like, **sure)
    teacher, baseline = made(ce=[1, 1, 1, 1], **sure), made(ce=[3, 3, 3, 3])
    figures = loss_figures(student)
    assert figures["loss"]["value"] == 2
    assert figures["perplexity"]["value"] == pytest.approx(math.exp(2))
    assert figures["bits_per_byte"]["value"] == pytest.approx(8 / math.log(2) / 8)
    # 15 bins: 0.9 and 0.95 in two bins, each off by 0.1 and 0.95; both 0.5 in one, right half the time
    assert calibration_figures(student)["ece"]["value"] == pytest.approx((0.1 + 0.95 + 0) / 4)
    assert calibration_figures(student)["accuracy"]["value"] == 0.5
    assert gap_closed(student, teacher, baseline)["value"] == pytest.approx(0.5)
    assert behind(student, teacher)["value"] == pytest.approx((8 - 4) / math.log(2) / 8)
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
    (token,) = furthest_tokens(student, teacher, at_least=2)
    assert (token["id"], token["count"], token["teacher_loss"]) == (5, 3, 1)


@pytest.mark.parametrize("starts", [False, True])
def test_a_long_text_is_read_to_its_end_each_token_once(tokenizer: PreTrainedTokenizerBase, starts: bool) -> None:
    text = "".join(f"x{i} = {i}\n" for i in range(30))
    tokenizer = copy.deepcopy(tokenizer)
    if starts:
        tokenizer.bos_token = "!"
        start = TemplateProcessing(single="! $A", special_tokens=[("!", tokenizer.bos_token_id)])
        tokenizer._tokenizer.post_processor = start
    rows = windows_of(Dataset.from_dict({"text": ["", text]}), tokenizer, 16)
    of_text = [row["input_ids"] for row in rows if row["text_index"] == 1]
    assert max(map(len, of_text)) == 16
    predicted = [token for row in of_text for token in row[1:]]
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert predicted == whole[1:]
    assert all(row[0] == tokenizer.bos_token_id for row in of_text) == starts


def test_evaluate_modules_load_combine_and_say_what_the_report_says(
    measured: Callable[..., dict[str, Scores]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = measured()["student"]
    names = ("held_out_loss", "teacher_likeness", "calibration")
    metrics = evaluate.combine([evaluate.load(str(METRICS / name), cache_dir=str(tmp_path)) for name in names])
    metrics.add_batch(**rows_of(scores))
    found = metrics.compute()
    expected = domain_figures({"student": scores, "teacher": scores}, comparable=True)
    for part in (expected["models"]["student"], expected["likeness"], expected["calibration"]["student"]):
        for name, figure in part.items():
            assert found[name] == (figure if name == "bins" else pytest.approx(figure, rel=1e-6)), name


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
    assert report._repr_html_() in as_page(report)
    trainer.train()  # the report has left nothing behind
    metrics = trainer.evaluate()
    after = trainer.report(max_texts=None).content["domains"]["one"]
    assert after["likeness"]["kl"]["value"] == pytest.approx(metrics["eval_one_kl"], rel=1e-4)
    assert after["models"]["student"]["loss"]["value"] == pytest.approx(metrics["eval_one_ce"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "said"),
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
    folder: Path, saved: Path, capsys: pytest.CaptureFixture[str], more: list[str], said: str
) -> None:
    with pytest.raises(SystemExit):
        run(folder, saved, "--resources", "false", *more)
    error = capsys.readouterr().err
    assert said in error.splitlines()[-1], error


@pytest.mark.parametrize("rows", [[], [{"prompt": "x = 1\n" * 100, "completion": "y"}]])
def test_an_empty_domain_is_named(
    folder: Path, saved: Path, capsys: pytest.CaptureFixture[str], rows: list[dict[str, str]]
) -> None:
    (folder / "hollow.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit):
        run(folder, saved, "--resources", "false", "--max_length", "16", domains=("code", "hollow"))
    assert "hollow" in capsys.readouterr().err.splitlines()[-1]
