"""`llm-distill check`."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm_distill.cli.build import build_trainer, require_free_folder
from llm_distill.cli.parsing import errors_in_one_line, parse
from llm_distill.data.load import load_data

if TYPE_CHECKING:
    from trl import ModelConfig, ScriptArguments

    from llm_distill.check.report import Report
    from llm_distill.config import DistillationConfig
    from llm_distill.trainer import DistillationTrainer

LOADING = ("student", "teacher", "tokenizers")
"""What is red of these says why a run cannot be set up."""


@errors_in_one_line
def check(argv: Sequence[str]) -> None:
    """Says what can be known of a training run before its first step: `llm-distill check`.

    Exits with status 1 where something is red.
    """
    script, args, model, options = parse("check", argv)
    if not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing: the student, a Hub id or a folder.")
    from llm_distill.ranks import ranks

    report, trainer = checked(script, args, model)
    if ranks().is_main_process:
        report.print(sys.stdout)
        if options.json is not None:
            Path(options.json).write_text(json.dumps(report.as_json(), indent=2, ensure_ascii=False) + "\n")
    if trainer is not None:
        trainer.end()
    if report.is_red:
        sys.exit(1)


def checked(
    script: ScriptArguments, args: DistillationConfig, model: ModelConfig
) -> tuple[Report, DistillationTrainer | None]:
    """The report and the trainer that it is about; None where what loads it said no, or memory would not hold it."""
    from llm_distill.check.report import Finding, Report

    before = before_loading(args, model)
    try:
        require_free_folder(script, args, model, is_new=args.resume_from_checkpoint is None)
    except ValueError as error:
        before = Report((Finding("red", "output folder", str(error)), *before.findings))
    if any(finding.what == "memory" and finding.level == "red" for finding in before.findings):
        skipped = Finding(
            "skipped", "all else", "not looked at: student and teacher are not loaded into too little memory"
        )
        return Report((*before.findings, skipped)), None
    try:
        trainer = build_trainer(script, args, model)
    except (ValueError, TypeError, OSError) as error:
        findings = list(before.findings)
        if not any(finding.level == "red" and finding.what in LOADING for finding in findings):
            findings.append(Finding("red", "run", " ".join(str(error).split())))
        try:
            data = load_data(script)[script.dataset_train_split]
            rows = f"{len(data):,} rows" if hasattr(data, "__len__") else "a stream"
            findings.append(Finding("green", "data", f"{script.dataset_name}: {rows}"))
        except (ValueError, TypeError, OSError) as problem:
            if str(problem) != str(error):
                findings.append(Finding("red", "data", " ".join(str(problem).split())))
        skipped = Finding("skipped", "losses, time", "not measured: the run could not be set up")
        return Report((*findings, skipped)), None
    folder = [finding for finding in before.findings if finding.what == "output folder"]
    return Report((*folder, *trainer.check().findings)), trainer


def before_loading(args: DistillationConfig, model: ModelConfig) -> Report:
    """What the configurations say."""
    from trl import get_peft_config

    from llm_distill.check.checks import check_configurations

    return check_configurations(
        model.model_name_or_path,
        args,
        revision=model.model_revision,
        peft_config=get_peft_config(model),
        bits=4 if model.load_in_4bit else 8 if model.load_in_8bit else None,
        dtype=(args.model_init_kwargs or {}).get("dtype", model.dtype),
    )
