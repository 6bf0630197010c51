"""What the commands take: defaults < `--config` YAML < command line, and what is built of it."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from trl import ModelConfig, ScriptArguments

    from llm_distill.config import CaptureConfig, CheckConfig, DistillationConfig, StartConfig
    from llm_distill.evaluation.config import EvaluateConfig
    from llm_distill.generation.config import GenerateConfig
    from llm_distill.trainer import DistillationTrainer

HELD_OUT = ("test", "validation", "train")
"""Splits to evaluate on, the first that is there."""

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


def build_trainer(script: ScriptArguments, args: DistillationConfig, model: ModelConfig) -> DistillationTrainer:
    """The trainer that the options describe.

    Raises:
        ValueError: something is missing, cannot be loaded or does not fit together.
    """
    if not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing: the student, a Hub id or a folder.")
    if not script.dataset_name:
        raise ValueError("--dataset_name is missing: a Hub id, a folder, a file, or `stdlib`.")
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from llm_distill.trainer import DistillationTrainer

    tokenizer = partial(
        AutoTokenizer.from_pretrained,
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    dataset = load_data(script, tokenizer)
    evaluation = dataset.get(script.dataset_test_split)
    if evaluation is None and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy} needs the split {script.dataset_test_split!r} in "
            f"{script.dataset_name!r}, which has only {', '.join(dataset)}. Name another with --dataset_test_split."
        )
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    return DistillationTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


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


def load_data(script: ScriptArguments, tokenizer: Callable[[], Any] | None = None) -> DatasetDict:
    """The dataset that `--dataset_name` means. Of a folder of generated texts, a student with the teacher's tokenizer
    (`tokenizer` loads it) gets the teacher's own tokens. A split may be a part, as `datasets` writes it: `test[:500]`.

    Raises:
        ValueError: it cannot be loaded, or has no training split of that name.
    """
    from datasets import DatasetDict

    name = script.dataset_name
    if Path(name, "generation.json").is_file() and tokenizer is not None:
        from llm_distill.generation.generate import load_generated

        return DatasetDict({script.dataset_train_split: load_generated(name, tokenizer())})
    data = _loaded(name, script.dataset_config, script.dataset_streaming)
    for split in (script.dataset_train_split, script.dataset_test_split):
        if isinstance(data, DatasetDict):
            _add_part(data, split)
    if script.dataset_train_split not in data:
        raise ValueError(f"the dataset {name!r} has no split {script.dataset_train_split!r}, only {', '.join(data)}.")
    return data


def load_split(source: str) -> Dataset:
    """One split of a dataset, or a part of one: what `SOURCE:SPLIT` names; of `SOURCE` alone the first of HELD_OUT.

    Raises:
        ValueError: it cannot be loaded, or has no such split.
    """
    found = None if Path(source).exists() else re.fullmatch(r"(.+?):(\w+(?:\[.*\])?)", source)
    name, split = found.groups() if found else (source, "")
    data = _loaded(name)
    split = split or next((each for each in HELD_OUT if each in data), "")
    _add_part(data, split)
    if split not in data:
        wanted = f"no split {split!r}" if split else f"none of the splits {', '.join(HELD_OUT)}"
        raise ValueError(f"the dataset {name!r} has {wanted}, only {', '.join(data)}. Name one: {name}:SPLIT.")
    return data[split]


def _loaded(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict:
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetsError

    from llm_distill import corpus

    kinds = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
    try:
        if name == corpus.NAME:
            data = corpus.load_corpus(max_characters=corpus.TRIAL_CHARACTERS)
        elif Path(name).is_file() and Path(name).suffix in kinds:
            data = load_dataset(kinds[Path(name).suffix], data_files=name, streaming=streaming)
        else:
            data = load_dataset(name, name=config, streaming=streaming)
    except (OSError, ValueError, ConnectionError, DatasetsError, StopIteration) as error:  # the last of an empty file
        raise ValueError(
            f"the dataset {name!r} cannot be loaded: it is no file, no folder with data, no repository that can be "
            f"reached, and not `{corpus.NAME}`. ({error})"
        ) from error
    return data if streaming else DatasetDict(data)


def _add_part(data: DatasetDict, split: str) -> None:
    """Under its name, what `split` means, if it is a part of one that is there."""
    from datasets import ReadInstruction

    whole = split.partition("[")[0]
    if split not in data and whole in data:
        (part,) = ReadInstruction.from_spec(split).to_absolute({whole: len(data[whole])})
        data[split] = data[whole].select(range(part.from_, part.to))


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
