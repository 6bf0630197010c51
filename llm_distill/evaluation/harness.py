"""Any tasks of EleutherAI's lm-evaluation-harness, teacher and student in the same way."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import PreTrainedTokenizerBase

from llm_distill.evaluation.statistics import Interval, as_text
from llm_distill.ranks import ranks
from llm_distill.teachers.live import LiveTeacher

logger = logging.getLogger(__name__)

INSTALL = "pip install 'llm-distill[evaluation]'"
BOOTSTRAP = 1000
"""Resamples for the standard error of what is not a mean."""


def run_tasks(
    models: Mapping[str, LiveTeacher],
    tasks: str | Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | None = None,
    apply_chat_template: bool = False,
    confirm_run_unsafe_code: bool = False,
) -> dict[str, Any]:
    """Runs `lm_eval.simple_evaluate` on each of `models`. Of several ranks the first does it, and all get the result:
    the others wait, for two hours at most.

    Args:
        models: by name, on their devices.
        tasks: names of tasks, groups or tags, with wildcards, as a list or with commas.
        limit: documents of each task.
        num_fewshot: examples in the prompt, where the task does not say 0; by default the task's own number.
        batch_size: sequences at a time.
        include_path: a folder with tasks of one's own, as YAML; they come before the harness's of the same name.
        apply_chat_template: asks by the tokenizer's chat template.
        confirm_run_unsafe_code: for tasks that run what the model writes. They are left out without it.

    Returns:
        As JSON: `tasks`: by name `n`, the documents, and `metrics`: by name `higher_is_better`, and by model `value`,
        `stderr`, and `low` and `high`, which are ± 1.96 standard errors (null where the harness gives none). `skipped`:
        why a task has no figures, by its name, such as data that cannot be had without a network; all of them where
        lm_eval is not installed.

    Raises:
        ValueError: no tasks, a task or a folder that is not there.
    """
    asked = [name.strip() for name in (tasks.split(",") if isinstance(tasks, str) else tasks) if name.strip()]
    if not asked:
        raise ValueError("there are no tasks: give names of lm-evaluation-harness, such as arc_easy,hellaswag.")
    if include_path is not None and not Path(include_path).is_dir():
        raise ValueError(f"include_path={str(include_path)!r} is no folder: it holds the tasks' YAML files.")
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        return {"tasks": {}, "skipped": dict.fromkeys(asked, f"lm_eval is not installed: {INSTALL}")}
    if unread := [name for name, model in models.items() if model.tokenizer is None]:
        raise ValueError(f"the {' and the '.join(unread)} came without a tokenizer: LiveTeacher(model, tokenizer).")
    if apply_chat_template and (unable := [n for n, m in models.items() if _tokenizer(m).chat_template is None]):
        raise ValueError(f"apply_chat_template: the tokenizer of the {' and the '.join(unable)} has no chat template.")
    outcome: list[Any] = [None]
    if ranks().is_main_process:
        options = {
            "limit": limit,
            "num_fewshot": num_fewshot,
            "apply_chat_template": apply_chat_template,
            "confirm_run_unsafe_code": confirm_run_unsafe_code,
        }
        try:
            outcome = [_run(models, asked, include_path, batch_size, options)]
        except ValueError as error:  # the others wait for something
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], ValueError):
        raise outcome[0]
    return outcome[0]


def tasks_table(found: Mapping[str, Any]) -> str:
    """Markdown: what came of `run_tasks`."""
    names = list(
        dict.fromkeys(n for task in found["tasks"].values() for m in task["metrics"].values() for n in m["models"])
    )
    lines = []
    if found["tasks"]:
        lines += [f"| task | n | metric | {' | '.join(names)} |", "|---|---:|---" + "|---:" * len(names) + "|"]
    for task, figures in found["tasks"].items():
        for metric, each in figures["metrics"].items():
            arrow = {True: " ↑", False: " ↓"}.get(each["higher_is_better"], "")
            cells = [_cell(each["models"].get(name)) for name in names]
            lines.append(f"| {task} | {figures['n']:,} | {metric}{arrow} | {' | '.join(cells)} |")
    for reason in dict.fromkeys(found["skipped"].values()):
        left_out = ", ".join(name for name, why in found["skipped"].items() if why == reason)
        lines += ["", f"Skipped: {left_out} ({reason})."]
    return "\n".join(lines).strip()


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "–"
    if figure["low"] is None:
        return f"{figure['value']:.3f}"
    return as_text(Interval(value=figure["value"], low=figure["low"], high=figure["high"]))


def _run(
    models: Mapping[str, LiveTeacher],
    asked: Sequence[str],
    include_path: str | Path | None,
    batch_size: int,
    options: dict[str, Any],
) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    tasks: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    with _quiet():
        names, manager = _named(asked, include_path)
        wrapped = {  # the harness chooses a pad token for the tokenizer that it gets
            name: HFLM(pretrained=model.model, tokenizer=copy.deepcopy(_tokenizer(model)), batch_size=batch_size)
            for name, model in models.items()
        }
        for task in names:
            try:
                results = {
                    name: simple_evaluate(
                        each,
                        tasks=[task],
                        task_manager=manager,
                        bootstrap_iters=BOOTSTRAP,
                        log_samples=False,
                        **options,
                    )
                    for name, each in wrapped.items()
                }
            except Exception as error:  # code of others, one task of many: the figures of the rest are worth having
                logger.warning("%s is skipped: %s", task, error)
                skipped[task] = _reason(error)
                continue
            for name, result in results.items():
                _add(tasks, name, result)
    return {"tasks": tasks, "skipped": skipped}


def _named(asked: Sequence[str], include_path: str | Path | None) -> tuple[list[str], Any]:
    """The tasks that are asked for, with lm_eval's TaskManager."""
    from lm_eval.tasks import TaskManager

    path = None if include_path is None else str(include_path)
    if path is not None:
        manager = TaskManager(include_path=path, include_defaults=False)
        if set(asked) <= set(manager.all_subtasks):
            return list(asked), manager  # the harness's own tasks are not needed, and reading them takes seconds
    manager = TaskManager(include_path=path)
    names: list[str] = []
    for pattern in asked:
        matching = manager.match_tasks([pattern])
        if not matching:
            near = get_close_matches(pattern, manager.all_tasks, n=3)
            meant = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"lm-evaluation-harness has no task {pattern!r}.{meant} `lm-eval ls tasks` lists all.")
        names += [name for name in matching if name not in names]
    return names, manager


def _add(tasks: dict[str, Any], model: str, result: Mapping[str, Any]) -> None:
    """Sorts what `simple_evaluate` says of a task (a group: of all in it) under the names of task and metric."""
    for task, figures in result["results"].items():
        for key, value in figures.items():
            metric, comma, filter_name = key.partition(",")
            if (
                not comma
                or metric.endswith("_stderr")
                or not isinstance(value, float | int)
                or not math.isfinite(value)
            ):
                continue
            stderr = figures.get(f"{metric}_stderr,{filter_name}")
            stderr = stderr if isinstance(stderr, float | int) and math.isfinite(stderr) else None
            entry = tasks.setdefault(task, {"n": figures["sample_len"], "metrics": {}})
            name = metric if filter_name == "none" else f"{metric} ({filter_name})"
            better = result["higher_is_better"].get(task, {}).get(metric)
            entry["metrics"].setdefault(name, {"higher_is_better": better, "models": {}})["models"][model] = {
                "value": float(value),
                "stderr": stderr,
                "low": None if stderr is None else value - 1.96 * stderr,
                "high": None if stderr is None else value + 1.96 * stderr,
            }


def _reason(error: Exception) -> str:
    """For a report that may be published: an error's own words may hold a path."""
    if isinstance(error, OSError):
        return "its data could not be had: no network, or no such dataset"
    if isinstance(error, ImportError):
        return f"it needs {error.name}, which is not installed"
    if "confirm_run_unsafe_code" in str(error):
        return "it runs what the model writes: only with confirm_run_unsafe_code"
    return f"it failed with a {type(error).__name__}"


def _tokenizer(model: LiveTeacher) -> PreTrainedTokenizerBase:
    assert model.tokenizer is not None, "run_tasks has seen to it"
    return model.tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's remarks on how it was called."""
    remarks = logging.getLogger("lm_eval")
    level = remarks.level
    remarks.setLevel(logging.ERROR)
    try:
        yield
    finally:
        remarks.setLevel(level)
