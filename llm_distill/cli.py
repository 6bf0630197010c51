"""`llm-distill COMMAND`: the command line. `llm-distill COMMAND --help` shows every option with its meaning.

Options may come from a YAML file (`--config run.yaml`) and from the command line, which wins. Several ranks:
`accelerate launch --config_file recipes/accelerate/ddp.yaml -m llm_distill.cli train --config run.yaml`.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import DatasetDict
    from trl import ModelConfig, ScriptArguments

    from llm_distill.config import CaptureConfig, DistillationConfig
    from llm_distill.generation.config import GenerateConfig
    from llm_distill.trainer import DistillationTrainer

EXAMPLE = """example:
  llm-distill train --model_name_or_path Qwen/Qwen2.5-0.5B --teacher_model_name_or_path Qwen/Qwen2.5-7B \\
      --dataset_name trl-lib/Capybara --output_dir student --divergence forward_kl

--dataset_name may be a Hub id, a folder, a .json, .jsonl, .csv, .parquet or .txt file, or `stdlib`, two
megabytes of the sources of the Python standard library, which need no download."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm-distill`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="llm-distill",
        description="Distil a large language model into a small one.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, help_text) in COMMANDS.items():
        commands.add_parser(name, help=help_text, add_help=False)
    COMMANDS[parser.parse_args(argv[:1]).command][0](argv[1:])


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What a person gave and cannot be needs no traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, argparse.ArgumentError) as error:
        print(f"llm-distill: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def train(argv: Sequence[str]) -> None:
    """Trains a student on a teacher's distributions: `llm-distill train`, and `recipes/token_kl.py`."""
    from llm_distill import corpus

    with errors_in_one_line():
        script, args, model = parse_train(argv)
        trainer = build_trainer(script, args, model)
        resumption = _resumption(args.resume_from_checkpoint)
        trainer.require_resumable(resumption)
    dataset = None if script.dataset_name == corpus.NAME else script.dataset_name
    trainer.train(resume_from_checkpoint=resumption)
    if trainer.eval_dataset is not None:
        metrics = trainer.evaluate()
        trainer.log_metrics("eval", metrics)
        trainer.save_metrics("eval", metrics)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=dataset)  # saves both too
    else:
        trainer.save_model()
        trainer.create_model_card(Path(args.output_dir).name, dataset_name=dataset)
    trainer.accelerator.print(f"The student is in {args.output_dir}.")
    trainer.end()


def build_trainer(script: ScriptArguments, args: DistillationConfig, model: ModelConfig) -> DistillationTrainer:
    """The trainer that the options describe.

    Raises:
        ValueError: something is missing, cannot be loaded or does not fit together.
    """
    if not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing: the student, a Hub id or a folder.")
    if not script.dataset_name:
        raise ValueError("--dataset_name is missing: a Hub id, a folder, a file, or `stdlib`.")
    from trl import get_peft_config, get_quantization_config

    from llm_distill.trainer import DistillationTrainer

    dataset = load_data(script, model.model_name_or_path)
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


def capture(argv: Sequence[str]) -> None:
    """Stores a teacher's answers to a dataset: `llm-distill capture`, and `recipes/capture.py`."""
    from llm_distill.cache.methods import make_method
    from llm_distill.capture import capture as fill
    from llm_distill.capture_report import report_fidelity

    with errors_in_one_line():
        script, args, model, options = parse_capture(argv)
        assert isinstance(options.cache_kwargs, dict), "CaptureConfig has parsed it"
        method = make_method(options.cache_method, **options.cache_kwargs)
        folder = args.teacher_cache or str(Path(args.output_dir, "teacher_cache"))
        args.teacher_cache, args.on_miss = None, "error"
        trainer = build_trainer(script, args, model)
        cache = fill(
            trainer, folder, method, drop_stale=options.drop_stale, examples_per_shard=options.examples_per_shard
        )
    trainer.accelerator.print(cache.summary())
    report_fidelity(trainer, cache)
    if options.cache_hub_id is not None and trainer.accelerator.is_main_process:
        from llm_distill.cache.hub import push_cache

        with errors_in_one_line():
            print(f"Pushed to {push_cache(cache, options.cache_hub_id, private=options.cache_hub_private)}")
    trainer.accelerator.print(f"Train from it with --teacher_cache {folder}")
    trainer.end()


def inspect(argv: Sequence[str]) -> None:
    """What a cache holds, whether it is whole and, with a run's options, how true it is: `llm-distill inspect`."""
    parser = argparse.ArgumentParser(
        prog="llm-distill inspect",
        description="Says what a teacher cache holds and verifies every file. With --config (and any option of a "
        "training run) the teacher is loaded, and the fidelity measured anew on that run's texts.",
    )
    parser.add_argument("cache", help="a folder, or a dataset repository on the Hub")
    known, rest = parser.parse_args(argv[:1]), argv[1:]
    with errors_in_one_line():
        from llm_distill.cache import TeacherCache

        cache = TeacherCache.open(known.cache)
        print(cache.summary())
        damaged = cache.verify()
        if damaged:
            raise ValueError(f"{len(damaged)} damaged: {', '.join(damaged)}. `llm-distill capture` makes them again.")
        print(f"All {len(cache.shards)} shards are whole.")
        if rest:
            from llm_distill.capture_report import report_fidelity

            script, args, model, _ = parse_capture(rest)  # so that the YAML of either serves
            args.teacher_cache, args.on_miss = None, "error"
            report_fidelity(build_trainer(script, args, model), cache)
        elif cache.manifest.get("fidelity"):
            print(cache.manifest["fidelity"]["table"])


def generate(argv: Sequence[str]) -> None:
    """Has the teacher write completions and keeps the good ones: `llm-distill generate`."""
    from llm_distill.generation.choose import make_engine, tokenizer_of
    from llm_distill.generation.endpoint import BudgetReachedError
    from llm_distill.generation.generate import ACCEPTED, read_report
    from llm_distill.generation.generate import generate as write
    from llm_distill.generation.prompts import prompts_of
    from llm_distill.ranks import ranks

    say = ranks().print
    with errors_in_one_line():
        script, config = parse_generate(argv)
        filters = config.make_filters()
        if not script.dataset_name:
            raise ValueError("--dataset_name is missing: prompts, as a Hub id, a folder, a file, or `stdlib`.")
        dataset = load_data(script)[script.dataset_train_split]
        engine = make_engine(config)
        prompts = list(
            prompts_of(
                dataset,
                column=config.prompt_column,
                as_chat=config.as_chat,
                system_prompt=config.system_prompt,
                prompt_tokens=config.prompt_tokens,
                tokenizer=tokenizer_of(engine),
                limit=config.max_prompts,
            )
        )
        try:
            report = write(
                engine, prompts, config.output_dir, config.sampling(), filters=filters, tokenizer=tokenizer_of(engine)
            )
        except BudgetReachedError as reached:
            say(f"Stopped: {reached}")
            report = read_report(config.output_dir)
    say(f"\n{report.as_markdown()}\n")
    if config.generated_hub_id is not None and ranks().is_main_process:
        from llm_distill.generation.hub import push_generated

        with errors_in_one_line():
            assert isinstance(config.filters, dict), "GenerateConfig has parsed it"
            where = push_generated(
                config.output_dir, config.generated_hub_id, filters=config.filters, private=config.generated_hub_private
            )
            print(f"Pushed to {where}")
    say(f"The texts are in {Path(config.output_dir, ACCEPTED)}. Train on them with --dataset_name {config.output_dir}")


COMMANDS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (train, "train a student on a teacher's distributions (token-level distillation)"),
    "generate": (generate, "have the teacher write completions and keep the good ones (sequence-level distillation)"),
    "capture": (capture, "run the teacher once and store what it says"),
    "inspect": (inspect, "what such a cache holds, whether it is whole, how true it is"),
}


def parse_train(argv: Sequence[str]) -> tuple[ScriptArguments, DistillationConfig, ModelConfig]:
    """TRL's three groups of options: defaults < `--config` YAML < command line. A YAML that sets `teacher_cache` may
    say for `capture` what is kept, which has no effect here.

    Raises:
        ValueError: an unknown key or flag (with the nearest known one), or a value that cannot be.
    """
    script, args, model, *_ = _parse(argv, "train")
    return script, args, model


def parse_capture(argv: Sequence[str]) -> tuple[ScriptArguments, DistillationConfig, ModelConfig, CaptureConfig]:
    """Those of `train` (so that its YAML serves here too), and what is kept. Raises as `parse_train`."""
    script, args, model, options = _parse(argv, "capture")
    return script, args, model, options


def parse_generate(argv: Sequence[str]) -> tuple[ScriptArguments, GenerateConfig]:
    """The dataset's options and those of `GenerateConfig`. Raises as `parse_train`."""
    from trl import ScriptArguments

    from llm_distill.generation.config import GenerateConfig

    script, config = _parse_groups(argv, "generate", (ScriptArguments, GenerateConfig))
    return script, config


def _parse(argv: Sequence[str], command: str) -> list[Any]:
    """What `train` and `capture` take."""
    from trl import ModelConfig, ScriptArguments

    from llm_distill.config import CaptureConfig, DistillationConfig

    groups = (ScriptArguments, DistillationConfig, ModelConfig)
    if command == "capture":
        return _parse_groups(argv, command, (*groups, CaptureConfig))
    return _parse_groups(argv, command, groups, with_cache=CaptureConfig)


def _parse_groups(
    argv: Sequence[str], command: str, groups: tuple[Any, ...], with_cache: type | None = None
) -> list[Any]:
    """One object for each group. A YAML that sets `teacher_cache` may have the options of `with_cache` too."""
    from trl import TrlParser

    argv = [part for given in argv for part in (given.split("=", 1) if given.startswith("--config=") else [given])]
    path = Path(argv[argv.index("--config") + 1]) if "--config" in argv[:-1] else None
    content = {} if path is None else _read_yaml(path)
    in_file_only = [with_cache] if with_cache is not None and content.get("teacher_cache") else []
    groups = (*groups, *in_file_only)
    parser = TrlParser(groups, prog=f"llm-distill {command}", exit_on_error=False)
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


def load_data(script: ScriptArguments, student: str | None = None) -> DatasetDict:
    """The dataset that `--dataset_name` means. Of a folder of generated texts, a student with the teacher's tokenizer
    gets the teacher's own tokens.

    Raises:
        ValueError: it cannot be loaded, or has no training split of that name.
    """
    from datasets import DatasetDict, load_dataset

    from llm_distill import corpus

    name = script.dataset_name
    if Path(name, "generation.json").is_file() and student is not None:
        from transformers import AutoTokenizer

        from llm_distill.generation.generate import load_generated

        return DatasetDict({script.dataset_train_split: load_generated(name, AutoTokenizer.from_pretrained(student))})
    kinds = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
    try:
        if name == corpus.NAME:
            data = corpus.load_corpus(max_characters=corpus.TRIAL_CHARACTERS)
        elif Path(name).is_file() and Path(name).suffix in kinds:
            data = load_dataset(kinds[Path(name).suffix], data_files=name, streaming=script.dataset_streaming)
        else:
            data = load_dataset(name, name=script.dataset_config, streaming=script.dataset_streaming)
    except (OSError, ValueError, ConnectionError) as error:
        raise ValueError(
            f"the dataset {name!r} cannot be loaded: it is no file, no folder with data, no repository that can be "
            f"reached, and not `{corpus.NAME}`. ({error})"
        ) from error
    if script.dataset_train_split not in data:
        raise ValueError(f"the dataset {name!r} has no split {script.dataset_train_split!r}, only {', '.join(data)}.")
    return DatasetDict(data) if not script.dataset_streaming else data


def _resumption(value: str | None) -> str | bool:
    """`--resume_from_checkpoint true` means the last one; otherwise it is a folder."""
    return {"none": False, "false": False, "true": True}.get(str(value).lower(), value or False)


if __name__ == "__main__":
    main()
