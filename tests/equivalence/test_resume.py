"""Killed in mid-training and resumed: the run that was not interrupted."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from launch import WORKER, Run, start_ranks

CONFIG = {
    "max_steps": 12,
    "save_strategy": "steps",
    "save_steps": 3,
    "optim": "adamw_torch",
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "train_sampling_strategy": "random",
    "gradient_accumulation_steps": 2,
    "losses": [{"name": "hidden", "layers": {1: 2}, "weight": 0.1}],  # with a projection, which must be resumed too
    "on_policy_share": 0.5,  # what is sampled must be the same too
    "max_completion_length": 4,
    "num_generations": 2,
    "steps_per_generation": 4,  # a checkpoint lies between
    "replay_share": 0.3,
}


def test_a_killed_run_resumes_to_the_same_weights_and_losses(run_worker: Callable[..., Run], tmp_path: Path) -> None:
    whole = run_worker("whole", config=CONFIG)

    folder = tmp_path / "killed"
    folder.mkdir()
    (program,) = start_ranks(WORKER, str(folder), json.dumps({"config": CONFIG, "pause": 0.5}))
    deadline = time.monotonic() + 120
    while not (folder / "out" / "checkpoint-6" / "trainer_state.json").exists():
        assert program.poll() is None, "the worker ended before it could be killed"
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.02)
    program.kill()
    assert not (folder / "log.json").exists()

    resumed = run_worker("killed", config=CONFIG, resume=True)
    assert resumed.logged("loss") == pytest.approx(whole.logged("loss"), rel=1e-12)
    assert len(whole.logged("loss")) == CONFIG["max_steps"]
    assert any("distillation_terms" in name for name in whole.weights())
    for name, expected in whole.weights().items():
        assert torch.equal(resumed.weights()[name], expected), name
