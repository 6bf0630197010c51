"""What a sweep has found: a table of settings, and a picture of what mattered."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from typing import Any

import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from llm_distill.sweep.study import BY_SEED, ERROR, SETTING, settings_tried
from llm_distill.tables import Table

COLOUR = "#c2410c"
PANELS = 5
"""At most so many options are shown, those first that mattered most."""
FIRST = ("loss_temperature", "kd_weight", "ce_weight", "losses.")
"""These are shown first: a run is most sensitive to them in practice."""


def best_first(study: optuna.Study) -> list[FrozenTrial]:
    """The settings tried, those that were trained to their end before the others."""
    sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
    order = [TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.FAIL]
    return sorted(
        settings_tried(study), key=lambda trial: (order.index(trial.state), sign * (trial.value or 0), trial.number)
    )


def describe_setting(trial: FrozenTrial) -> str:
    """`loss_temperature=2, kd_weight=0.5`."""
    setting = json.loads(trial.user_attrs[SETTING])
    return ", ".join(f"{name}={_short(value)}" for name, value in setting.items())


def seconds_of(trial: FrozenTrial) -> str:
    """How long it took; nothing while it is at work."""
    return f"{trial.duration.total_seconds():.0f}" if trial.duration else ""


def table_of(study: optuna.Study, metric: str, limit: int | None = None) -> str:
    """The settings in Markdown, the best first, with the spread over seeds."""
    rows = []
    for trial in best_first(study)[:limit]:
        by_seed = list(trial.user_attrs.get(BY_SEED, {}).values())
        value = "" if trial.value is None else f"{trial.value:.4f}"
        spread = f"{statistics.stdev(by_seed):.4f}" if len(by_seed) > 1 else ""
        how = {TrialState.PRUNED: "stopped early", TrialState.RUNNING: "at work"}.get(trial.state, "")
        how = f"failed: {trial.user_attrs[ERROR]}" if ERROR in trial.user_attrs else how
        rows.append([describe_setting(trial), value, spread, seconds_of(trial), how])
    return Table(["setting", metric, "± over seeds", "seconds", "how"], rows).without_empty_columns().markdown()


def importances(study: optuna.Study) -> dict[str, float]:
    """How much each option says about being among the best (PED-ANOVA, arXiv:2304.10255), as shares of 1. Empty while
    too few settings are done.
    """
    if len(study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))) < 2:
        return {}
    return optuna.importance.get_param_importances(study)


def picture_of(study: optuna.Study, metric: str) -> Figure:
    """How much each option mattered, and the metric against each."""
    weights = importances(study)
    names = sorted(weights, key=lambda name: (not name.startswith(FIRST), -weights[name]))[:PANELS]
    figure = Figure(figsize=(3.2 * (len(names) + 1), 3.2), layout="constrained")
    first, *others = (figure.add_subplot(1, len(names) + 1, place + 1) for place in range(len(names) + 1))
    ranked = sorted(weights.items(), key=lambda item: item[1])
    first.barh([name for name, _ in ranked], [weight for _, weight in ranked], color=COLOUR)
    first.set_title("share of what mattered", fontsize=10)
    for name, axis in zip(names, others, strict=True):
        _plot_option(axis, study, name)
        axis.set_xlabel(name)
        axis.set_ylabel(metric)
    for axis in (first, *others):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    return figure


def _plot_option(axis: Axes, study: optuna.Study, name: str) -> None:
    """A dot for each setting that was trained to its end, and a line from its best seed to its worst. Between choices a
    black line joins the means over all settings.
    """
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    trials = [trial for trial in trials if name in trial.params]
    distribution = trials[0].distributions[name]
    by_place: dict[float, list[float]] = defaultdict(list)
    for trial in trials:
        value, results = trial.params[name], list(trial.user_attrs[BY_SEED].values())
        place = distribution.choices.index(value) if isinstance(distribution, CategoricalDistribution) else value
        mean = statistics.fmean(results)
        by_place[place].append(mean)
        axis.errorbar([place], [mean], [[mean - min(results)], [max(results) - mean]], fmt="o", color=COLOUR, alpha=0.6)
    if isinstance(distribution, CategoricalDistribution):
        places = sorted(by_place)
        axis.plot(places, [statistics.fmean(by_place[place]) for place in places], color="black")
        axis.set_xticks(range(len(distribution.choices)), [str(choice) for choice in distribution.choices])
    elif isinstance(distribution, FloatDistribution | IntDistribution) and distribution.log:
        axis.set_xscale("log")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
