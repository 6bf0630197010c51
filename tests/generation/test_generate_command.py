"""`llm-distill generate`: killed, on two ranks, twice at once, and with options that cannot be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset

from llm_distill.generation.run import ACCEPTED


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
import llm_distill.trainer, llm_distill.generation.engines.choose, transformers, datasets
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
        assert "another run is writing into" in second.stderr
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
