"""`llm-distill sweep`: tries settings, writes the best one out, and refuses what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import ROWS, as_flags, refused
from runs import save
from tiny import tiny_llama
from transformers import PreTrainedTokenizerBase

from llm_distill.cli.sweep import sweep
from llm_distill.cli.train import train

COMMON = {
    "max_steps": 2,
    "max_length": 32,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "per_device_train_batch_size": 2,
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "divergence_kwargs": {"beta": 0.3},
    "divergence": "jsd",
    "learning_rate": 3e-2,
}
SEARCH = {"divergence_kwargs.beta": [0.2, 0.8]}


@pytest.fixture
def flags(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Of a sweep over four settings of a tiny run."""
    (tmp_path / "data").mkdir()
    for split in ("train", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_text(4 * (json.dumps(ROWS["text"]) + "\n"))
    places = {
        "model_name_or_path": save(tiny_llama(1), tmp_path / "student", tokenizer),
        "teacher_model_name_or_path": save(tiny_llama(2), tmp_path / "teacher", tokenizer),
        "dataset_name": tmp_path / "data",
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(COMMON | {name: str(place) for name, place in places.items()}))
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(SEARCH))
    return as_flags(
        {"config": tmp_path / "run.yaml", "search": tmp_path / "search.yaml", "output_dir": tmp_path / "out"}
    )


def test_the_best_setting_is_written_out_and_reaches_what_was_said(
    tmp_path: Path, flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    sweep([*flags, "--seeds_per_setting", "2", "--stop_hopeless", "false", "--trials", "1"])
    out = capsys.readouterr().out
    assert "1/1: eval_kl" in out
    sweep([*flags, "--seeds_per_setting", "2", "--stop_hopeless", "false", "--trials", "9"])  # there are two
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name[0] != ".") == [
        "best.yaml",
        "sweep.db",
        "sweep.md",
        "sweep.png",
    ]
    table = (tmp_path / "out" / "sweep.md").read_text().splitlines()
    assert len(table) == 2 + 2
    best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text())
    assert best["divergence_kwargs"]["beta"] in (0.2, 0.8)
    results = []
    for seed in (42, 43):
        output = tmp_path / f"best-{seed}"
        train(
            as_flags({"config": tmp_path / "out" / "best.yaml", "output_dir": output, "seed": seed, "check": "false"})
        )
        results.append(json.loads((output / "eval_results.json").read_text())["eval_kl"])
    assert float(table[2].split("|")[2]) == pytest.approx(sum(results) / 2, abs=1e-4)


@pytest.mark.parametrize(
    ("search", "more", "said"),
    [
        ({"loss_temprature": [1, 2]}, [], "Did you mean 'loss_temperature'?"),
        ({"output_dir": ["a", "b"]}, [], "output_dir (the sweep sets it)"),
        ({"logging_steps": [1, 2]}, [], "it changes nothing"),
        ({"num_train_epochs": [1, 2]}, [], "max_steps=2 says"),
        ({"lora_r": [1, 2]}, [], "use_peft is off"),
        ({"max_length": [16, 32]}, [], "could not be compared"),
        ({"kd_weight": [0.0, 1.0], "loss_temperature": [1, 2]}, [], "would try kd_weight=0.0"),
        ({"divergence_kwargs.lam": [0.1, 0.2]}, [], "divergence_kwargs.lam=0.1"),
        ({"losses.hiden": [0.1, 0.2]}, [], "hiden"),
        ({"loss_temperature": [1, 2]}, ["--metric", "eval_loss"], "changes what the loss means"),
        ({"teacher_adapters_off": [True, False]}, [], "has another teacher"),
        ({"learning_rate": [1e-3, 1e-2]}, ["--trials", "0"], "trials must be at least 1"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_the_first_run(
    tmp_path: Path,
    flags: list[str],
    capsys: pytest.CaptureFixture[str],
    search: dict[str, Any],
    more: list[str],
    said: str,
) -> None:
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    assert said in refused(capsys, sweep, [*flags, *more])
    assert not (tmp_path / "out").exists()
