"""The command line: its options, where their values come from, its errors, and runs from folder to folder."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from commands import ROWS, as_flags, refused, write_rows
from datasets import Dataset
from launch import run_ranks
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

import llm_distill
from llm_distill import DistillationConfig, DistillationTrainer
from llm_distill.cli import COMMANDS, READER_IS_GONE, main
from llm_distill.cli.parsing import errors_in_one_line, parse
from llm_distill.cli.train import train
from llm_distill.data.load import load_data
from llm_distill.divergences import JSD
from llm_distill.losses.objective import Objective

RECIPES = Path(__file__).parents[2] / "recipes"
OUR_FIELDS = sorted({f.name for f in fields(DistillationConfig)} - {f.name for f in fields(SFTConfig)})
CHAT_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(tmp_path: Path, saved: Path) -> dict[str, Any]:
    """The options of a small run, as a YAML file would have them."""
    return {
        "model_name_or_path": str(saved / "student"),
        "teacher_model_name_or_path": str(saved / "teacher"),
        "dataset_name": write_rows(tmp_path / "data.jsonl", "text"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "max_length": 64,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }


def as_yaml(path: Path, options: dict[str, Any]) -> list[str]:
    path.write_text(yaml.safe_dump(options))
    return ["--config", str(path)]


def best_seconds(*command: str) -> float:
    def seconds() -> float:
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began

    return min(seconds() for _ in range(3))


def test_help_answers_at_once() -> None:
    assert best_seconds(str(Path(sys.executable).with_name("llm-distill")), "--help") < 1.5


def test_importing_the_package_costs_nothing() -> None:
    bare = best_seconds(sys.executable, "-c", "pass")
    assert best_seconds(sys.executable, "-c", "import llm_distill") < bare + 0.2
    heavy = "import sys, llm_distill; sys.exit(str({'torch', 'transformers', 'trl', 'numpy'} & {*sys.modules} or ''))"
    assert subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True).stderr.strip() == ""


@pytest.mark.parametrize("name", llm_distill.__all__)
def test_public_names_exist_are_documented_and_listed(name: str) -> None:
    public = getattr(importlib.import_module("llm_distill"), name)
    assert public.__doc__
    assert not public.__doc__.startswith(f"{name}("), "only the signature that dataclass makes"
    assert name in dir(llm_distill)


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="DistilTrainer"):
        _ = llm_distill.DistilTrainer


def shown_by(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_help_of_train_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    shown = "".join(shown_by(capsys, "train", "--help").split())
    explained = {f.name: f.metadata["help"] for f in fields(DistillationConfig) if f.name in OUR_FIELDS}
    assert "divergence" in explained
    for name, text in explained.items():
        assert f"--{name}" in shown
        assert "".join(text.split()) in shown, name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_and_whole_sentences(capsys: pytest.CaptureFixture[str], command: str) -> None:
    shown, example = shown_by(capsys, command, "--help").split("\nexample:\n")
    assert example.startswith(f"  llm-distill {command} ")
    texts = re.findall(r"^  \S.*\n((?: {6}.*\n)+)", shown, flags=re.MULTILINE)
    assert len(texts) == len(re.findall(r"^  \S", shown, flags=re.MULTILINE))
    for text in texts:
        assert re.search(r"\.( \(default: .*\))?$", " ".join(text.split())), text


def test_help_shows_our_headings_first_and_everything_else_when_asked(capsys: pytest.CaptureFixture[str]) -> None:
    headings = ["the teacher", "the objective", "the student's own text", "vLLM for the student"]
    headings += ["the student", "the data", "the run"]
    for command, own in (("train", []), ("check", ["this check"]), ("capture", ["what is stored"])):
        shown = shown_by(capsys, command, "--help")
        assert re.findall(r"^(\w[\w' ]+):$", shown, flags=re.MULTILINE) == ["options", *own, *headings, "example"]
        assert len(shown.splitlines()) < 400
        assert "--learning_rate X\n" in shown
        assert "--learning-rate" not in shown
        assert "--adam_beta1" not in shown
    everything = shown_by(capsys, "train", "--help-all")
    assert all(f"--{field.name} " in everything for field in fields(DistillationConfig) if field.init)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown_by(capsys, "--version") == f"llm-distill {llm_distill.__version__}\n"


def test_a_command_says_nothing_of_libraries_that_nobody_uses(tmp_path: Path, run: dict[str, Any]) -> None:
    """No kernel of bitsandbytes, no old name of an option, no accelerator that deepspeed had to guess."""
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    command = [sys.executable, "-m", "llm_distill.cli", "train", *as_flags(run)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
    for name in ("bitsandbytes", "kernels-community", "deepspeed", "checkpointing", "accelerator", "Warning"):
        assert name not in ended.stdout + ended.stderr, name


def test_defaults_give_way_to_the_file_and_the_file_to_the_command_line(
    tmp_path: Path, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "before")
    path = tmp_path / "run.yaml"
    lines = [
        "learning_rate: 1e-4",  # to YAML 1.1 a string
        "divergence: jsd",
        "divergence_kwargs: {beta: 1e-1}",
        "teacher_model_init_kwargs: {dtype: bfloat16}",
        "loss_temperature: 2",
        "env: {WANDB_PROJECT: from the file}",
        "lr_scheduler_kwargs: {min_lr: 1e-6}",
    ]
    path.write_text("\n".join([yaml.safe_dump(run), *lines]))
    script, args, model, _ = parse("train", ["--config", str(path)])
    assert (script.dataset_name, model.model_name_or_path) == (run["dataset_name"], run["model_name_or_path"])
    assert (args.learning_rate, args.divergence, args.loss_temperature, args.kd_weight) == (1e-4, "jsd", 2.0, 1.0)
    assert args.teacher_model_init_kwargs == {"dtype": "bfloat16"}
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert Objective.of(args).head.divergence == JSD(beta=0.1)
    assert os.environ["WANDB_PROJECT"] == "from the file"

    flags = {
        "learning_rate": "1e-3",
        "divergence_kwargs": '{"beta": 0.7}',
        "teacher_model_init_kwargs": '{"attn_implementation": "eager"}',
    }
    _, args, *_ = parse("train", [f"--config={path}", *as_flags(flags)])
    assert (args.learning_rate, args.divergence, args.divergence_kwargs) == (1e-3, "jsd", {"beta": 0.7})
    assert args.teacher_model_init_kwargs == {"attn_implementation": "eager"}


def test_the_yaml_of_a_capture_trains_from_its_cache(tmp_path: Path, run: dict[str, Any]) -> None:
    capture = {"cache_method": "sampled", "cache_kwargs": {"draws": 12}, "examples_per_shard": 64}
    both = as_yaml(tmp_path / "run.yaml", run | capture | {"teacher_cache": str(tmp_path / "cache")})
    assert parse("train", both)[1].teacher_cache == str(tmp_path / "cache")
    assert parse("capture", both)[3].cache_kwargs == {"draws": 12}
    with pytest.raises(ValueError, match="unknown option --cache_method on the command line"):
        parse("train", [*both, "--cache_method", "top_k"])
    with pytest.raises(ValueError, match=r"unknown option 'cache_kwargs' in .*run\.yaml"):
        parse("train", as_yaml(tmp_path / "run.yaml", run | capture))
    with pytest.raises(ValueError, match="unknown option 'cache_methods'"):
        parse("train", as_yaml(tmp_path / "run.yaml", run | {"teacher_cache": "x", "cache_methods": "top_k"}))


@pytest.mark.parametrize(
    ("in_file", "flags", "named"),
    [
        pytest.param({"divergance": "jsd"}, [], ["'divergance'", "'divergence'"], id="key"),
        pytest.param({}, ["--lerning_rate", "1"], ["--lerning_rate", "'learning_rate'"], id="flag"),
        pytest.param({}, ["--lerning-rate=1"], ["--lerning-rate", "'learning_rate'"], id="flag=value"),
        pytest.param({}, ["--learning_rate", "fast"], ["--learning_rate", "'fast'"], id="not a number"),
        pytest.param({"max_steps": "ten"}, [], ["--max_steps", "'ten'"], id="not a number in the file"),
        pytest.param({"divergence_kwargs": "half"}, [], ["divergence_kwargs", "'half'", "mapping"], id="not a mapping"),
        pytest.param({"divergence": "jds"}, [], ["'jds'", "'jsd'"], id="divergence"),
        pytest.param({"kd_weight": -1}, [], ["kd_weight=-1"], id="out of range"),
        pytest.param({"model_name_or_path": None}, [], ["--model_name_or_path", "missing"], id="no student"),
        pytest.param({"dataset_name": None}, [], ["--dataset_name", "missing"], id="no data"),
        pytest.param({"dataset_name": "no/such"}, [], ["'no/such'", "stdlib"], id="data that does not exist"),
        pytest.param({"dataset_train_split": "validation"}, [], ["'validation'", "only train"], id="split"),
        pytest.param({"eval_strategy": "epoch"}, [], ["eval_strategy", "'test'", "--dataset_test_split"], id="eval"),
        pytest.param({"model_name_or_path": "no/such"}, [], ["'no/such'", "student"], id="student that does not exist"),
        pytest.param({"resume_from_checkpoint": True}, [], ["no checkpoint in"], id="nothing to resume"),
    ],
)
def test_a_wrong_option_is_named_in_one_line(
    tmp_path: Path,
    run: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    in_file: dict[str, Any],
    flags: list[str],
    named: list[str],
) -> None:
    line = refused(capsys, train, [*as_yaml(tmp_path / "run.yaml", run | in_file), *flags])
    assert all(part in line for part in named), line
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize(
    "content",
    [
        None,
        "- learning_rate",
        "divergence: [jsd",
        "env: {LD_PRELOAD: /tmp/library.so}",
        "a: &a [1, 2]\nb: &b [*a, *a]\nlora_target_modules: [*b, *b]",
        200 * "[",
        "divergence: caf\udce9",
    ],
)
def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None
) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_text(content, errors="surrogateescape")
    assert str(path) in refused(capsys, train, ["--config", str(path)])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (ValueError("the text\nis too long"), 2, "llm-distill: error: the text is too long"),
        (KeyError("text"), 1, "llm-distill: unexpected KeyError: 'text'. With --traceback it says where it happened."),
        (KeyboardInterrupt(), 130, "llm-distill: interrupted."),
    ],
)
def test_whatever_ends_a_command_is_one_line_and_the_rest_comes_with_traceback(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    @errors_in_one_line
    def command(argv: Sequence[str]) -> None:
        assert argv == ["--fast"]
        raise error

    with pytest.raises(SystemExit) as caught:
        command(["--fast"])
    assert (caught.value.code, capsys.readouterr().err) == (status, f"{line}\n")
    with pytest.raises(type(error)):
        command(["--traceback", "--fast"])


@pytest.mark.parametrize("arguments", [["--help"], ["push", "--help"]])
def test_a_reader_that_has_seen_enough_ends_a_command_without_a_word(arguments: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    program = [sys.executable, "-m", "llm_distill.cli", *arguments]
    done = subprocess.run(program, env=environment, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (READER_IS_GONE, "")


@pytest.mark.parametrize("kind", ROWS)
def test_a_run_leaves_a_student_that_loads_and_a_card_without_local_paths(
    tmp_path: Path, saved: Path, run: dict[str, Any], kind: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved / "student")
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(tmp_path / "with template")
    AutoModelForCausalLM.from_pretrained(saved / "student").save_pretrained(tmp_path / "with template")
    run |= {"dataset_name": write_rows(tmp_path / "rows.jsonl", kind), "model_name_or_path": tmp_path / "with template"}
    train(as_flags(run))

    student = AutoModelForCausalLM.from_pretrained(run["output_dir"])
    tokenizer = AutoTokenizer.from_pretrained(run["output_dir"])
    ids = student.generate(**tokenizer("def f", return_tensors="pt"), max_new_tokens=3, do_sample=False)
    assert ids.shape[1] > len(tokenizer("def f").input_ids)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`teacher`" in card
    assert str(tmp_path) not in card
    assert str(saved) not in card


@pytest.mark.parametrize("suffix", ["folder", ".json", ".csv", ".parquet", ".txt"])
def test_data_may_be_a_folder_or_a_file(tmp_path: Path, run: dict[str, Any], suffix: str) -> None:
    path = tmp_path / ("texts" if suffix == "folder" else f"data{suffix}")
    rows = Dataset.from_list([{"text": "x = 1"}] * 3)
    if suffix == "folder":
        write_rows(path / "train.jsonl", "text")
        write_rows(path / "test.jsonl", "text")
    elif suffix == ".txt":
        path.write_text("x = 1\n" * 3)
    else:
        getattr(rows, f"to_{suffix[1:]}")(path)
    script, *_ = parse("train", as_flags(run | {"dataset_name": path}))
    data = load_data(script)
    assert set(data) == ({"train", "test"} if suffix == "folder" else {"train"})
    assert data["train"][0]["text"].strip() in ("x = 1", ROWS["text"]["text"])


def test_a_bad_row_of_a_stream_is_one_line_though_a_worker_meets_it(
    tmp_path: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "x = 1"}\n' * 5 + '{"text": null}\n')
    more = {
        "dataset_name": path,
        "dataset_streaming": True,
        "dataloader_num_workers": 1,
        "check": False,
        "max_steps": 9,
    }
    line = refused(capsys, train, as_flags(run | more))
    assert line.startswith("llm-distill: error: the train dataset, row 5: `text` is None, not a text.")


def test_a_part_of_a_split_is_named_as_datasets_names_it(tmp_path: Path, run: dict[str, Any]) -> None:
    for split in ("train", "test"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", "text")
    parts = {"dataset_train_split": "train[:50%]", "dataset_test_split": "test[2:5]"}
    script, *_ = parse("train", as_flags(run | {"dataset_name": tmp_path / "data", **parts}))
    data = load_data(script)
    assert (len(data["train[:50%]"]), len(data["test[2:5]"])) == (6, 3)
    assert len(load_data(replace(script, dataset_train_split="train[10:99]"))["train[10:99]"]) == 2
    with pytest.raises(ValueError, match="Unrecognized instruction format"):
        load_data(replace(script, dataset_train_split="train[few]"))


def test_stdlib_is_data_without_a_download(run: dict[str, Any]) -> None:
    script, *_ = parse("train", as_flags(run | {"dataset_name": "stdlib"}))
    data = load_data(script)
    assert len(data["train"]) > len(data["test"]) > 10
    assert not set(data["train"]["file"]) & set(data["test"]["file"])


def test_data_may_be_streamed(run: dict[str, Any]) -> None:
    script, *_ = parse("train", as_flags(run | {"dataset_streaming": True}))
    data = load_data(script)["train"]
    assert not isinstance(data, Dataset)
    assert next(iter(data)) == ROWS["text"]


def test_a_held_out_split_is_evaluated_and_its_figures_are_in_the_card(tmp_path: Path, run: dict[str, Any]) -> None:
    for split in ("train", "test"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", "prompt")
    train(as_flags(run | {"dataset_name": tmp_path / "data"}))
    figures = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert f"perplexity | {figures['eval_perplexity']:.4g}" in (tmp_path / "out" / "README.md").read_text()


def test_use_peft_leaves_an_adapter(tmp_path: Path, run: dict[str, Any]) -> None:
    train(as_flags(run | {"use_peft": True, "lora_r": 4, "lora_target_modules": "all-linear"}))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= names
    assert "model.safetensors" not in names
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()
    assert AutoPeftModelForCausalLM.from_pretrained(run["output_dir"]).peft_config["default"].r == 4


def test_a_run_goes_on_from_its_last_checkpoint_only_when_told_to(
    tmp_path: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run |= {"save_strategy": "steps", "save_steps": 1}
    train(as_flags(run))
    longer = run | {"max_steps": 3}
    line = refused(capsys, train, as_flags(longer))
    assert "checkpoint-2 is of an earlier run" in line
    assert "--resume_from_checkpoint true" in line

    train([*as_flags(longer), "--resume_from_checkpoint", "true"])
    history = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    assert history["global_step"] == 3
    assert not list((tmp_path / "out").rglob("training_args.bin"))


def test_the_recipe_takes_the_same_options(tmp_path: Path, run: dict[str, Any]) -> None:
    config = as_yaml(tmp_path / "run.yaml", run)
    run_ranks(RECIPES / "token_kl.py", *config, "--max_steps", "1")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.hidden_size == 16


@pytest.mark.parametrize("path", sorted((RECIPES / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_understands_every_configuration(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert config.distributed_type == yaml.safe_load(path.read_text())["distributed_type"]


def test_what_fails_at_the_end_leaves_the_student(
    tmp_path: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: DistillationTrainer) -> None:
        raise RuntimeError("a metric\nof somebody fails")

    monkeypatch.setattr(DistillationTrainer, "evaluate", fail)
    for split in ("train", "test"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", "text")
    with pytest.raises(SystemExit) as end:
        train(as_flags(run | {"dataset_name": tmp_path / "data"}))
    printed = capsys.readouterr()
    assert end.value.code == 1
    assert "RuntimeError: a metric of somebody fails" in printed.err.splitlines()[-1]
    assert f"The student is in {run['output_dir']}." in printed.out
    assert AutoModelForCausalLM.from_pretrained(run["output_dir"]).config.hidden_size == 16
    assert (tmp_path / "out" / "README.md").is_file()


def test_the_folder_is_looked_at_before_anything_is_loaded(
    tmp_path: Path, saved: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = run | {"model_name_or_path": str(tmp_path / "nowhere")}
    for name, named in (("teacher_model_name_or_path", "the teacher"), ("dataset_name", "is a file")):
        assert named in refused(capsys, train, as_flags(nowhere | {"output_dir": run[name]}))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").touch()
    assert "holds a model, config.json" in refused(capsys, train, as_flags(nowhere))
    with pytest.raises(SystemExit):
        main(["check", *as_flags(run)])
    assert "red      output folder" in capsys.readouterr().out
