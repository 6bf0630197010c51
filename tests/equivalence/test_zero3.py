"""Student and teacher sharded over two ranks by DeepSpeed ZeRO-3: the losses of one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import which
from typing import Any

import pytest
import yaml
from datasets import Dataset
from launch import CPU, Run, launch

pytest.importorskip("deepspeed", reason="ZeRO-3 is DeepSpeed's")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not which("c++"), reason="DeepSpeed compiles its communication for CPUs"),
]
RECIPES = Path(__file__).parents[2] / "recipes"
KEYS = ("loss", "kd", "ce", "kl", "entropy", "acceptance")
LOSSES = [{"name": "hidden", "layers": {1: 2}, "weight": 0.1}, {"name": "relations"}]
"""With a projection, as the widths differ."""
WRITING = {"on_policy_share": 0.5, "max_completion_length": 6, "sampling_temperature": 0.0}
"""Ranks have other numbers of texts to write."""


@pytest.fixture
def on_cpu(tmp_path: Path) -> Path:
    """The recipe's configuration of accelerate, for a CPU."""
    recipe = yaml.safe_load(CPU.with_name("zero3.yaml").read_text())
    path = tmp_path / "zero3.yaml"
    path.write_text(yaml.safe_dump(recipe | {"use_cpu": True, "mixed_precision": "no"}))
    return path


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"masked": [2, 3, 9], "config": {"losses": LOSSES}}, id="full"),
        pytest.param({"config": WRITING}, id="on-policy"),
        pytest.param({"lora": True, "config": WRITING}, id="on-policy lora"),
    ],
)
def test_zero3_gives_the_losses_of_one_rank(
    run_worker: Callable[..., Run], on_cpu: Path, options: dict[str, Any]
) -> None:
    options = options | {"dtype": "float32", "config": options["config"] | {"ce_weight": 0.5, "learning_rate": 1.0}}
    sizes = {1: {"per_device_train_batch_size": 4}, 2: {"per_device_train_batch_size": 2}}
    one = run_worker("one", 1, **options | {"config": options["config"] | sizes[1]})
    two = run_worker("two", 2, launcher=on_cpu, **options | {"config": options["config"] | sizes[2]})
    terms = [term["name"] for term in options["config"].get("losses", ())]
    for key in (*KEYS, *terms):
        assert two.logged(key) == pytest.approx(one.logged(key), rel=1e-4), key
        assert two.log["evaluation"][f"eval_{key}"] == pytest.approx(one.log["evaluation"][f"eval_{key}"], rel=1e-4)
    assert one.logged("kd")[2] < one.logged("kd")[0], "nothing was learned, so nothing was compared"


def test_a_capture_of_a_sharded_teacher_writes_the_files_of_one_rank(
    captured_shards: Callable[..., set[str]], on_cpu: Path
) -> None:
    """Of 15 shards: one rank has nothing left in the last round, and must run its share of the layers all the same."""
    one, two = captured_shards(1), captured_shards(2, on_cpu)
    assert len(two) == 15
    assert two == one


def test_a_check_before_weights_are_sharded_says_what_it_cannot_measure(
    tmp_path: Path, saved: Path, texts: Dataset, on_cpu: Path
) -> None:
    texts.select(range(16)).to_json(tmp_path / "texts.jsonl")
    options = {
        "model_name_or_path": saved / "student",
        "teacher_model_name_or_path": saved / "teacher",
        "dataset_name": tmp_path / "texts.jsonl",
        "output_dir": tmp_path / "out",
        "max_length": 64,
        "max_steps": 1,
        "bf16": False,
        "report_to": "none",
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    output = launch(RECIPES / "token_kl.py", *arguments, ranks=2, launcher=on_cpu)
    assert "0.01 M of them trained" in output
    assert output.count("skipped  losses, time") == 1
    assert (tmp_path / "out" / "model.safetensors").exists()
