"""What the commands take: defaults < `--config` YAML < command line."""

from __future__ import annotations

import argparse
import difflib
import functools
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

from llm_distill.tables import printable

RUN = ("trl:ScriptArguments", "llm_distill.config:DistillationConfig", "trl:ModelConfig")
START, CHECK = "llm_distill.cli.options:StartConfig", "llm_distill.cli.options:CheckConfig"
CAPTURE = "llm_distill.capture.options:CaptureConfig"
TRACEBACK = "--traceback"
TRACEBACK_HELP = "An error says where in the code it happened too."
ENVIRONMENT = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "WANDB_PROJECT")
"""Variables that a YAML may set. Others load code, or say where keys and models come from."""


@dataclass(frozen=True)
class Command:
    """What a command takes, as module:class of its groups of options, and what its `--help` says."""

    groups: tuple[str, ...]
    description: str
    example: str
    in_yaml: tuple[str, ...] = ()
    """Groups of other commands, whose options may stand in its YAML, so that one YAML serves them all."""


COMMANDS = {
    "train": Command(
        (*RUN, START),
        "Trains a student to give each next token the probability that its teacher gives it.",
        """llm-distill train --model_name_or_path Qwen/Qwen2.5-0.5B --teacher_model_name_or_path Qwen/Qwen2.5-7B \\
      --dataset_name trl-lib/Capybara --output_dir student""",
        in_yaml=(CAPTURE,),
    ),
    "prune": Command(
        ("llm_distill.students.options:PruneConfig",),
        """Makes a student from its teacher: an ordinary model of the same class, with fewer or narrower layers, in a
folder with the tokenizer and a record of what was taken. It says much less than the teacher until it is taught, and
`llm-distill train` begins from it as from any model.""",
        "llm-distill prune --model HuggingFaceTB/SmolLM2-135M-Instruct --layers 20 --output_dir runs/cut",
    ),
    "compress": Command(
        (*RUN, "llm_distill.students.options:CompressConfig"),
        """Prunes a model a little, teaches what is left what the model says, measures it on held-out texts, and again
from there. It takes every option of `llm-distill train` for the teaching, stops at a step that costs more than was
allowed, and goes on where it was killed.""",
        """llm-distill compress --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name texts \\
      --target 0.5x --steps 3 --output_dir runs/compressed""",
    ),
    "check": Command(
        (*RUN, CHECK),
        """Says in seconds what can be known of a training run before its first step: whether student and teacher
load and fit to each other, memory, time, whether the teacher is better on this data, and what the licences
ask. It takes every option of `llm-distill train`, and exits with status 1 where something is red.""",
        "llm-distill check --config run.yaml --json found.json",
        in_yaml=(START, CAPTURE),
    ),
    "capture": Command(
        (*RUN, CAPTURE),
        """Runs the teacher once over a dataset and stores what it says, for any number of training runs. It takes every
option of `llm-distill train`, and goes on where it was killed.""",
        "llm-distill capture --config run.yaml --teacher_cache teacher_cache --cache_method top_k",
        in_yaml=(START,),
    ),
    "generate": Command(
        ("trl:ScriptArguments", "llm_distill.generation.config:GenerateConfig"),
        "Has the teacher write completions to prompts and keeps the good ones, as data for a student.",
        """llm-distill generate --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name prompts.jsonl \\
      --output_dir generated""",
    ),
    "sweep": Command(
        (*RUN, "llm_distill.sweep.options:SweepConfig"),
        """Tries settings of a run and says which is best on held-out texts, and which options matter. It takes every
option of `llm-distill train`, stops what is hopeless early and goes on where it was killed. Started again beside the
first, it shares the work.""",
        """llm-distill sweep --config run.yaml --search search.yaml --trials 30 --output_dir runs/sweep

  search.yaml:
    loss_temperature: [1, 2, 4]
    learning_rate: {low: 1e-5, high: 1e-3, log: true}""",
        in_yaml=(START, CAPTURE),
    ),
    "evaluate": Command(
        ("llm_distill.evaluation.config:EvaluateConfig",),
        """Holds a student against its teacher on held-out texts: quality, likeness, calibration, the passages in which
it is furthest off, what both write, bias, and what they cost to run. It writes report.html, report.md and
report.json.""",
        """llm-distill evaluate --student runs/student --teacher Qwen/Qwen2.5-7B --baseline Qwen/Qwen2.5-0.5B \\
      --data code=code.jsonl mail=mail.jsonl:test""",
    ),
}


def errors_in_one_line(run: Callable[[Sequence[str]], None]) -> Callable[[Sequence[str]], None]:
    """Makes a command of a function: whatever ends it is said in one line, and `--traceback` shows where it happened.

    The status is 2 for what a person gave and cannot be, 130 for Ctrl-C and 1 for what nobody expected.
    """

    @functools.wraps(run)
    def command(argv: Sequence[str]) -> None:
        try:
            run([word for word in argv if word != TRACEBACK])
        except (Exception, KeyboardInterrupt) as error:
            if TRACEBACK in argv:
                raise
            if isinstance(error, BrokenPipeError) and _reader_is_gone():
                return
            line, status = _describe_error(error)
            print(f"llm-distill: {printable(' '.join(line.split()))}", file=sys.stderr)
            sys.exit(status)

    return command


def _reader_is_gone() -> bool:
    """Whether it is our own output that nobody reads any more: `main` ends the program then."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False


def _describe_error(error: BaseException) -> tuple[str, int]:
    """In a line what ended a command, and its exit status."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted.", 130
    name, text = type(error).__name__, str(error)
    if "in DataLoader worker process" in text:  # which hands on its whole traceback
        text = text.rpartition(f"\n{name}: ")[2]
    if isinstance(error, ValueError | TypeError | OSError | ImportError):
        return f"error: {text}", 2
    return f"unexpected {name}: {text}. With {TRACEBACK} it says where it happened.", 1


def parse(command: str, argv: Sequence[str]) -> list[Any]:
    """One object for each group of options of a command. A YAML may have those of other commands too, of a capture if
    it sets `teacher_cache`.

    Raises:
        ValueError: an unknown key or flag (with the nearest known one), or a value that cannot be.
    """
    prepare_libraries()
    from llm_distill.cli.help import OptionParser

    spec = COMMANDS[command]
    groups = [resolve_name(name) for name in spec.groups]
    parser = OptionParser(command, spec.description, spec.example, groups, show_all="--help-all" in argv)
    refuse_unknown(parser.prog, _flags(argv), parser.names | {"help", "help_all", "config"})
    argv = [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" in argv[:-1]:
        path = Path(argv[argv.index("--config") + 1])
        content = _read_config(path)
        shared = [resolve_name(name) for name in spec.in_yaml if name != CAPTURE or content.get("teacher_cache")]
        of_others = {field.name for group in shared for field in fields(group)}
        given = {key: f"{key!r} in {path}" for key in content}
        refuse_unknown(parser.prog, given, parser.names | of_others)
        parser.set_defaults_with_config(**{key: value for key, value in content.items() if key not in of_others})
    return list(parser.parse_args_into_dataclasses(argv, look_for_args_file=False))[: len(groups)]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Each option on a line of its own, and what it means below."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=6)


class CommandParser(argparse.ArgumentParser):
    """How the help of every command looks; its errors are for `errors_in_one_line`."""

    def __init__(self, *, command: str, description: str, example: str, **settings: Any) -> None:
        super().__init__(
            prog=f"llm-distill {command}",
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=HelpFormatter,
            add_help=False,
            allow_abbrev=False,
            **settings,
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `{self.prog} --help` shows what it takes.")


class Parser(CommandParser):
    """For a command with a few arguments of its own."""

    def __init__(self, command: str, description: str, example: str) -> None:
        super().__init__(command=command, description=description, example=example)
        self.add_argument("-h", "--help", action="help", help="This shows what the command takes.")
        self.add_argument(TRACEBACK, action="store_true", help=TRACEBACK_HELP)

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Raises ValueError for an unknown flag, with the nearest known one, and for what is missing."""
        known = {flag.lstrip("-") for action in self._actions for flag in action.option_strings}
        refuse_unknown(self.prog, _flags(argv), known)
        options = self.parse_args(argv)
        del options.traceback  # `errors_in_one_line` has taken it
        prepare_libraries()
        return options


def prepare_libraries() -> None:
    """Tells two libraries, which peft and accelerate import wherever they are installed, what they would warn of though
    nobody uses them: bitsandbytes lacks a kernel for 4 bits on CPUs, and deepspeed has to guess that there is no GPU.
    """
    import torch

    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def _flags(argv: Sequence[str]) -> dict[str, str]:
    """The name of each flag of a command line, with where it was given."""
    flags = (word.split("=")[0] for word in argv if word.startswith("--"))
    return {flag[2:]: f"{flag} on the command line" for flag in flags}


def refuse_unknown(program: str, given: dict[str, str], known: set[str]) -> None:
    """Raises ValueError for the first name that does not exist, with where it was given and the nearest known one."""
    for name, where in given.items():
        if name.replace("-", "_") not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
            raise ValueError(f"unknown option {where}.{hint} `{program} --help` shows what it takes.")


def _read_config(path: Path) -> dict[str, Any]:
    """The options of a file. What it has under `env` becomes part of the environment."""
    content = read_mapping(path, "--config")
    environment = content.pop("env", {})
    if not isinstance(environment, dict):
        raise ValueError(f"'env' in {path} must be a mapping of variables, got {environment!r}.")
    if refused := [name for name in environment if name not in ENVIRONMENT]:
        raise ValueError(
            f"'env' in {path} sets {refused[0]}: a file may set only {', '.join(ENVIRONMENT)}. Set others where the "
            "command is started."
        )
    os.environ.update({name: str(value) for name, value in environment.items()})
    return content


def read_mapping(path: Path, flag: str) -> dict[str, Any]:
    """What a YAML file holds, a value by name.

    Args:
        path: of the file.
        flag: with which it was given.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it holds something else.
    """
    from llm_distill.options import read_yaml, with_numbers

    if not path.is_file():
        raise FileNotFoundError(f"{flag} {path}: there is no such file.")
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{flag} {path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{flag} {path}: expected lines like `learning_rate: 1e-4`.")
    return {
        str(name): with_numbers(value) if isinstance(value, dict | list) else value for name, value in content.items()
    }
