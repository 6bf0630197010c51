"""The check before a run: what it says of good and bad ones, and that the run is then what it would have been."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from launch import run_ranks
from peft import LoraConfig, get_peft_model
from runs import copied_state, fill_cache, logged, make_trainer, save
from tiny import VOCAB, make_config, tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.cache.methods import TopK
from llm_distill.check.licences import check_licences
from llm_distill.check.report import Finding, Report
from llm_distill.cli.check import check
from llm_distill.cli.parsing import parse
from llm_distill.cli.train import train
from llm_distill.data.corpus import train_tokenizer

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def run(tmp_path: Path, texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The options of a run in which all is well: a teacher that is clearly better, both under a free licence."""
    texts.filter(lambda row: len(row["text"]) < 180).select(range(80)).to_json(tmp_path / "texts.jsonl")
    for role, spread in (("student", 0.5), ("teacher", 0.01)):
        save(tiny_llama(1, hidden=16, initializer_range=spread), tmp_path / role, tokenizer)
        licensed(tmp_path / role, "license: apache-2.0")
    return {
        "model_name_or_path": tmp_path / "student",
        "teacher_model_name_or_path": tmp_path / "teacher",
        "dataset_name": tmp_path / "texts.jsonl",
        "output_dir": tmp_path / "out",
        "max_steps": 1,
        "max_length": 128,
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
    }


def licensed(folder: Path, *lines: str) -> None:
    (folder / "README.md").write_text("\n".join(["---", *lines, "---", "# A model", ""]))


def checked(tmp_path: Path, run: dict[str, Any], status: int = 0) -> dict[str, Finding]:
    """What `llm-distill check` finds, by what it looked at."""
    path = tmp_path / "found.json"
    arguments = [part for name, value in (run | {"json": path}).items() for part in (f"--{name}", str(value))]
    if status:
        with pytest.raises(SystemExit) as caught:
            check(arguments)
        assert caught.value.code == status
    else:
        check(arguments)
    return {found["what"]: Finding(**found) for found in json.loads(path.read_text())}


@pytest.fixture
def writing(tmp_path: Path, run: dict[str, Any], texts: Dataset) -> dict[str, Any]:
    """The options of a run on what the student writes after prompts."""
    prompts = [{"prompt": text[:12]} for text in texts["text"] if len(text) > 12][:40]
    Dataset.from_list(prompts).to_json(tmp_path / "prompts.jsonl")
    return run | {"dataset_name": tmp_path / "prompts.jsonl", "on_policy_share": 1.0, "max_completion_length": 4}


def test_of_what_the_student_will_write_prompts_ends_time_and_memory_are_known(
    tmp_path: Path, writing: dict[str, Any]
) -> None:
    more = {"num_generations": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    found = checked(tmp_path, writing | more)
    assert found["prompts"].level == "green"
    assert "40, of" in found["prompts"].text
    assert "max_completion_length=4 after each" in found["prompts"].text
    assert "<|endoftext|>" in found["end tokens"].text
    assert "tokens a text" in found["written texts"].text
    assert "s of them writing" in found["time"].text
    assert found["loss"].level == "skipped"
    assert not {"what counts", "cut texts", "end of text"} & {*found}
    assert not any(finding.level == "red" for finding in found.values()), found
    larger = checked(tmp_path, writing | more | {"max_completion_length": 100})
    assert larger["memory"].text != found["memory"].text


def test_a_check_leaves_nothing_in_the_log_of_what_is_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    student, teacher = tiny_llama(1, hidden=16), LiveTeacher(tiny_llama(2), tokenizer)
    options = {"on_policy_share": 0.5, "max_completion_length": 4}
    trainer = make_trainer(tmp_path, tokenizer, student, teacher, **options)
    trainer.check()
    assert trainer.policy.log() == {}


def test_a_teacher_that_ends_texts_otherwise_than_the_student_is_amber(
    tmp_path: Path, writing: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "student", eos_token="x")
    student = tiny_llama(1, hidden=16, initializer_range=0.5)
    student.generation_config.eos_token_id = tokenizer.eos_token_id
    save(student, tmp_path / "student", tokenizer)
    finding = checked(tmp_path, writing)["end tokens"]
    assert finding.level == "amber"
    assert finding.text.startswith("x (student's); ")


def test_a_good_run_is_green(tmp_path: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    found = checked(tmp_path, run)
    assert {finding.level for finding in found.values()} == {"green"}, found
    assert {"student", "teacher", "tokenizers", "memory", "what counts", "cut texts", "end of text"} <= set(found)
    assert {"divergence", "loss", "time", "student's licence", "teacher's licence"} <= set(found)
    assert float(found["divergence"].text.split()[3]) < 1e-4
    assert "for 1 steps" in found["time"].text
    shown = capsys.readouterr().out
    assert "\033" not in shown, "colours are for terminals"
    assert shown.splitlines()[-1] == f"0 red, {len(found)} green"
    assert not list((tmp_path / "out").glob("*"))


def test_a_student_that_does_not_load_leaves_the_other_checks(tmp_path: Path, run: dict[str, Any]) -> None:
    found = checked(tmp_path, run | {"model_name_or_path": tmp_path / "nowhere"}, status=1)
    assert found["student"].level == "red"
    assert "nowhere" in found["student"].text
    assert found["student"].todo
    assert found["teacher"].level == found["data"].level == found["teacher's licence"].level == "green"


def test_a_folder_of_adapters_is_a_student(tmp_path: Path, run: dict[str, Any], tokenizer: Any) -> None:
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    save(get_peft_model(base, lora), tmp_path / "adapters", tokenizer)
    found = checked(tmp_path, run | {"model_name_or_path": tmp_path / "adapters"})
    assert "0.00 M of them trained" in found["student"].text
    assert found["memory"].level == "green"


def test_weights_that_are_missing_are_named(tmp_path: Path, run: dict[str, Any]) -> None:
    (tmp_path / "teacher" / "model.safetensors").unlink()
    found = checked(tmp_path, run, status=1)
    assert found["run"].level == "red"
    assert "model.safetensors" in found["run"].text
    assert found["student"].level == found["tokenizers"].level == "green"


def test_another_tokenizer_that_shall_not_be_aligned_is_red(
    tmp_path: Path, run: dict[str, Any], texts: Dataset
) -> None:
    train_tokenizer(texts.select(range(5)), 300).save_pretrained(tmp_path / "teacher")
    found = checked(tmp_path, run | {"teacher_alignment": "none"}, status=1)
    assert found["tokenizers"].level == "red"
    assert "sequence-level" in found["tokenizers"].text
    assert found["teacher"].level == found["memory"].level == "green"


def test_a_teacher_that_is_worse_is_amber_with_how_sure_that_is(tmp_path: Path, run: dict[str, Any]) -> None:
    student, teacher = run["teacher_model_name_or_path"], run["model_name_or_path"]
    loss = checked(tmp_path, run | {"model_name_or_path": student, "teacher_model_name_or_path": teacher})["loss"]
    assert loss.level == "amber"
    assert "the teacher is worse" in loss.text
    assert "±" in loss.text
    same = checked(tmp_path, run | {"teacher_model_name_or_path": run["model_name_or_path"]})["loss"]
    assert same.level == "amber"
    assert "not clearly better" in same.text


def test_data_in_which_all_is_masked_is_red(tmp_path: Path, run: dict[str, Any]) -> None:
    rows = [{"prompt": "def f(x): return " * 40, "completion": " 1"}] * 8
    Dataset.from_list(rows).to_json(tmp_path / "masked.jsonl")
    found = checked(tmp_path, run | {"dataset_name": tmp_path / "masked.jsonl", "max_length": 16}, status=1)
    assert found["run"].level == "red"
    assert found["data"].level == "green", "it loads"


def test_too_little_memory_is_red_before_anything_is_loaded(tmp_path: Path, run: dict[str, Any]) -> None:
    (tmp_path / "student" / "model.safetensors").unlink()
    found = checked(tmp_path, run | {"per_device_train_batch_size": 10**8}, status=1)
    assert found["memory"].level == "red"
    assert "gradient_accumulation_steps" in found["memory"].todo
    assert found["all else"].level == "skipped"


def test_texts_that_are_all_cut_teach_no_end(tmp_path: Path, run: dict[str, Any]) -> None:
    found = checked(tmp_path, run | {"max_length": 8})
    assert (found["end of text"].level, found["cut texts"].level) == ("amber", "amber")
    assert "will not learn to stop" in found["end of text"].text


def test_an_end_that_is_masked_is_told_from_one_that_is_missing(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    end = tokenizer.eos_token_id
    rows = [{"input_ids": [5, 6, 7, end], "labels": [5, 6, 7, -100]}] * 4
    trainer = DistillationTrainer(
        model=tiny_llama(1),
        teacher=LiveTeacher(tiny_llama(2), tokenizer),
        args=make_config(tmp_path / "out", dataset_kwargs={"skip_prepare_dataset": True}, max_length=None),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    found = by_name(trainer.check())["end of text"]
    assert found.level == "amber"
    assert "there 4 times and never counts, as where labels are masked by the padding token" in found.text


@pytest.mark.parametrize(
    ("student", "teacher", "level", "asked"),
    [
        ("license: llama3", "license: llama3", "green", ""),
        ("license: apache-2.0", "license: llama2", "red", "improve no other language model"),
        ("license: apache-2.0", "license: other\nlicense_name: tongyi-qianwen", "red", "improve no other"),
        ("license: apache-2.0", "license: llama3.1", "amber", "“Llama”"),
        ("license: mit", "license: other\nlicense_name: qwen-research", "amber", "no commercial use"),
        ("license: mit", "license: gemma", "amber", "derivative"),
        ("license: mit", "license: cc-by-nc-4.0", "amber", "no commercial use"),
        ("license: mit", "license: mit", "green", ""),
        ("license: mit", "license: other\nlicense_name: of-the-moon", "amber", "of-the-moon"),
        ("license: mit", "tags: [x]", "amber", "names none"),
    ],
)
def test_licences_say_what_they_ask(tmp_path: Path, student: str, teacher: str, level: str, asked: str) -> None:
    for name, said in (("student", student), ("teacher", teacher)):
        (tmp_path / name).mkdir()
        licensed(tmp_path / name, said)
    of_student, of_teacher = check_licences((str(tmp_path / "student"), None), [(str(tmp_path / "teacher"), None)])
    assert of_teacher.level == level
    assert asked in f"{of_teacher.text} {of_teacher.todo}"
    assert of_student.level == ("amber" if "llama3" in student else "green")


def test_a_licence_that_forbids_keeps_training_from_starting(
    tmp_path: Path, run: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    licensed(tmp_path / "teacher", "license: llama2")
    arguments = [part for name, value in run.items() for part in (f"--{name}", str(value))]
    with pytest.raises(SystemExit) as caught:
        train(arguments)
    assert caught.value.code == 1
    shown = capsys.readouterr()
    assert "teacher's licence  llama2" in shown.out
    assert "--check false" in shown.err
    assert not (tmp_path / "out" / "model.safetensors").exists()
    train([*arguments, "--check", "false"])
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_without_a_network_the_hub_is_skipped_and_said() -> None:
    found = list(check_licences(("Qwen/Qwen2.5-0.5B", None), [("Qwen/Qwen2.5-7B", None)]))
    assert [finding.level for finding in found] == ["skipped", "skipped"]
    assert all("Hub cannot be reached" in finding.text for finding in found)


@pytest.mark.parametrize(
    ("options", "lora"),
    [
        pytest.param({}, False, id="full"),
        pytest.param({"activation_checkpointing": True, "bf16": True}, True, id="lora, bf16, checkpointing"),
        pytest.param({"ce_weight": 0.5, "gradient_accumulation_steps": 2}, False, id="accumulation"),
        pytest.param({"teacher_adapters_off": True, "ce_weight": 1.0}, True, id="adapters off"),
    ],
)
def test_training_after_a_check_is_bit_for_bit_what_it_would_have_been(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], lora: bool
) -> None:
    results = []
    for is_checked in (False, True):
        teacher = None if "teacher_adapters_off" in options else LiveTeacher(tiny_llama(2), tokenizer)
        trainer = make_trainer(
            tmp_path / str(is_checked),
            tokenizer,
            tiny_llama(1, attention_dropout=0.3),
            teacher,
            peft_config=LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.2) if lora else None,
            **({"train_sampling_strategy": "random", "max_steps": 3} | options),
        )
        if is_checked:
            report = trainer.check()
            assert not report.is_red, str(report)
            assert all(parameter.grad is None for parameter in trainer.model.parameters())
        trainer.train()
        results.append((copied_state(trainer.model), logged(trainer, "kd"), torch.rand(3)))
    (weights, losses, random), (weights_checked, losses_checked, random_checked) = results
    assert losses == losses_checked
    assert torch.equal(random, random_checked)
    for name, weight in weights.items():
        assert torch.equal(weight, weights_checked[name]), name


def by_name(report: Report) -> dict[str, Finding]:
    return {finding.what: finding for finding in report.findings}


def test_a_stored_teacher_is_not_compared_and_that_is_said(
    tmp_path: Path, config: Callable[..., DistillationConfig], tokenizer: PreTrainedTokenizerBase, texts: Dataset
) -> None:
    def trainer(teacher: Any, **options: Any) -> DistillationTrainer:
        return DistillationTrainer(
            model=tiny_llama(1),
            teacher=teacher,
            args=config(**options),
            train_dataset=texts.select(range(16)),
            processing_class=tokenizer,
        )

    fill_cache(trainer(LiveTeacher(tiny_llama(2), tokenizer)), tmp_path / "signals", TopK(8))
    found = by_name(trainer(None, teacher_cache=str(tmp_path / "signals")).check())
    assert (found["teacher"].level, found["loss"].level) == ("green", "skipped")
    assert "a part of its distribution" in found["loss"].text
    assert found["time"].level == "green"


@pytest.mark.parametrize("kind", ["stream", "packed", "text alone"])
def test_other_kinds_of_runs_are_checked(
    config: Callable[..., DistillationConfig], tokenizer: PreTrainedTokenizerBase, texts: Dataset, kind: str
) -> None:
    data, teacher, options = texts.select(range(32)), LiveTeacher(tiny_llama(2), tokenizer), {}
    if kind == "stream":
        data = data.to_iterable_dataset()
    elif kind == "packed":
        options = {"packing": True}
    else:
        teacher, options = None, {"kd_weight": 0.0, "ce_weight": 1.0}
    found = by_name(
        DistillationTrainer(
            model=tiny_llama(1), teacher=teacher, args=config(**options), train_dataset=data, processing_class=tokenizer
        ).check()
    )
    assert not any(finding.level == "red" for finding in found.values()), found
    assert found["time"].level == found["what counts"].level == "green"
    assert found["loss"].level == ("skipped" if kind == "text alone" else "amber")
    assert ("divergence" in found) == (kind != "text alone")


def test_two_ranks_look_together_and_one_speaks(tmp_path: Path, run: dict[str, Any]) -> None:
    arguments = [part for name, value in run.items() for part in (f"--{name}", str(value))]
    output = run_ranks(RECIPES / "token_kl.py", *arguments, ranks=2)
    assert output.count("teacher's licence") == 1
    assert "in 64 texts count" in output
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("command", ["train", "check", "capture"])
def test_a_yaml_may_say_whether_training_starts_with_a_check(tmp_path: Path, run: dict[str, Any], command: str) -> None:
    options = {name: str(value) if isinstance(value, Path) else value for name, value in run.items()}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(options | {"check": False}))
    arguments = ["--config", str(tmp_path / "run.yaml")]
    assert parse(command, arguments)[1].max_steps == 1
    assert not parse("train", arguments)[3].check
    assert parse("train", [*arguments, "--check", "true"])[3].check
    if command != "train":
        with pytest.raises(ValueError, match="unknown option --check on the command line"):
            parse(command, [*arguments, "--check", "false"])


def test_help_explains_with_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        check(["--help"])
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "llm-distill check --config run.yaml" in shown
    assert "before its first step" in shown


def test_the_report_is_coloured_where_it_is_seen() -> None:
    report = Report((Finding("red", "memory", "too little", "less"), Finding("green", "time", "1 s")))
    assert report.is_red
    assert "\033[31mred" in report.as_text(coloured=True)
    assert "\033" not in str(report)
    assert str(report).splitlines()[1].strip() == "→ less"


def test_mass_past_the_vocabulary_is_told(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """A student from scratch whose matrix has rows that no token has gives them their share."""
    padded = tiny_llama(1, hidden=16, vocab_size=VOCAB + 64)
    found = by_name(make_trainer(tmp_path, tokenizer, padded, LiveTeacher(tiny_llama(2), tokenizer)).check())
    assert found["vocabulary"].level == "amber"
    assert "of its mass to rows of its matrix that no token has" in found["vocabulary"].text
    fitting = tiny_llama(1, hidden=16)
    assert "vocabulary" not in by_name(
        make_trainer(tmp_path, tokenizer, fitting, LiveTeacher(tiny_llama(2), tokenizer)).check()
    )
