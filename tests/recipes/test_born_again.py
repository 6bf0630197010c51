"""Generations of students: the first is plain distillation, each later one learns from those before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from born_again import raise_generations
from commands import ROWS, as_flags
from runs import save
from safetensors.torch import load_file
from tiny import tiny_llama
from transformers import PreTrainedTokenizerBase

from llm_distill.cli.train import train
from llm_distill.evaluation import stages


@pytest.fixture
def options(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        lines = [json.dumps({"text": ROWS["text"]["text"] + f" * {number}"}) for number in range(8)]
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    return {
        "model_name_or_path": save(tiny_llama(1), tmp_path / "student", tokenizer),
        "teacher_model_name_or_path": save(tiny_llama(2), tmp_path / "teacher", tokenizer),
        "dataset_name": tmp_path / "data",
        "output_dir": tmp_path / "out",
        "max_steps": 3,
        "max_length": 32,
        "learning_rate": 3e-3,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_one_generation_is_plain_distillation(tmp_path: Path, options: dict[str, Any]) -> None:
    (generation,) = raise_generations(as_flags(options), most=1)
    train(as_flags(options | {"output_dir": tmp_path / "plain", "seed": 43, "check": False}))
    plain, born = weights(tmp_path / "plain"), weights(generation.folder)
    assert all(torch.equal(plain[name], born[name]) for name in plain)
    reported = json.loads((tmp_path / "plain" / "eval_results.json").read_text())["eval_ce"]
    assert generation.losses.mean()["value"] == pytest.approx(reported, rel=1e-4)


@pytest.mark.parametrize("ensemble", [False, True])
def test_each_generation_learns_from_those_before(
    tmp_path: Path, options: dict[str, Any], ensemble: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("born_again.increase", lambda before, after: {"value": -1.0, "low": -1.0, "high": -1.0})
    del options["teacher_model_name_or_path"]
    generations = raise_generations(as_flags(options), most=2, ensemble=ensemble)
    assert [generation.name for generation in generations] == ["0", "1", "2"]
    records = [json.loads((g.folder / "distillation.json").read_text()) for g in generations]
    assert records[0]["objective.kd_weight"] == 0
    assert records[1]["teacher.model"] == "0"
    assert records[2].get("teacher.model") == (None if ensemble else "1")
    assert [teacher["model"] for teacher in records[2].get("teacher.ensemble", [])] == (["0", "1"] if ensemble else [])


def test_it_ends_where_the_loss_falls_no_more_than_by_chance(options: dict[str, Any]) -> None:
    generations = raise_generations(as_flags(options | {"learning_rate": 1e-9}), most=5)
    assert len(generations) == 2
    assert stages.increase(generations[0].losses, generations[1].losses)["high"] >= 0
