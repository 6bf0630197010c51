"""`llm-distill generate`: killed, on two ranks, twice at once, and with options that cannot be."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from launch import run_ranks
from warm import run_python, warm_process

from llm_distill.generation.run import ACCEPTED


def command(saved: Path, folder: Path, *options: str) -> list[str]:
    """What Python is given."""
    return [
        *("-m", "llm_distill.cli", "generate", "--dataset_name", "stdlib", "--prompt_tokens", "8"),
        *("--max_prompts", "200", "--max_new_tokens", "12", "--batch_size", "4", "--filters", "{length: {}}"),
        *("--output_dir", str(folder), "--teacher_model_name_or_path", str(saved / "teacher"), *options),
    ]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    data = load_dataset("parquet", data_files=str(folder / ACCEPTED), cache_dir=str(folder / ".datasets"))["train"]
    return [{name: row[name] for name in ("prompt", "completion", "completion_ids", "sample")} for row in data]


@pytest.mark.parametrize("kills", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_runs_end_in_the_texts_of_one_that_was_not(saved: Path, tmp_path: Path, kills: int) -> None:
    """Greedy, so that texts do not depend on batches. Killed at random moments while it writes."""
    whole, killed, place = tmp_path / "whole", tmp_path / "killed", random.Random(0)
    greedy = ("--sampling_temperature", "0", "--batch_size", "2", "--max_new_tokens", "24")
    run_python(*command(saved, whole, *greedy))

    def written() -> int:
        return sum(path.stat().st_size for path in killed.glob("journal-*"))

    for _ in range(kills):
        before, program = written(), warm_process().start(*command(saved, killed, *greedy))
        while written() == before and program.poll() is None:
            time.sleep(0.002)
        time.sleep(place.random() * 0.03)
        program.kill()
    journals = list(killed.glob("journal-*"))
    assert len(journals) >= 0.4 * kills, "each run that wrote has a journal of its own"
    run_python(*command(saved, killed, *greedy))
    assert rows_of(killed) == rows_of(whole)
    ids = [
        json.loads(line.split(b" ", 1)[1])["prompt_id"]
        for path in journals
        for line in path.read_bytes().splitlines(True)
        if line.endswith(b"\n")
    ]
    assert len(ids) == len(set(ids)), "no prompt was answered twice"


def test_two_ranks_share_the_prompts(saved: Path, tmp_path: Path) -> None:
    greedy = ("--sampling_temperature", "0")
    one, two = tmp_path / "one", tmp_path / "two"
    run_python(*command(saved, one, *greedy))
    run_ranks(*command(saved, two, *greedy), ranks=2)
    assert rows_of(two) == rows_of(one)
    fewer, more = sorted(len(path.read_bytes().splitlines()) for path in two.glob("journal-*"))
    assert more - fewer <= 1


def test_a_second_run_in_the_same_folder_is_refused(saved: Path, tmp_path: Path) -> None:
    both = command(saved, tmp_path / "run", "--batch_size", "1")
    first = warm_process().start(*both)
    try:
        while not list((tmp_path / "run").glob("journal-*")):
            assert first.poll() is None
            time.sleep(0.05)
        os.kill(first.pid, signal.SIGSTOP)
        second = warm_process().start(*both)
        assert second.wait() == 2
        assert "another run is writing into" in second.errors()
        assert "Traceback" not in second.errors()
    finally:
        first.kill()


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
        main(command(saved, tmp_path / "run", *words)[2:])
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
