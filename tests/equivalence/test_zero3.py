"""Student and teacher sharded over two ranks by DeepSpeed ZeRO-3: the losses of one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shutil import which

import pytest
import yaml
from launch import CPU, Run

pytest.importorskip("deepspeed", reason="ZeRO-3 is DeepSpeed's")
pytestmark = pytest.mark.skipif(not which("c++"), reason="DeepSpeed compiles its communication for CPUs")
KEYS = ("loss", "kd", "ce", "kl", "entropy", "acceptance")


def test_zero3_gives_the_losses_of_one_rank(run_worker: Callable[..., Run], tmp_path: Path) -> None:
    recipe = yaml.safe_load(CPU.with_name("zero3.yaml").read_text())
    on_cpu = tmp_path / "zero3.yaml"
    on_cpu.write_text(yaml.safe_dump(recipe | {"use_cpu": True, "mixed_precision": "no"}))

    options = {"dtype": "float32", "masked": [2, 3, 9], "config": {"ce_weight": 0.5, "learning_rate": 1.0}}
    sizes = {1: {"per_device_train_batch_size": 4}, 2: {"per_device_train_batch_size": 2}}
    one = run_worker("one", 1, **options | {"config": options["config"] | sizes[1]})
    two = run_worker("two", 2, launcher=on_cpu, **options | {"config": options["config"] | sizes[2]})
    for key in KEYS:
        assert two.logged(key) == pytest.approx(one.logged(key), rel=1e-4), key
        assert two.log["evaluation"][f"eval_{key}"] == pytest.approx(one.log["evaluation"][f"eval_{key}"], rel=1e-4)
    assert one.logged("kd")[2] < one.logged("kd")[0], "nothing was learned, so nothing was compared"
