"""One rank or two: the same step, the same logs, the same evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from launch import Run

# Rows 2 and 3 are all that the second rank has in the first step: nothing counts there. The other rows are uneven.
MASKED = [2, 3, 9]
LOSSES = [{"name": "hidden", "layers": {1: 2, 2: 2}, "weight": 0.1}]
LAYERS = {"attention": 10.0, "relations": 1.0, "selectivity": 1.0, "rkd": 0.1}
ON_POLICY = {"on_policy_share": 0.5, "max_completion_length": 6, "sampling_temperature": 0.0, "steps_per_generation": 2}
ON_POLICY |= {"early_token_decay": 3.0, "losses": {"hidden": 0.1}}
LOGGED = ("loss", "kd", "ce", "kl", "entropy", "top1_agreement", "acceptance", "teacher_ce")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(
            {"masked": MASKED, "config": {"ce_weight": 0.5, "loss_temperature": 2.0, "losses": LOSSES}}, id="full"
        ),
        pytest.param({"masked": MASKED, "config": {"losses": LAYERS}}, id="terms on layers"),
        pytest.param({"masked": MASKED, "lora": True}, id="lora"),
        pytest.param({"config": ON_POLICY}, id="on-policy"),
        pytest.param({"masked": MASKED, "reads_more": True}, id="teacher reads more"),
        pytest.param({"masked": MASKED, "lora": True, "other_tokens": True}, id="other tokens"),
        pytest.param({"config": {"teacher_ema_decay": 0.5, "ce_weight": 1.0, "learning_rate": 0.1}}, id="average"),
    ],
)
def test_two_ranks_and_one_rank_take_the_same_steps(run_worker: Callable[..., Run], options: dict[str, Any]) -> None:
    config = options.get("config", {})
    one = run_worker("one", ranks=1, **(options | {"config": config | {"per_device_train_batch_size": 4}}))
    two = run_worker("two", ranks=2, **(options | {"config": config | {"per_device_train_batch_size": 2}}))
    for name, expected in one.weights().items():
        assert torch.equal(two.weights(0)[name], two.weights(1)[name]), f"{name} drifted apart"
        torch.testing.assert_close(two.weights()[name], expected, rtol=1e-9, atol=1e-12)
    terms = [term["name"] if isinstance(term, dict) else term for term in config.get("losses", [])]
    for key in (*LOGGED, *terms):
        assert two.logged(key) == pytest.approx(one.logged(key), rel=1e-5), key
        evaluations = [run.log["evaluation"].get(f"eval_{key}", 0.0) for run in (one, two)]
        assert evaluations[1] == pytest.approx(evaluations[0], rel=1e-5)
    assert one.log["evaluation"]["eval_kd"] > 0


def test_ranks_of_a_mixture_of_experts_stay_together(run_worker: Callable[..., Run]) -> None:
    two = run_worker("two", ranks=2, moe=True, dtype="float32", config={"gradient_accumulation_steps": 2})
    for name, weight in two.weights(0).items():
        assert torch.equal(weight, two.weights(1)[name]), f"{name} drifted apart"
