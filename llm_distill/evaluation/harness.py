"""Any tasks of EleutherAI's lm-evaluation-harness, teacher and student in the same way."""

from __future__ import annotations

import copy
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from llm_distill.evaluation.statistics import format_interval
from llm_distill.models import LanguageModel
from llm_distill.ranks import run_on_first_rank
from llm_distill.tables import Table

logger = logging.getLogger(__name__)

INSTALL = "pip install 'llm-distill[evaluation]'"
BATCH_SIZE = 8
"""Sequences at a time."""
BOOTSTRAP = 1000
"""Resamples for the standard error of what is not a mean."""


def run_tasks(
    models: Mapping[str, LanguageModel],
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    include_path: str | Path | None = None,
) -> dict[str, Any]:
    """Runs `lm_eval.simple_evaluate` on each of `models`. Of several ranks the first does it, and all get the result:
    the others wait, for two hours at most.

    Args:
        models: by name, on their devices.
        tasks: names of tasks, groups or tags, with wildcards; one entry may have several, with commas.
        limit: documents of each task.
        include_path: a folder with tasks of one's own, as YAML; they come before the harness's of the same name.

    Returns:
        As JSON: `tasks`: by name `n`, the documents, and `metrics`: by name `higher_is_better`, and by model `value`,
        `stderr`, and `low` and `high`, which are ± 1.96 standard errors (null where the harness gives none). `skipped`:
        why a task has no figures, by its name, such as data that cannot be had without a network; all of them where
        lm_eval is not installed.

    Raises:
        ValueError: no tasks, a task or a folder that is not there.
    """
    patterns = _patterns(tasks, include_path)
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        return {"tasks": {}, "skipped": dict.fromkeys(patterns, f"lm_eval is not installed: {INSTALL}")}
    return run_on_first_rank(lambda: _run(models, patterns, include_path, limit))


def require_tasks(tasks: Sequence[str], include_path: str | Path | None) -> None:
    """Raises ValueError for a task that there is not, as far as lm_eval is installed to tell."""
    with suppress(ImportError), _without_remarks():
        _match_tasks(_patterns(tasks, include_path), include_path)


def _patterns(tasks: Sequence[str], include_path: str | Path | None) -> list[str]:
    patterns = [name.strip() for entry in tasks for name in entry.split(",") if name.strip()]
    if not patterns:
        raise ValueError("there are no tasks: give names of lm-evaluation-harness, such as arc_easy hellaswag.")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path={str(include_path)!r} is no folder: it holds the tasks' YAML files.")
    return patterns


def tasks_parts(results: Mapping[str, Any]) -> list[Table | str]:
    """What came of `run_tasks`: a table, and what was skipped."""
    tasks = results["tasks"]
    metrics = [(name, *item) for name, task in tasks.items() for item in task["metrics"].items()]
    names = list(dict.fromkeys(name for *_, figures in metrics for name in figures["models"]))
    rows = []
    for task, metric, figures in metrics:
        arrow = {True: " ↑", False: " ↓"}.get(figures["higher_is_better"], "")
        cells = [_format_score(figures["models"].get(name)) for name in names]
        rows.append([task, f"{tasks[task]['n']:,}", metric + arrow, *cells])
    by_reason: dict[str, list[str]] = {}
    for name, reason in results["skipped"].items():
        by_reason.setdefault(reason, []).append(name)
    skipped = [f"Skipped: {', '.join(left_out)} ({reason})." for reason, left_out in by_reason.items()]
    return [Table(["task", "n", "metric", *names], rows), *skipped]


def _format_score(score: Any) -> str:
    """One with its interval, if it has one."""
    return format_interval(score) if score is None or score["low"] is not None else f"{score['value']:.3f}"


def _run(
    models: Mapping[str, LanguageModel], patterns: Sequence[str], include_path: str | Path | None, limit: int | None
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tasks: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    with _without_remarks():
        names, manager = _match_tasks(patterns, include_path)
        options = {"task_manager": manager, "limit": limit, "bootstrap_iters": BOOTSTRAP, "log_samples": False}
        wrapped = {  # the harness chooses a pad token for the tokenizer that it gets
            name: HFLM(pretrained=model.model, tokenizer=copy.deepcopy(model.tokenizer), batch_size=BATCH_SIZE)
            for name, model in models.items()
        }
        for task in names:
            try:
                results = {name: simple_evaluate(model, tasks=[task], **options) for name, model in wrapped.items()}
            except Exception as error:  # code of others, one task of many: the figures of the rest are worth having
                logger.warning("%s is skipped: %s", task, error)
                skipped[task] = _reason(error)
                continue
            for name, result in results.items():
                _add_result(tasks, name, result)
    return {"tasks": tasks, "skipped": skipped}


def _match_tasks(patterns: Sequence[str], include_path: str | Path | None) -> tuple[list[str], Any]:
    """The tasks that are asked for, with lm_eval's TaskManager."""
    path = None if include_path is None else str(include_path)
    if path is not None:
        manager = _task_manager(path, include_defaults=False)
        if set(patterns) <= set(manager.all_subtasks):
            return list(patterns), manager  # the harness's own tasks are not needed, and reading them takes seconds
    manager = _task_manager(path)
    names: list[str] = []
    for pattern in patterns:
        matching = manager.match_tasks([pattern])
        if not matching:
            near = get_close_matches(pattern, manager.all_tasks, n=3)
            meant = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"lm-evaluation-harness has no task {pattern!r}.{meant} `lm-eval ls tasks` lists all.")
        names += [name for name in matching if name not in names]
    return names, manager


@functools.cache
def _task_manager(include_path: str | None, include_defaults: bool = True) -> Any:
    """Tasks are looked up when a run begins and when they are run; to read the harness's own takes ten seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


def _add_result(tasks: dict[str, Any], model: str, result: Mapping[str, Any]) -> None:
    """Sorts what `simple_evaluate` says of a task (a group: of all in it) under the names of task and metric."""
    for task, figures in result["results"].items():
        for key, value in figures.items():
            metric, comma, filter_name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not _is_number(value):
                continue
            stderr = figures.get(f"{metric}_stderr,{filter_name}")
            stderr = stderr if _is_number(stderr) else None
            entry = tasks.setdefault(task, {"n": figures["sample_len"], "metrics": {}})
            name = metric if filter_name == "none" else f"{metric} ({filter_name})"
            better = result["higher_is_better"].get(task, {}).get(metric)
            entry["metrics"].setdefault(name, {"higher_is_better": better, "models": {}})["models"][model] = {
                "value": float(value),
                "stderr": stderr,
                "low": None if stderr is None else value - 1.96 * stderr,
                "high": None if stderr is None else value + 1.96 * stderr,
            }


def _is_number(value: Any) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _reason(error: Exception) -> str:
    """In words that may be published: those of an error may hold a path."""
    if isinstance(error, OSError):
        return "its data could not be had: no network, or no such dataset"
    if isinstance(error, ImportError):
        return f"it needs {error.name}, which is not installed"
    if "confirm_run_unsafe_code" in str(error):
        return "it runs what the model writes: only lm-eval itself does that, with --confirm_run_unsafe_code"
    return f"it failed with a {type(error).__name__}"


@contextmanager
def _without_remarks() -> Iterator[None]:
    """The harness remarks on how it was called."""
    remarks = logging.getLogger("lm_eval")
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        yield
    finally:
        remarks.setLevel(level)
