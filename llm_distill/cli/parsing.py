"""What the commands take: defaults < `--config` YAML < command line, and what is built of it."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from trl import ModelConfig, ScriptArguments

    from llm_distill.config import CaptureConfig, CheckConfig, DistillationConfig, StartConfig
    from llm_distill.evaluation.config import EvaluateConfig
    from llm_distill.generation.config import GenerateConfig


HELP = {
    "check": {
        "description": "Says in seconds what can be known of a training run before its first step: whether student and "
        "teacher load and fit, memory, time, whether the teacher is better on this data, what the licences ask. Takes "
        "every option of `llm-distill train`. Exits with status 1 where something is red.",
        "epilog": "example: llm-distill check --config run.yaml --json found.json",
    },
    "evaluate": {
        "description": "Holds a student against its teacher on held-out texts: quality, likeness, calibration, the "
        "passages in which it is furthest off, what both write, bias, and what they cost to run. Writes report.html, "
        "report.md and report.json.",
        "epilog": "example: llm-distill evaluate --student runs/student --teacher Qwen/Qwen2.5-7B --baseline "
        "Qwen/Qwen2.5-0.5B --data code=code.jsonl mail=mail.jsonl:test",
    },
}
"""What `--help` says above and below the options."""


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What a person gave and cannot be needs no traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, argparse.ArgumentError) as error:
        print(f"llm-distill: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def parse_train(argv: Sequence[str]) -> tuple[ScriptArguments, DistillationConfig, ModelConfig]:
    """TRL's three groups of options: defaults < `--config` YAML < command line. A YAML that sets `teacher_cache` may
    say for `capture` what is kept, which has no effect here.

    Raises:
        ValueError: an unknown key or flag (with the nearest known one), or a value that cannot be.
    """
    return parse_start(argv)[:3]


def parse_start(argv: Sequence[str]) -> tuple[ScriptArguments, DistillationConfig, ModelConfig, StartConfig]:
    """Those of `parse_train`, and how the run starts. Raises as it does."""
    script, args, model, start, *_ = _parse(argv, "train")
    return script, args, model, start


def parse_check(argv: Sequence[str]) -> tuple[ScriptArguments, DistillationConfig, ModelConfig, CheckConfig]:
    """Those of `train` (so that its YAML serves here too), and where the result is written. Raises as `parse_train`."""
    script, args, model, options, *_ = _parse(argv, "check")
    return script, args, model, options


def parse_capture(argv: Sequence[str]) -> tuple[ScriptArguments, DistillationConfig, ModelConfig, CaptureConfig]:
    """Those of `train` (so that its YAML serves here too), and what is kept. Raises as `parse_train`."""
    script, args, model, options, *_ = _parse(argv, "capture")
    return script, args, model, options


def parse_generate(argv: Sequence[str]) -> tuple[ScriptArguments, GenerateConfig]:
    """The dataset's options and those of `GenerateConfig`. Raises as `parse_train`."""
    from trl import ScriptArguments

    from llm_distill.generation.config import GenerateConfig

    script, config = _parse_groups(argv, "generate", (ScriptArguments, GenerateConfig))
    return script, config


def parse_evaluate(argv: Sequence[str]) -> EvaluateConfig:
    """The options of `EvaluateConfig`. Raises as `parse_train`."""
    from llm_distill.evaluation.config import EvaluateConfig

    return _parse_groups(argv, "evaluate", (EvaluateConfig,))[0]


class Parser(argparse.ArgumentParser):
    """For a command with a few arguments of its own; its errors are for `errors_in_one_line`."""

    def __init__(self, command: str, description: str, example: str) -> None:
        super().__init__(
            prog=f"llm-distill {command}",
            description=description,
            epilog=f"example:\n{example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Raises ValueError for an unknown flag, with the nearest known one, and for what is missing."""
        known = {flag.lstrip("-").replace("-", "_") for action in self._actions for flag in action.option_strings}
        given = [(f"{flag} on the command line", flag[2:].split("=")[0]) for flag in argv if flag.startswith("--")]
        _refuse_unknown(self.prog, given, known)
        return self.parse_args(argv)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `{self.prog} --help` shows what it takes.")


def _parse(argv: Sequence[str], command: str) -> list[Any]:
    """What `train`, `check` and `capture` take, and in a YAML what the others of them take."""
    from trl import ModelConfig, ScriptArguments

    from llm_distill.config import CaptureConfig, CheckConfig, DistillationConfig, StartConfig

    groups = (ScriptArguments, DistillationConfig, ModelConfig)
    own = {"train": StartConfig, "check": CheckConfig, "capture": CaptureConfig}[command]
    others = {StartConfig, CaptureConfig} - {own}
    return _parse_groups(argv, command, (*groups, own), in_yaml=others)


def _parse_groups(
    argv: Sequence[str], command: str, groups: tuple[Any, ...], in_yaml: AbstractSet[type] = frozenset()
) -> list[Any]:
    """One object for each group. A YAML may have the options of `in_yaml` too, those of a capture if it sets
    `teacher_cache`.
    """
    from trl import TrlParser

    from llm_distill.config import CaptureConfig

    argv = [part for given in argv for part in (given.split("=", 1) if given.startswith("--config=") else [given])]
    path = Path(argv[argv.index("--config") + 1]) if "--config" in argv[:-1] else None
    content = {} if path is None else _read_yaml(path)
    in_file_only = [group for group in in_yaml if group is not CaptureConfig or content.get("teacher_cache")]
    in_file_only = [group for group in in_file_only if any(each.name in content for each in fields(group))]
    groups = (*groups, *in_file_only)
    parser = TrlParser(groups, prog=f"llm-distill {command}", exit_on_error=False, **HELP.get(command, {}))
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the options below")
    known = {flag.lstrip("-").replace("-", "_") for action in parser._actions for flag in action.option_strings}
    in_file = [(f"{key!r} in {path}", str(key)) for key in content if key != "env"]
    given = [(f"{flag} on the command line", flag[2:].split("=")[0]) for flag in argv if flag.startswith("--")]
    _refuse_unknown(parser.prog, in_file, known)
    _refuse_unknown(parser.prog, given, known - {each.name for group in in_file_only for each in fields(group)})
    return list(parser.parse_args_and_config(argv))[: len(groups)]


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"--config {path}: there is no such file.")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path} is not YAML. ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: expected lines like `learning_rate: 1e-4`.")
    return content


def _refuse_unknown(program: str, given: list[tuple[str, str]], known: set[str]) -> None:
    """Names the nearest known option for each one, with where it was given, that does not exist."""
    for where, name in given:
        if name.replace("-", "_") not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"unknown option {where}.{hint} `{program} --help` lists all.")
