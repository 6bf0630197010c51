"""`llm-distill compress`: pruned and taught step by step, stopped where it costs too much, resumed after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ROWS, as_flags, refused
from runs import save
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from llm_distill.cli.compress import compress


@pytest.fixture
def options(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Two steps to 0.5x of a tiny model."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(12 * (json.dumps(ROWS["text"]) + "\n"))
    return {
        "model_name_or_path": save(tiny_llama(1, num_hidden_layers=4), tmp_path / "model", tokenizer),
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "target": "0.5x",
        "steps": 2,
        "max_loss_increase": 100,
        "max_steps": 1,
        "max_length": 64,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }


def parameters(folder: Path) -> int:
    return AutoModelForCausalLM.from_pretrained(folder).num_parameters()


def loss(folder: Path) -> float:
    """Of the held-out text, as it is learned: with its end."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[*tokenizer(ROWS["text"]["text"])["input_ids"], tokenizer.eos_token_id]])
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)


def test_a_model_is_compressed_and_goes_on_after_a_kill(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    compress(as_flags(options))
    steps, whole = [tmp_path / "out" / f"step-{number}" for number in (1, 2)], parameters(tmp_path / "model")
    assert "step 2" in capsys.readouterr().out
    for step, share in zip(steps, (0.5**0.5, 0.5), strict=True):
        assert parameters(step / "student") == parameters(step / "pruned") <= share * whole
    record = json.loads((steps[1] / "step.json").read_text())
    losses = [loss(folder) for folder in (tmp_path / "model", steps[1] / "student")]
    assert [record["eval_teacher_ce"], record["eval_ce"]] == pytest.approx(losses, rel=1e-4)
    assert record["cost"] == pytest.approx(losses[1] - losses[0], rel=1e-3)
    assert str(tmp_path) not in json.dumps(record)
    first, weights = (
        (steps[0] / "step.json").stat().st_mtime_ns,
        (steps[1] / "student" / "model.safetensors").read_bytes(),
    )
    (steps[1] / "step.json").unlink()  # as a kill before the end of the second step leaves it
    compress(as_flags(options))
    assert (steps[0] / "step.json").stat().st_mtime_ns == first
    assert (steps[1] / "student" / "model.safetensors").read_bytes() == weights
    assert "target: step-1 has '0.5x', asked for is '0.6x'" in refused(
        capsys, compress, as_flags(options | {"target": "0.6x"})
    )


def test_a_step_that_costs_too_much_is_the_last(
    tmp_path: Path, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    compress(as_flags(options | {"max_loss_increase": 1e-9, "learning_rate": 10.0}))
    assert "Stopped: step 1 costs" in capsys.readouterr().out
    assert not (tmp_path / "out" / "step-2").exists()


@pytest.mark.parametrize(
    ("changed", "parts"),
    [
        ({"target": "2x"}, ["target=2x is no smaller"]),
        ({"target": "small"}, ["0.5x", "'small'"]),
        ({"max_loss_increase": -1}, ["max_loss_increase", "positive"]),
        ({"dataset_test_split": "held_out"}, ["held-out texts", "'held_out'"]),
        ({"target": "0.01x"}, ["below the floor"]),
    ],
)
def test_what_cannot_be_is_refused(
    options: dict[str, Any], capsys: pytest.CaptureFixture[str], changed: dict[str, Any], parts: list[str]
) -> None:
    line = refused(capsys, compress, as_flags(options | changed))
    assert all(part in line for part in parts), line


def test_a_step_of_somebody_else_is_left_alone(options: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    step = options["output_dir"] / "step-1"
    step.mkdir(parents=True)
    (step / "thesis.txt").write_text("ten years")
    assert "holds what no step has left, thesis.txt" in refused(capsys, compress, as_flags(options))
    assert (step / "thesis.txt").read_text() == "ten years"
    (step / "step.json").write_text("{}")
    assert "made with other options" in refused(capsys, compress, as_flags(options))
