"""`llm-distill compress`."""

from __future__ import annotations

import copy
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_distill.cli.build import build_trainer
from llm_distill.cli.parsing import errors_in_one_line, parse
from llm_distill.data.load import load_data

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from trl import ModelConfig, ScriptArguments

    from llm_distill.config import DistillationConfig
    from llm_distill.students.options import CompressConfig

FILE = "step.json"
"""Beside the student of a step, once it is whole: what it has cost."""
COUNTED = ("eval_ce", "eval_teacher_ce", "eval_kl", "eval_top1_agreement")


@errors_in_one_line
def compress(argv: Sequence[str]) -> None:
    """Prunes a model a little, teaches what is left, and again from there: `llm-distill compress`."""
    script, args, model, config = parse("compress", argv)
    from llm_distill.publish.folder import require_output_folder
    from llm_distill.ranks import ranks
    from llm_distill.students.target import parse_amount, propose_shapes

    if ranks().num_processes > 1:
        raise ValueError("compress runs in one process: prune and train on many, step by step.")
    if not model.model_name_or_path or not script.dataset_name:
        raise ValueError("--model_name_or_path and --dataset_name are needed: what is compressed, and its texts.")
    share, _ = parse_amount("target", config.target)
    if share >= 1:
        raise ValueError(f"target={config.target} is no smaller: give a share below 1x.")
    args.teacher_model_name_or_path = args.teacher_model_name_or_path or model.model_name_or_path
    require_output_folder(args.output_dir, {"the model": model.model_name_or_path, "the dataset": script.dataset_name})
    if script.dataset_test_split not in load_data(script):
        raise ValueError(
            f"compress measures each step on held-out texts, and {script.dataset_name!r} has no split "
            f"{script.dataset_test_split!r}: name one with --dataset_test_split, or split your data."
        )
    empty = _without_weights(model, args.trust_remote_code)
    whole, steps = empty.num_parameters(), list[dict[str, Any]]()
    propose_shapes(empty, int(whole * share))  # or there is none, which is to be known before the first step
    for number in range(1, config.steps + 1):
        folder = Path(args.output_dir, f"step-{number}")
        start = model.model_name_or_path if number == 1 else str(folder.with_name(f"step-{number - 1}") / "student")
        parameters = int(whole * share ** (number / config.steps))
        step = _finished(folder, _settings(script, args, model, config))
        if step is None:
            step = _take_step(folder, start, parameters, script, args, model, config)
        steps.append(step)
        print(f"\n{_table(whole, steps)}\n", flush=True)
        if step["cost"] > config.max_loss_increase:
            before = "the model itself" if number == 1 else f"{folder.with_name(f'step-{number - 1}') / 'student'}"
            print(
                f"Stopped: step {number} costs {step['cost']:.3f} nats a token, more than max_loss_increase="
                f"{config.max_loss_increase:g}. The result is {before}."
            )
            return
    print(f"The student is in {folder / 'student'}.")


def _take_step(
    folder: Path,
    start: str,
    parameters: int,
    script: ScriptArguments,
    args: DistillationConfig,
    model: ModelConfig,
    config: CompressConfig,
) -> dict[str, Any]:
    """Prunes and teaches, and writes what it has cost. What a kill has left of the step is done again."""
    from llm_distill.cli.prune import make_student
    from llm_distill.files import write_atomically
    from llm_distill.students.options import PruneConfig

    began = time.perf_counter()
    if others := [
        path for path in sorted(folder.glob("*")) if not path.name.startswith(("pruned", "student", ".partial-"))
    ]:
        raise ValueError(f"{folder} holds what no step has left, {others[0].name}. Choose another output_dir.")
    shutil.rmtree(folder, ignore_errors=True)
    pruned, student = str(folder / "pruned"), str(folder / "student")
    make_student(
        PruneConfig(
            model=start,
            output_dir=pruned,
            params=str(parameters),
            method=config.method,
            calibration=f"{script.dataset_name}:{script.dataset_train_split}",
            trust_remote_code=args.trust_remote_code,
        )
    )
    of_step, of_model = copy.copy(args), copy.copy(model)
    of_step.output_dir, of_model.model_name_or_path, of_model.model_revision = student, pruned, None
    trainer = build_trainer(script, of_step, of_model)
    trainer.train()
    measured = trainer.evaluate()
    trainer.save_model(_internal_call=True)
    step = {
        "settings": _settings(script, args, model, config),
        "parameters": trainer.model.num_parameters(),
        "cost": measured["eval_ce"] - measured["eval_teacher_ce"],
        **{name: measured[name] for name in COUNTED},
        "seconds": time.perf_counter() - began,
    }
    write_atomically(folder / FILE, (json.dumps(step, indent=2) + "\n").encode())
    return step


def _settings(
    script: ScriptArguments, args: DistillationConfig, model: ModelConfig, config: CompressConfig
) -> dict[str, Any]:
    """What must be the same to go on."""
    from llm_distill.publish.record import run_options

    of_steps = {name: getattr(config, name) for name in ("target", "steps", "method")}
    chosen = run_options(script, args, model, **of_steps)
    return {name: value for name, value in chosen.items() if name != "output_dir"}


def _finished(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What a step has cost that was taken before. Raises ValueError if it was taken with other options."""
    from llm_distill.files import differences, read_json

    if not (folder / FILE).is_file():
        return None
    step = read_json(folder / FILE)
    if changes := differences(step.get("settings", {}), settings, f"{folder.name}", ignore_missing=False):
        raise ValueError(
            f"{folder} was made with other options: {'; '.join(changes)}. Give the same ones, or another output_dir."
        )
    return step


def _without_weights(model: ModelConfig, trust_remote_code: bool) -> PreTrainedModel:
    """The model that is compressed, from its configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    from llm_distill.loading import load_config

    hub = {"revision": model.model_revision} if model.model_revision else {}
    config = load_config(model.model_name_or_path, trust_remote_code, **hub)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def _table(whole: int, steps: Sequence[dict[str, Any]]) -> str:
    from llm_distill.models import millions
    from llm_distill.tables import Table

    rows = [["model", millions(whole), f"{steps[0]['eval_teacher_ce']:.3f}", "", "", ""]]
    for number, step in enumerate(steps, 1):
        figures = (f"{step['eval_kl']:.3f}", f"{step['eval_top1_agreement']:.1%}", f"{step['seconds']:.0f}")
        rows.append([f"step {number}", millions(step["parameters"]), f"{step['eval_ce']:.3f}", *figures])
    return Table(["", "parameters", "held-out loss", "KL to the model", "agreement", "seconds"], rows).markdown()
