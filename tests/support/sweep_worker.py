"""A process that sweeps a tiny space, and writes a line before each run. It stops within the run of a line number."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from llm_distill.sweep.space import Setting, Space
from llm_distill.sweep.study import Plan, Report, open_study, run_sweep

SEARCH = {"loss_temperature": [1, 2, 4, 8], "kd_weight": [0.5, 1.0]}
PLAN = Plan(trials=8, seeds=(0, 1), stop_hopeless=False)


def sweep(folder: Path, stop_at: int | None = None, plan: Plan = PLAN) -> None:
    """Each line of `runs.jsonl` is [setting, seed]."""
    runs = folder / "runs.jsonl"

    def measure(setting: Setting, seed: int, report: Report) -> float:
        with runs.open("a") as file:
            file.write(json.dumps([setting, seed]) + "\n")
        while len(runs.read_text().splitlines()) == stop_at:
            time.sleep(0.01)
        return setting["loss_temperature"] + setting["kd_weight"] + 0.01 * seed

    path = folder / "sweep.db"
    study = open_study(path, {"search": SEARCH}, plan)
    run_sweep(study, path, Space.of(SEARCH), measure, plan, lambda trial: None)


if __name__ == "__main__":
    sweep(Path(sys.argv[1]), int(sys.argv[2]))
