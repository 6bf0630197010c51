"""`llm-distill sweep`."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PrinterCallback, TrainerCallback

from llm_distill.cli.build import build_trainer, require_free_folder
from llm_distill.cli.parsing import errors_in_one_line, parse, read_mapping, refuse_unknown

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial
    from trl import ModelConfig

    from llm_distill.config import DistillationConfig
    from llm_distill.sweep.options import SweepConfig
    from llm_distill.sweep.space import Setting, Space
    from llm_distill.sweep.study import Report

EXAMPLES = 64
"""So many settings are parsed before the first run, to see that they can be."""
OF_EACH_RUN = {"save_strategy": "no", "load_best_model_at_end": False, "push_to_hub": False, "disable_tqdm": True}
"""What the runs of a sweep have in common: their students are not kept, only what they reached."""
NO_EFFECT = ("eval_", "logging_", "save_", "hub_", "push_", "report_", "dataloader_", "dataset_", "include_")
UNSEARCHABLE = {
    **dict.fromkeys(("output_dir", *OF_EACH_RUN, "resume_from_checkpoint"), "the sweep sets it"),
    **dict.fromkeys(("seed", "data_seed"), "seeds_per_setting says with how many seeds each setting is trained"),
    **dict.fromkeys(("run_name", "project", "per_device_eval_batch_size"), "it changes nothing that is learned"),
    **dict.fromkeys(
        (
            "max_length",
            "packing",
            "packing_strategy",
            "completion_only_loss",
            "assistant_only_loss",
            "chat_template_path",
        ),
        "it decides which held-out tokens are measured, so the figures of two settings could not be compared",
    ),
}
LOSS = ("loss_temperature", "squared_temperature", "divergence", "kd_weight", "ce_weight", "losses")
"""What changes the meaning of eval_loss."""


@errors_in_one_line
def sweep(argv: Sequence[str]) -> None:
    """Tries settings of a run and says which is best: `llm-distill sweep`."""
    script, args, model, config = parse("sweep", argv)
    from llm_distill.publish.record import options_chosen, run_options
    from llm_distill.ranks import ranks
    from llm_distill.sweep.options import MAXIMISED

    try:
        from llm_distill.sweep.study import Plan, open_study, run_sweep
    except ImportError as error:
        raise ValueError(f"{error}. A sweep needs `pip install 'llm-distill[sweep]'`.") from error
    if ranks().num_processes > 1:
        raise ValueError("each run of a sweep is one process: start several sweeps with the same storage instead.")
    require_free_folder(script, args, model)
    search = read_mapping(Path(config.search), "--search")
    space = _read_space(search, args, model, config)
    base = options_chosen(args)
    for setting in space.examples(EXAMPLES):
        _parse_setting(argv, base, setting)
    plan = Plan(
        config.trials,
        range(args.seed, args.seed + config.seeds_per_setting),
        config.metric in MAXIMISED,
        config.stop_hopeless,
    )
    folder = Path(args.output_dir)
    path = Path(config.storage or folder / "sweep.db")
    identity = {"search": search, "metric": config.metric, "seeds_per_setting": config.seeds_per_setting}
    options = {name: value for name, value in run_options(script, args, model).items() if name != "output_dir"}
    study = open_study(path, identity | {"run": options}, plan)
    folder.mkdir(parents=True, exist_ok=True)
    run_sweep(study, path, space, partial(_run, argv, base, config.metric), plan, partial(_tell, study, config))
    _write_results(study, folder, config.metric, options_chosen(script, args, model))


def _read_space(search: dict[str, Any], args: DistillationConfig, model: ModelConfig, config: SweepConfig) -> Space:
    """What may be tried.

    Raises:
        ValueError: an option that does not exist, or whose values could not be told from each other.
    """
    from llm_distill.sweep.options import OF_TEACHER
    from llm_distill.sweep.space import Space

    types = {field.name: str(field.type) for group in (args, model) for field in fields(group)}
    space = Space.of(search, frozenset(name for name, text in types.items() if re.search(r"\bint\b(?!.*float)", text)))
    names = {name.split(".")[0]: name for name in space.names()}
    refuse_unknown(
        "llm-distill sweep", {option: f"{name!r} in {config.search}" for option, name in names.items()}, set(types)
    )
    refused = {option: UNSEARCHABLE[option] for option in names if option in UNSEARCHABLE}
    refused |= dict.fromkeys(
        (name for name in names if name.startswith(NO_EFFECT)), "it changes nothing that is learned"
    )
    if args.max_steps > 0 and "num_train_epochs" in names:
        refused["num_train_epochs"] = f"max_steps={args.max_steps} says how long training takes"
    if not model.use_peft and "use_peft" not in names:
        refused |= dict.fromkeys((name for name in names if name.startswith("lora_")), "use_peft is off")
    if refused:
        raise ValueError(f"without effect here, so refused: {'; '.join(f'{n} ({why})' for n, why in refused.items())}.")
    if config.metric == "eval_loss" and (changed := [name for name in names if name.startswith(LOSS)]):
        raise ValueError(
            f"--metric eval_loss: {changed[0]} changes what the loss means, so two settings could not be compared. Use "
            "eval_kl (KL to the teacher at temperature 1) or eval_ce."
        )
    if config.metric in OF_TEACHER:
        moving = [name for name in names if name.startswith("teacher_")]
        moving += ["teacher_ema_decay"] if args.teacher_ema_decay is not None else []
        if moving:
            raise ValueError(f"--metric {config.metric}: with {moving[0]} each run has another teacher. Use eval_ce.")
    return space


def _parse_setting(argv: Sequence[str], base: dict[str, Any], setting: Setting) -> tuple[Any, ...]:
    """The options of a run with a setting, as if they had been flags of the command.

    Raises:
        ValueError: they cannot be, together with the others.
    """
    from llm_distill.losses.objective import Objective
    from llm_distill.sweep.space import ONE_OF, with_setting

    flags: list[str] = []
    options: dict[str, Any] = OF_EACH_RUN | with_setting(base, setting)
    for name, value in options.items():
        is_list = isinstance(value, list) and not any(isinstance(item, dict | list) for item in value)
        texts = [str(item) for item in value] if is_list and name != "losses" else [_as_text(value)]
        flags += [f"--{name}", *texts]
    try:
        script, args, model, _ = parse("sweep", [*argv, *flags])
        Objective.of(args)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"the search would try {_in_words(setting)}, which cannot be: {error} Options that belong together are "
            f"one mapping of {ONE_OF}."
        ) from error
    return script, args, model


def _run(argv: Sequence[str], base: dict[str, Any], metric: str, setting: Setting, seed: int, report: Report) -> float:
    """What a run with a setting and a seed reaches on the held-out texts."""
    script, args, model = _parse_setting(argv, base, setting | {"seed": seed})
    with tempfile.TemporaryDirectory(prefix=".run-", dir=args.output_dir) as args.output_dir:
        trainer = build_trainer(script, args, model)
        if trainer.eval_dataset is None:
            raise ValueError(
                f"a sweep measures on held-out texts, and {script.dataset_name!r} has no split "
                f"{script.dataset_test_split!r}: name one with --dataset_test_split."
            )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(_ReportEvaluations(metric, report))
        trainer.train()
        at_end = [entry for entry in trainer.state.log_history if entry["step"] == trainer.state.global_step]
        evaluated = next((entry for entry in at_end if metric in entry), None)
        return _metric_of(evaluated or trainer.evaluate(), metric)


class _ReportEvaluations(TrainerCallback):
    """Tells what each evaluation has found, which may end the run."""

    def __init__(self, metric: str, report: Report) -> None:
        self.metric, self.report = metric, report

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        if state.global_step < state.max_steps:
            self.report(state.global_step / state.max_steps, _metric_of(metrics, self.metric))


def _metric_of(metrics: dict[str, float], name: str) -> float:
    if name not in metrics:
        there = [metric for metric in metrics if metric in ("eval_ce", "eval_kl", "eval_top1_agreement")]
        raise ValueError(
            f"--metric {name} is not measured here, without a teacher or with one that tells too little. "
            f"There are {', '.join(there)}."
        )
    return metrics[name]


def _tell(study: Study, config: SweepConfig, trial: FrozenTrial) -> None:
    """A line for each setting tried."""
    from llm_distill.sweep.report import best_first, describe_setting, seconds_of
    from llm_distill.sweep.study import ERROR, settings_tried

    best = best_first(study)[0]
    value = "failed" if ERROR in trial.user_attrs else f"{config.metric} {trial.value:.4f}"
    early = ", stopped early" if trial.state.name == "PRUNED" else ""
    is_best = " (the best)" if best.number == trial.number else f" (best {best.value:.4f})"
    print(
        f"{len(settings_tried(study))}/{config.trials}: {value}{early}{is_best} with {describe_setting(trial)}, "
        f"{seconds_of(trial)} s",
        flush=True,
    )


def _write_results(study: Study, folder: Path, metric: str, options: dict[str, Any]) -> None:
    """The best run as YAML, the table and the picture."""
    import yaml

    from llm_distill.files import write_atomically
    from llm_distill.sweep.report import best_first, picture_of, table_of
    from llm_distill.sweep.space import with_setting
    from llm_distill.sweep.study import SETTING

    best = json.loads(best_first(study)[0].user_attrs[SETTING])
    run = options | with_setting(options, best)
    write_atomically(folder / "best.yaml", yaml.safe_dump(run, sort_keys=False, allow_unicode=True).encode())
    write_atomically(folder / "sweep.md", f"{table_of(study, metric)}\n".encode())
    picture_of(study, metric).savefig(folder / "sweep.png", dpi=120)
    print(
        f"\n{table_of(study, metric, limit=10)}\n\nThe best is in {folder / 'best.yaml'}, all in {folder / 'sweep.md'} "
        f"and {folder / 'sweep.png'}. Train it: llm-distill train --config {folder / 'best.yaml'} --output_dir …"
    )


def _as_text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)


def _in_words(setting: Setting) -> str:
    return ", ".join(f"{name}={value}" for name, value in setting.items())
