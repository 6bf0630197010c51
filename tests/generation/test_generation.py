"""The teacher writes: as transformers' own `generate` would, each prompt once, whatever happens on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, load_dataset
from runs import save
from tiny import make_config, tiny_llama
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.generation import Prompt, Sampling, TransformersEngine, generate, load_generated, make_filters
from llm_distill.generation import prompts_of as read_prompts
from llm_distill.generation.engines import Answer, Engine
from llm_distill.generation.generate import ACCEPTED, REJECTED
from llm_distill.generation.store import Entries

GREEDY = Sampling(max_new_tokens=6, temperature=0)
ENDS = [0, 2]
"""The tokenizer's, and the one that the model's configuration names."""
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def teacher(saved: Path) -> LiveTeacher:
    return LiveTeacher.load(str(saved / "teacher"))


@pytest.fixture(scope="module")
def prompts(texts: Dataset) -> list[Prompt]:
    return list(read_prompts({"prompt": text[: 5 + 3 * n], "line": n} for n, text in enumerate(texts["text"][:9])))


def alone(teacher: LiveTeacher, prompt: Prompt, **how: Any) -> list[list[int]]:
    """What `generate` writes after this prompt when it is asked nothing else."""
    inputs = teacher.tokenizer(prompt.content, return_tensors="pt")
    config = GenerationConfig(eos_token_id=ENDS, pad_token_id=0, max_new_tokens=6, do_sample=False, **how)
    with torch.no_grad():
        output = teacher.model.generate(**inputs, generation_config=config)
    written = output[:, inputs["input_ids"].shape[1] :].tolist()
    ends = [next((n for n, token in enumerate(ids) if token in ENDS), len(ids)) for ids in written]
    return [ids[: end + 1] for ids, end in zip(written, ends, strict=True)]


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"continuous": True}], ids=str)
def test_batches_write_what_each_prompt_alone_would_get(
    teacher: LiveTeacher, prompts: list[Prompt], options: dict[str, Any]
) -> None:
    answers = {a.prompt.id: a for a in TransformersEngine(teacher, GREEDY, **options).write(prompts)}
    assert len(answers) == len(prompts)
    for prompt in prompts:
        (completion,) = answers[prompt.id].completions
        assert [completion.ids] == alone(teacher, prompt)
        assert completion.tokens == len(completion.ids)
        assert completion.finished == (completion.ids[-1] in ENDS)


def test_beams_are_those_of_transformers(teacher: LiveTeacher, prompts: list[Prompt]) -> None:
    sampling = Sampling(num_completions=2, num_beams=3, temperature=0, max_new_tokens=6)
    for answer in TransformersEngine(teacher, sampling, batch_size=4).write(prompts):
        expected = alone(teacher, answer.prompt, num_beams=3, num_return_sequences=2)
        assert [completion.ids for completion in answer.completions] == expected


def test_the_checkpoints_own_way_to_sample_does_not_matter(teacher: LiveTeacher, prompts: list[Prompt]) -> None:
    engine = TransformersEngine(teacher, GREEDY)
    before = [answer.completions for answer in engine.write(prompts)]
    own = teacher.model.generation_config
    own.repetition_penalty, own.min_new_tokens = 5.0, 6
    try:
        assert [answer.completions for answer in engine.write(prompts)] == before
    finally:
        own.repetition_penalty, own.min_new_tokens = None, None


def test_sampling_draws_from_the_teacher(teacher: LiveTeacher) -> None:
    (prompt,) = read_prompts([{"prompt": "import "}])
    sampling = Sampling(num_completions=3000, max_new_tokens=1)
    (answer,) = TransformersEngine(teacher, sampling).write([prompt])
    ids = teacher.tokenizer(prompt.content, return_tensors="pt")
    with torch.no_grad():
        p = teacher.model(**ids).logits[0, -1].softmax(-1)
    drawn = torch.bincount(torch.tensor([each.ids[0] for each in answer.completions]), minlength=len(p)) / 3000
    assert float((drawn - p).abs().sum()) < 1.5 * float((p * (1 - p) / 3000).sqrt().sum())


def test_a_run_can_be_repeated(teacher: LiveTeacher, prompts: list[Prompt]) -> None:
    def texts(seed: int) -> list[str]:
        engine = TransformersEngine(teacher, Sampling(max_new_tokens=6, seed=seed))
        return [answer.completions[0].text for answer in engine.write(prompts)]

    assert texts(1) == texts(1) != texts(2)


def test_mean_log_prob_is_the_teachers(teacher: LiveTeacher, prompts: list[Prompt]) -> None:
    sampling = Sampling(num_completions=2, max_new_tokens=6)
    for answer in TransformersEngine(teacher, sampling, batch_size=4, score=True).write(prompts):
        for completion in answer.completions:
            ids = torch.tensor([answer.prompt_ids + completion.ids])
            with torch.no_grad():
                log_p = teacher.model(ids).logits[0].double().log_softmax(-1)
            start = len(answer.prompt_ids)
            each = [float(log_p[start + n - 1, token]) for n, token in enumerate(completion.ids)]
            assert completion.mean_log_prob == pytest.approx(sum(each) / len(each), abs=1e-5)


def test_conversations_go_through_the_chat_template(saved: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved / "teacher")
    chat = [{"role": "user", "content": "def f"}, {"role": "assistant", "content": "gold answer"}]
    (prompt,) = read_prompts([{"messages": chat}], system_prompt="be brief")
    assert [message["role"] for message in prompt.content] == ["system", "user"]
    engine = TransformersEngine(LiveTeacher(tiny_llama(2), tokenizer), GREEDY)
    with pytest.raises(ValueError, match="no chat template: it is a base model"):
        list(engine.write([prompt]))
    tokenizer.chat_template = TEMPLATE
    (answer,) = engine.write([prompt])
    assert tokenizer.decode(answer.prompt_ids) == "<system>be brief<user>def f<assistant>"


def test_a_run_leaves_texts_with_where_they_come_from(
    teacher: LiveTeacher, prompts: list[Prompt], tmp_path: Path
) -> None:
    sampling = Sampling(num_completions=2, max_new_tokens=6)
    report = generate(
        TransformersEngine(teacher, sampling), prompts, tmp_path / "run", sampling, tokenizer=teacher.tokenizer
    )
    assert (report.prompts, report.written, report.accepted, report.complete) == (9, 18, 18, True)
    data = load_dataset("parquet", data_files=str(tmp_path / "run" / ACCEPTED))["train"]
    assert [row["prompt"] for row in data] == [prompt.content for prompt in prompts for _ in range(2)]
    assert [row["line"] for row in data][:4] == [0, 0, 1, 1]
    assert {row["teacher"] for row in data} == {"teacher"}
    settings = json.loads((tmp_path / "run" / "generation.json").read_text())
    assert settings["teacher"] == teacher.describe()
    assert settings["sampling"]["temperature"] == 1.0
    assert str(tmp_path) not in json.dumps(settings)


def test_the_students_labels_are_the_teachers_tokens(
    teacher: LiveTeacher, prompts: list[Prompt], tmp_path: Path, saved: Path
) -> None:
    generate(TransformersEngine(teacher, GREEDY), prompts, tmp_path / "run", GREEDY, tokenizer=teacher.tokenizer)
    data = load_generated(tmp_path / "run", AutoTokenizer.from_pretrained(saved / "student"))
    for row, prompt in zip(data, prompts, strict=True):
        learned = [label for label in row["labels"] if label != -100]
        assert [learned] == alone(teacher, prompt)
        assert row["input_ids"] == teacher.tokenizer(prompt.content)["input_ids"] + learned


def test_another_tokenizer_gets_the_text(
    teacher: LiveTeacher, prompts: list[Prompt], tmp_path: Path, texts: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    from llm_distill.data.corpus import train_tokenizer

    generate(TransformersEngine(teacher, GREEDY), prompts, tmp_path / "run", GREEDY, tokenizer=teacher.tokenizer)
    data = load_generated(tmp_path / "run", train_tokenizer(texts, 300))
    assert data.column_names == ["prompt", "completion"]
    assert "cut off by max_new_tokens" in caplog.text


@pytest.mark.parametrize(
    "weights", [{"kd_weight": 0.0, "ce_weight": 1.0}, {"kd_weight": 1.0, "ce_weight": 0.5}], ids=str
)
def test_a_student_learns_from_the_texts(
    teacher: LiveTeacher, prompts: list[Prompt], tmp_path: Path, saved: Path, weights: dict[str, float]
) -> None:
    generate(TransformersEngine(teacher, GREEDY), prompts, tmp_path / "run", GREEDY, tokenizer=teacher.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(saved / "student")
    trainer = DistillationTrainer(
        str(saved / "student"),
        str(saved / "teacher") if weights["kd_weight"] else None,
        make_config(tmp_path / "out", max_steps=8, **weights),
        train_dataset=load_generated(tmp_path / "run", tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


class Counting(Engine):
    """Real answers by another engine; remembers what it was asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.asked = engine, []

    def describe(self) -> dict[str, Any]:
        return self.engine.describe()

    def write(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        self.asked += [prompt.id for prompt in prompts]
        yield from self.engine.write(prompts)


def test_what_is_there_is_not_written_again(teacher: LiveTeacher, prompts: list[Prompt], tmp_path: Path) -> None:
    engine, folder = Counting(TransformersEngine(teacher, GREEDY)), tmp_path / "run"
    generate(engine, prompts[:5], folder, GREEDY)
    report = generate(engine, prompts, folder, GREEDY, filters=make_filters({"length": {"min_tokens": 6}}))
    assert engine.asked == [prompt.id for prompt in prompts]
    assert report.rejected["length"] + report.accepted == report.written == 9


def test_rejected_texts_are_kept_with_the_reason(teacher: LiveTeacher, prompts: list[Prompt], tmp_path: Path) -> None:
    chosen = {"length": {"min_tokens": 7}, "finished": {}}
    report = generate(
        TransformersEngine(teacher, GREEDY), prompts, tmp_path / "run", GREEDY, filters=make_filters(chosen)
    )
    assert report.accepted == 0
    rows = load_dataset("parquet", data_files=str(tmp_path / "run" / REJECTED))["train"]
    assert set(rows["reason"]) == {"length"}
    with pytest.raises(ValueError, match="no accepted text to train on"):
        load_generated(tmp_path / "run")


def test_a_prompt_that_does_not_fit_is_left_out_and_counted(teacher: LiveTeacher, tmp_path: Path) -> None:
    prompts = list(read_prompts([{"prompt": "x = 1"}, {"prompt": "abc " * 200}]))
    report = generate(TransformersEngine(teacher, GREEDY), prompts, tmp_path / "run", GREEDY)
    assert report.written == 1
    assert report.unanswered == {"with 6 new tokens longer than the teacher's context of 128": 1}
    with pytest.raises(ValueError, match="no prompt was answered: with 6 new tokens longer"):
        generate(TransformersEngine(teacher, GREEDY), prompts[1:], tmp_path / "other", GREEDY)


def test_a_torn_line_is_asked_again_and_a_changed_one_is_found(
    teacher: LiveTeacher, prompts: list[Prompt], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    generate(TransformersEngine(teacher, GREEDY), prompts, folder, GREEDY)
    (journal,) = folder.glob("journal-*.jsonl")
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-7])
    assert len(Entries(folder)) == 8
    engine = Counting(TransformersEngine(teacher, GREEDY))
    assert generate(engine, prompts, folder, GREEDY).complete
    assert len(engine.asked) == 1
    journal.write_bytes(whole.replace(b"completions", b"complexions", 1))
    with pytest.raises(ValueError, match=r"journal-\w+\.jsonl is damaged at byte 0"):
        Entries(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: (LiveTeacher(tiny_llama(7), t.tokenizer), GREEDY), r"teacher\.weights: the folder has"),
        (lambda t: (t, Sampling(max_new_tokens=7, temperature=0)), r"sampling\.max_new_tokens: the folder has 6"),
    ],
    ids=["teacher", "sampling"],
)
def test_a_folder_of_another_configuration_is_refused(
    teacher: LiveTeacher, prompts: list[Prompt], tmp_path: Path, change: Any, message: str
) -> None:
    generate(TransformersEngine(teacher, GREEDY), prompts[:2], tmp_path / "run", GREEDY)
    other, sampling = change(teacher)
    with pytest.raises(ValueError, match=message):
        generate(TransformersEngine(other, sampling), prompts, tmp_path / "run", sampling)


def test_strange_folders_and_empty_data_are_refused(
    teacher: LiveTeacher, prompts: list[Prompt], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    engine = TransformersEngine(teacher, GREEDY)
    with pytest.raises(ValueError, match=r"has other things in it: thesis\.tex"):
        generate(engine, prompts, tmp_path, GREEDY)
    with pytest.raises(ValueError, match="there are no prompts"):
        generate(engine, [], tmp_path / "new", GREEDY)
    with pytest.raises(ValueError, match="is not a folder of generated texts"):
        load_generated(tmp_path)


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"text": "a"}], {}, "whole texts and no prompts: --prompt_tokens 32"),
        ([{"a": "b"}], {}, "no column .* only a"),
        ([{"prompt": 3}], {}, "row 0 has no prompt in 'prompt'"),
        ([{"prompt": "  "}], {}, "row 0 has no prompt"),
        ([{"messages": [{"role": "system", "content": "x"}]}], {}, "in which no user asks"),
        ([{"prompt": "a"}], {"column": "b"}, "no column 'b'"),
    ],
    ids=str,
)
def test_data_without_prompts_is_refused(rows: list[dict[str, Any]], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(read_prompts(rows, **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_completions": 0}, "num_completions must be at least 1"),
        ({"temperature": -1.0}, "must not be negative"),
        ({"temperature": 0, "top_p": 0.9}, "without effect here"),
        ({"num_beams": 2}, "set sampling_temperature=0"),
        ({"num_completions": 2, "temperature": 0}, "the same text each time"),
    ],
    ids=str,
)
def test_sampling_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**options)


def run_command(saved: Path, folder: Path, *options: str, launch: Sequence[str] = ()) -> list[str]:
    program = [*launch, "-m", "llm_distill.cli"] if launch else [sys.executable, "-m", "llm_distill.cli"]
    return [
        *(*program, "generate", "--dataset_name", "stdlib", "--prompt_tokens", "8", "--max_prompts", "200"),
        *("--max_new_tokens", "12", "--batch_size", "4", "--filters", "{length: {}}", "--output_dir", str(folder)),
        *("--teacher_model_name_or_path", str(saved / "teacher"), *options),
    ]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    data = load_dataset("parquet", data_files=str(folder / ACCEPTED), cache_dir=str(folder / ".datasets"))["train"]
    return [{name: row[name] for name in ("prompt", "completion", "completion_ids", "sample")} for row in data]


def test_killed_runs_end_in_the_texts_of_one_that_was_not(saved: Path, tmp_path: Path) -> None:
    """Greedy, so that texts do not depend on batches. Twenty kills at random moments while it writes."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    greedy = ("--sampling_temperature", "0", "--batch_size", "2", "--max_new_tokens", "24")
    subprocess.run(run_command(saved, whole, *greedy), check=True, capture_output=True)
    script = f"""
import os, random, signal, sys, threading, time
from llm_distill.cli import main
import llm_distill.trainer, llm_distill.generation.choose, transformers, datasets
for kill in range(20):
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        sys.stdout = sys.stderr = open(os.devnull, "w")
        main({run_command(saved, killed, *greedy)[3:]!r})
        os._exit(0)
    journals = lambda: sum(p.stat().st_size for p in __import__("pathlib").Path({str(killed)!r}).glob("journal-*"))
    before, end = journals(), time.monotonic() + 60
    while journals() == before and time.monotonic() < end and os.waitpid(child, os.WNOHANG)[0] == 0:
        time.sleep(0.002)
    time.sleep(random.Random(kill).random() * 0.03)
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
    journals = list(killed.glob("journal-*"))
    assert len(journals) >= 8, "each run that wrote has a journal of its own"
    subprocess.run(run_command(saved, killed, *greedy), check=True, capture_output=True)
    assert rows_of(killed) == rows_of(whole)
    ids = [
        json.loads(line.split(b" ", 1)[1])["prompt_id"]
        for p in journals
        for line in p.read_bytes().splitlines(True)
        if line.endswith(b"\n")
    ]
    assert len(ids) == len(set(ids)), "no prompt was answered twice"


def test_two_ranks_share_the_prompts(saved: Path, tmp_path: Path) -> None:
    greedy = ("--sampling_temperature", "0")
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(run_command(saved, one, *greedy), check=True, capture_output=True)
    config = Path(__file__).parents[2] / "recipes" / "accelerate" / "cpu.yaml"
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--config_file", str(config)]
    subprocess.run(run_command(saved, two, *greedy, launch=launch), check=True, capture_output=True)
    assert rows_of(two) == rows_of(one)
    fewer, more = sorted(len(path.read_bytes().splitlines()) for path in two.glob("journal-*"))
    assert more - fewer <= 1


def test_a_second_run_in_the_same_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    command = run_command(saved, tmp_path / "run", "--batch_size", "1")
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while not list((tmp_path / "run").glob("journal-*")):
            assert first.poll() is None
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGSTOP)
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert "another run is generating into" in second.stderr
        assert "Traceback" not in second.stderr
    finally:
        first.kill()
        first.wait()


def test_the_command_filters_and_trains(saved: Path, tmp_path: Path, texts: Dataset) -> None:
    """generate, then train on its folder, as the README says."""
    from llm_distill.cli import main

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": text[:20]}) for text in texts["text"][:8]))
    generated = f"--dataset_name {prompts} --teacher_model_name_or_path {saved}/teacher --num_completions 2"
    generated += f" --max_new_tokens 8 --output_dir {tmp_path}/generated"
    main(["generate", *generated.split(), "--filters", "{log_prob: {min: -9}, repetition: {}}"])
    trained = f"--model_name_or_path {saved}/student --dataset_name {tmp_path}/generated --kd_weight 0 --ce_weight 1"
    trained += f" --max_steps 2 --output_dir {tmp_path}/out --bf16 false --report_to none --save_strategy no"
    main(["train", *trained.split()])
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--filters {finnished: {}}", "unknown filter 'finnished'"),
        ("--filters {length: {min: 3}}", "does not take"),
        ("--filters {majority: {}}", "needs three votes or more"),
        ("--filters {verifier: {check: nowhere.py:f}}", "no function 'nowhere.py:f'"),
        ("--engine vllm", "without effect here, so refused: batch_size (engine is vllm)"),
        ("--engine endpoint", "needs its endpoint_url"),
        ("--concurrency 3", "without effect here, so refused: concurrency"),
        ("--budget 3", "without effect here, so refused: budget"),
        ("--num_beams 2 --continuous_batching true --sampling_temperature 0", "does not go with beams"),
        ("--max_promts 3", "Did you mean 'max_prompts'"),
        ("--generated_hub_private true", "there is no generated_hub_id"),
        ("--batch_size 0", "batch_size must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(
    saved: Path, tmp_path: Path, options: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from llm_distill.cli import main

    words = options.split(" ", 1) if "{" in options else options.split()
    with pytest.raises(SystemExit):
        main(run_command(saved, tmp_path / "run", *words)[3:])
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_teacher_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = save(tiny_llama(2), tmp_path / "bare")
    with pytest.raises(ValueError, match="came without a tokenizer"):
        TransformersEngine(LiveTeacher.load(str(folder)), GREEDY)


def test_pad_and_end_may_be_the_same(teacher: LiveTeacher, tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    engine = TransformersEngine(teacher, GREEDY)
    assert engine.completion([5, 6, 0, 0, 0], {0}).ids == [5, 6, 0]
    assert engine.completion([5, 6, 7], {0}) == engine.completion([5, 6, 7], {0})._replace(finished=False)
