"""A sweep in a file: killed and resumed, shared, nothing twice, hopeless runs stopped."""

from __future__ import annotations

import json
import random
import sqlite3
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import sweep_worker
from sweep_worker import PLAN, SEARCH, sweep
from warm import warm_process

from llm_distill.sweep.space import RandomDraw, Setting, Space, with_setting
from llm_distill.sweep.study import BY_SEED, ERROR, Plan, Report, open_study, run_sweep, settings_tried

EVERYTHING = sorted(
    json.dumps([{"kd_weight": weight, "loss_temperature": temperature}, seed])
    for temperature in (1, 2, 4, 8)
    for weight in (0.5, 1.0)
    for seed in (0, 1)
)


def run_all(folder: Path, search: dict[str, Any], measure: Any, plan: Plan) -> optuna.Study:
    path = folder / "sweep.db"
    study = open_study(path, search, plan)
    run_sweep(study, path, Space.of(search), measure, plan, lambda trial: None)
    return study


def lines(folder: Path) -> list[str]:
    path = folder / "runs.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_a_sweep_killed_and_resumed_tries_nothing_twice(tmp_path: Path) -> None:
    program = warm_process().start(sweep_worker.__file__, tmp_path, "6")
    while len(lines(tmp_path)) < 6:  # the second seed of the third setting
        assert program.poll() is None, program.errors()
        time.sleep(0.01)
    program.kill()
    sweep(tmp_path)
    tried = lines(tmp_path)
    killed = tried.pop(5)
    assert killed == tried[5]  # the seed in which it died begins anew, at once; its first seed was kept
    assert sorted(tried) == EVERYTHING
    study = open_study(tmp_path / "sweep.db", {"search": SEARCH}, PLAN)
    assert all(set(trial.user_attrs[BY_SEED]) == {"0", "1"} for trial in settings_tried(study))
    assert study.best_value == pytest.approx(1.505)
    sweep(tmp_path)  # it is over
    assert len(lines(tmp_path)) == 17


def test_two_processes_share_a_sweep(tmp_path: Path) -> None:
    programs = [warm_process().start(sweep_worker.__file__, tmp_path, "0") for _ in range(2)]
    assert [program.wait() for program in programs] == [0, 0]
    assert sorted(lines(tmp_path)) == EVERYTHING


def test_a_hopeless_setting_is_stopped_and_a_broken_one_is_told(tmp_path: Path) -> None:
    search = {"learning_rate": {"low": 0.0, "high": 1.0}, "loss_temperature": {"low": 1.0, "high": 4.0}}
    reports: list[float] = []

    def measure(setting: Setting, seed: int, report: Report) -> float:
        if setting["learning_rate"] > 0.9:
            raise ValueError("the loss is not finite")
        for share in (0.5, 0.75):
            reports.append(setting["learning_rate"])
            report(share, setting["learning_rate"])
        return setting["learning_rate"]

    study = run_all(tmp_path, search, measure, Plan(16, (0,)))
    states = [trial.state.name for trial in settings_tried(study)]
    pruned = [trial for trial in settings_tried(study) if trial.state.name == "PRUNED"]
    complete = [trial.value for trial in settings_tried(study) if trial.state.name == "COMPLETE"]
    assert len(states) == 16
    assert pruned
    assert all(trial.value > sorted(complete)[len(complete) // 2] for trial in pruned[-3:])
    assert all(trial.params["learning_rate"] > 0.9 for trial in settings_tried(study) if ERROR in trial.user_attrs)
    assert len(reports) < 2 * 16


def test_a_setting_that_cannot_be_is_the_end_while_none_has_worked(tmp_path: Path) -> None:
    def measure(setting: Setting, seed: int, report: Report) -> float:
        raise ValueError("no such metric")

    with pytest.raises(ValueError, match="no such metric"):
        run_all(tmp_path, SEARCH, measure, PLAN)


def test_a_file_of_another_sweep_or_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "sweep.db"
    open_study(path, {"search": SEARCH}, PLAN)
    with pytest.raises(ValueError, match=r"another sweep: search.kd_weight: sweep.db has \[0.5, 1.0\]"):
        open_study(path, {"search": SEARCH | {"kd_weight": [1, 2]}}, PLAN)
    (tmp_path / "notes.txt").write_text("temperature 2 was good")
    with pytest.raises(ValueError, match="not the storage of a sweep"):
        open_study(tmp_path / "notes.txt", {}, PLAN)
    optuna.create_study(study_name="theirs", storage=f"sqlite:///{tmp_path / 'other.db'}")
    with pytest.raises(ValueError, match="theirs"):
        open_study(tmp_path / "other.db", {}, PLAN)
    connection = sqlite3.connect(tmp_path / "cookbook.db")
    connection.execute("create table recipes (name text)")
    connection.commit()
    connection.close()
    with pytest.raises(ValueError, match="cookbook"):
        open_study(tmp_path / "cookbook.db", {}, PLAN)


def test_groups_are_set_together_and_names_with_a_dot_within_an_option() -> None:
    space = Space.of(
        {
            "losses.hidden": [0, 0.5],
            "one_of": [
                {"divergence": "forward_kl", "loss_temperature": [1, 2]},
                {"divergence": "jsd", "divergence_kwargs.beta": {"low": 0.1, "high": 0.9}},
            ],
        }
    )
    assert space.count() == float("inf")
    drawn = [space.suggest(RandomDraw(random.Random(seed))) for seed in range(40)]
    assert all(("divergence_kwargs.beta" in setting) == (setting["divergence"] == "jsd") for setting in drawn)
    assert {setting["divergence"] for setting in drawn} == {"forward_kl", "jsd"}
    examples = list(space.examples(64))
    assert len(examples) == 8
    assert {"losses.hidden": 0.5, "divergence": "jsd", "divergence_kwargs.beta": 0.9} in examples
    options = {"losses": [{"name": "rkd", "weight": 1.0}, {"name": "hidden", "weight": 2.0, "layers": [1]}]}
    changed = with_setting(options, {"losses.hidden": 0.5, "divergence_kwargs.beta": 0.3, "kd_weight": 1})
    assert changed == {
        "losses": [{"name": "rkd", "weight": 1.0}, {"name": "hidden", "weight": 0.5, "layers": [1]}],
        "divergence_kwargs": {"beta": 0.3},
        "kd_weight": 1,
    }
    assert with_setting(options, {"losses.hidden": 0}) == {"losses": [{"name": "rkd", "weight": 1.0}]}


def test_few_examples_have_every_value() -> None:
    search = {f"option_{number}": list(range(5)) for number in range(6)}
    examples = list(Space.of(search).examples(10))
    assert all({setting[name] for setting in examples} == set(range(5)) for name in search)


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({}, "lines such as"),
        ({"kd_weight": 1.0}, "searches nothing"),
        ({"kd_weight": [1.0]}, "two different values"),
        ({"kd_weight": [1.0, 1.0]}, "two different values"),
        ({"kd_weight": {"low": 1}}, "expected a list of choices"),
        ({"kd_weight": {"low": 2, "high": 1}}, "low must be below high"),
        ({"kd_weight": {"low": 0, "high": 1, "log": True}}, "with log low positive"),
        ({"kd_weight": {"low": "a", "high": 1}}, "must be numbers"),
        ({"one_of": [{"divergence": "jsd"}]}, "two groups"),
        ({"one_of": [{"divergence": "jsd"}, {"divergence": "jsd"}]}, "write what differs as a list"),
        ({"divergence": ["jsd", "tvd"], "one_of": [{"divergence": "jsd"}, {"divergence": "tvd"}]}, "searched twice"),
        ({"one_of": ["jsd", "tvd"]}, "list of mappings"),
    ],
)
def test_what_is_no_space_is_refused(search: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Space.of(search)
