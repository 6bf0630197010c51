"""`llm-distill train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_distill.cli.build import build_trainer, require_free_folder
from llm_distill.cli.check import before_loading
from llm_distill.cli.parsing import errors_in_one_line, parse

if TYPE_CHECKING:
    from llm_distill.check.report import Report
    from llm_distill.cli.options import StartConfig
    from llm_distill.data.earlier import EarlierTexts
    from llm_distill.trainer import DistillationTrainer


@errors_in_one_line
def train(argv: Sequence[str]) -> None:
    """Trains a student on a teacher's distributions: `llm-distill train`, and `recipes/token_kl.py`."""
    script, args, model, start = parse("train", argv)
    from llm_distill.data import corpus
    from llm_distill.leaks import public_value
    from llm_distill.publish.record import run_options

    options, resumption = run_options(script, args, model), _resumption(args.resume_from_checkpoint)
    require_free_folder(script, args, model, is_new=not resumption)
    if start.check and model.model_name_or_path:
        refuse_red(before_loading(args, model), only="memory")
    earlier = _earlier_texts(start, args.seed)
    trainer = build_trainer(script, args, model, earlier=earlier)
    trainer.run.command, trainer.run.options = ["llm-distill", "train", *argv], options
    trainer.run.record["data.name"] = public_value(script.dataset_name)
    trainer.run.require_resumable(resumption)
    if start.check:
        refuse_red(trainer.check())
    with trainer.run.at_work():
        trainer.train(resume_from_checkpoint=resumption)
        if earlier is not None:
            earlier.remember(earlier.stage)
        save_and_tell(trainer, None if script.dataset_name == corpus.NAME else script.dataset_name)
    trainer.end()


def save_and_tell(trainer: DistillationTrainer, dataset: str | None) -> None:
    """Saves the student, and only then what may fail: its card, its evaluation, its way to the Hub."""
    args = trainer.args
    trainer.save_model(_internal_call=True)
    trainer.accelerator.print(f"The student is in {args.output_dir}.")
    trainer.create_model_card(dataset_name=dataset)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
        trainer.create_model_card(dataset_name=dataset)
    if args.push_to_hub:
        try:
            trainer.push_to_hub(dataset_name=dataset)
        except (ValueError, ConnectionError) as error:
            raise ValueError(f"the student is in {args.output_dir}, but is not on the Hub: {error}") from error


def refuse_red(report: Report, only: str | None = None) -> None:
    """Shows what was found, on one rank; ends the program with status 1 where something is red. Of `only` one thing,
    nothing is shown unless it is.
    """
    from llm_distill.ranks import ranks

    red = [finding for finding in report.findings if finding.level == "red" and only in (None, finding.what)]
    if ranks().is_main_process and (red or only is None):
        report.print(sys.stdout)
        if red:
            print("llm-distill: not started, see what is red. --check false starts anyway.", file=sys.stderr)
    if red:
        sys.exit(1)


def _earlier_texts(start: StartConfig, seed: int) -> EarlierTexts | None:
    """Those that the run learns from again, if it shall."""
    from llm_distill.data.earlier import EarlierTexts

    if start.earlier_texts is None:
        return None
    return EarlierTexts(Path(start.earlier_texts), start.earlier_share, start.earlier_max_bytes, seed)


def _resumption(value: str | None) -> str | bool:
    """`--resume_from_checkpoint true` means the last one; otherwise it is a folder."""
    return {"none": False, "false": False, "true": True}.get(str(value).lower(), value or False)
