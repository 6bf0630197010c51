"""The trials of a sweep, in an SQLite file that several processes share and that survives kills. On optuna."""

from __future__ import annotations

import json
import random
import sqlite3
import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import optuna
import torch
from optuna.trial import FrozenTrial, TrialState

from llm_distill.files import differences
from llm_distill.sweep.space import RandomDraw, Setting, Space

STUDY = "sweep"
STARTUP = 5
"""So many settings are drawn by chance, and trained to their end, before what they say is used."""
SHARES = 1000
"""Optuna counts whole steps: so many a seed, whatever the number of optimizer steps."""
DRAWS = 1000
"""How often a setting is drawn by chance that has not been tried yet, before the sweep is over."""
SETTING, BY_SEED, ERROR = "setting", "by_seed", "error"
"""What is kept of a trial beside its value: the setting as JSON, the metric by seed, and why there is none."""
optuna.logging.set_verbosity(optuna.logging.WARNING)

Report = Callable[[float, float], None]
"""Told (share of the training, metric) at each evaluation; raises `optuna.TrialPruned` where it is hopeless."""
Measure = Callable[[Setting, int, Report], float]
"""The metric of a run with a setting and a seed."""


@dataclass(frozen=True)
class Plan:
    """How a sweep goes on."""

    trials: int
    seeds: Sequence[int]
    maximise: bool = False
    stop_hopeless: bool = True


def open_study(path: Path, identity: dict[str, Any], plan: Plan) -> optuna.Study:
    """The study in a file, which is made if need be.

    Args:
        path: of the SQLite file.
        identity: what must be the same to go on.

    Raises:
        ValueError: the file is something else, or of another sweep.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(_lock_of(path)):
        _require_study(path)
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}", engine_kwargs={"connect_args": {"timeout": 100}})
        study = optuna.create_study(
            study_name=STUDY,
            storage=storage,
            direction="maximize" if plan.maximise else "minimize",
            pruner=optuna.pruners.MedianPruner(STARTUP) if plan.stop_hopeless else optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        if "identity" not in study.user_attrs:
            study.set_user_attr("identity", identity)
    if changes := differences(study.user_attrs["identity"], identity, path.name, ignore_missing=False):
        raise ValueError(
            f"{path} belongs to another sweep: {'; '.join(changes)}. Go on with what it was made with, or name "
            "another file with --storage."
        )
    return study


def _require_study(path: Path) -> None:
    """Raises ValueError for a file that is there and holds something else than a sweep."""
    if not path.exists() or not path.stat().st_size:
        return
    try:
        with closing(sqlite3.connect(path)) as file:
            names = [name for (name,) in file.execute("SELECT study_name FROM studies")]
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is not the storage of a sweep ({error}): name another with --storage.") from error
    if names not in ([], [STUDY]):
        raise ValueError(f"{path} holds other studies of optuna ({', '.join(names)}): name another with --storage.")


def run_sweep(
    study: optuna.Study, path: Path, space: Space, measure: Measure, plan: Plan, tell: Callable[[FrozenTrial], None]
) -> None:
    """Tries settings until `plan.trials` have been tried, or all that there are. What fails with a ValueError or for
    want of memory is a setting that does not work; while none has worked, it ends the sweep.

    Args:
        study: from `open_study`.
        path: of its file, beside which the locks lie.
        tell: told of each trial when it is over.
    """
    while (started := _start_trial(study, path, space, plan)) is not None:
        trial, lock = started
        with lock:
            try:
                study.tell(trial, _mean_over_seeds(trial, measure, plan))
            except optuna.TrialPruned:
                study.tell(trial, state=TrialState.PRUNED)
            except (ValueError, torch.OutOfMemoryError) as error:
                if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
                    raise
                trial.set_user_attr(ERROR, str(error))
                study.tell(trial, state=TrialState.FAIL)
        tell(study.get_trials(deepcopy=False)[trial.number])


def settings_tried(study: optuna.Study) -> list[FrozenTrial]:
    """Every trial that is or was at work, without those that began anew elsewhere."""
    at_work = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING)
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state in at_work or ERROR in trial.user_attrs]


def _start_trial(
    study: optuna.Study, path: Path, space: Space, plan: Plan
) -> tuple[optuna.Trial, filelock.AcquireReturnProxy] | None:
    """A setting that nobody has tried, with the lock that says that it is at work. None when the sweep is over.

    One process at a time chooses. Of the same trials it chooses the same, so a resumed sweep goes on as it would have.
    """
    with filelock.FileLock(_lock_of(path)):
        _revive_killed(study, path)
        tried = settings_tried(study)
        if len(tried) >= plan.trials:
            return None
        seed = plan.seeds[0] + len(study.get_trials(deepcopy=False))
        study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP, seed=seed)
        known = {trial.user_attrs.get(SETTING) for trial in tried}
        trial = study.ask()
        setting = _as_key(space.suggest(trial))
        if setting in known:
            study.tell(trial, state=TrialState.FAIL)
            params = _draw_untried(space, known, random.Random(seed))
            if params is None:
                return None
            study.enqueue_trial(params)
            trial = study.ask()
            setting = _as_key(space.suggest(trial))
        trial.set_user_attr(SETTING, setting)
        return trial, filelock.FileLock(_lock_of(path, trial.number)).acquire()


def _revive_killed(study: optuna.Study, path: Path) -> None:
    """Puts the settings first in which a process died, with the seeds that were done."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        try:
            lock = filelock.FileLock(_lock_of(path, trial.number)).acquire(timeout=0)
        except filelock.Timeout:
            continue
        with lock:
            if study.get_trials(deepcopy=False)[trial.number].state != TrialState.RUNNING:
                continue  # it was over just before its lock was free
            study.tell(trial.number, state=TrialState.FAIL)
            if SETTING in trial.user_attrs:
                study.enqueue_trial(trial.params, user_attrs={BY_SEED: trial.user_attrs.get(BY_SEED, {})})


def _draw_untried(space: Space, known: set[Any], generator: random.Random) -> dict[str, Any] | None:
    """The parameters of a setting that is not known, by chance. None where there seems to be none."""
    for _ in range(DRAWS):
        draw = RandomDraw(generator)
        if _as_key(space.suggest(draw)) not in known:
            return draw.params
    return None


def _mean_over_seeds(trial: optuna.Trial, measure: Measure, plan: Plan) -> float:
    """The metric of a trial. Each seed's is kept as soon as it is there.

    Raises:
        optuna.TrialPruned: it is worse than the median of the others, each at the same share of the same seed.
    """
    by_seed: dict[str, float] = dict(trial.user_attrs.get(BY_SEED, {}))
    for number, seed in enumerate(plan.seeds):

        def report(share: float, value: float, before: int = number) -> None:
            trial.report(value, round(SHARES * (before + share)))
            if trial.should_prune():
                raise optuna.TrialPruned

        if str(seed) not in by_seed:
            by_seed[str(seed)] = measure(json.loads(trial.user_attrs[SETTING]), seed, report)
            trial.set_user_attr(BY_SEED, by_seed)
        if number + 1 < len(plan.seeds):
            report(1.0, by_seed[str(seed)])
    return statistics.fmean(by_seed.values())


def _as_key(setting: Setting) -> str:
    return json.dumps(setting, sort_keys=True)


def _lock_of(path: Path, trial: int | None = None) -> Path:
    return path.with_name(f".{path.name}{'' if trial is None else f'.{trial}'}.lock")
