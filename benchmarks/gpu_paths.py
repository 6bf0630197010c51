"""What runs on a GPU alone, or in another way there: parts `paths`, `sharded` and `memory` of `gpu.py`.

A run is five steps of `DistillationTrainer` on real text, with models of a few layers, from folders, as a person has
them. "Difference" is the largest relative one of its steps' losses, and of the evaluation's after them, from those of
another run.
"""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import in_fresh_process, synchronize

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

Outcome = tuple[dict[str, Any], dict[str, tuple[float, float]]]
Check = Callable[[], Outcome]

OPTIONS = {
    "max_steps": 5,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "learning_rate": 1e-3,
    "ce_weight": 0.5,
    "lr_scheduler_type": "constant",
    "train_sampling_strategy": "sequential",
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "report_to": "none",
    "disable_tqdm": True,
    "save_strategy": "no",
}


NOT_IN_SHORT = (
    *("float32 beside float32 on the CPU", "divergence jsd at T = 2, bfloat16 beside float32 on the CPU"),
    *("accumulation over 2 micro-batches", "packed", "cache of likely tokens"),
)


def path_checks(device: str, short: bool) -> dict[str, Check]:
    base = {"device": device, "short": short}
    same = {"bf16": True}
    checks = {
        "a stopwatch of events": functools.partial(stopwatch, device),
        "float32 beside float32 on the CPU": functools.partial(beside, base, "cpu", 1e-3, bf16=False),
        "bfloat16 beside float32 on the CPU": functools.partial(beside, base, "cpu", 2e-2, **same),
        "divergence jsd at T = 2, bfloat16 beside float32 on the CPU": functools.partial(
            beside, base, "cpu", 2e-2, **same, divergence="jsd", loss_temperature=2.0
        ),
        "student and teacher with a device_map": functools.partial(
            beside, base, device, 1e-3, **same, **device_maps(device)
        ),
        "accumulation over 2 micro-batches": functools.partial(
            beside, base, device, 1e-2, **same, per_device_train_batch_size=4, gradient_accumulation_steps=2
        ),
        "packed": functools.partial(packed, base),
        "teacher in 4 bits": functools.partial(teacher_in_4_bits, base),
        "student in 4 bits with LoRA": functools.partial(student_in_4_bits, base),
        "vLLM writes as the student": functools.partial(written_by_vllm, base),
        "cache of hidden states": functools.partial(cached, base, 1e-2, "hidden"),
        "cache of likely tokens": functools.partial(cached, base, 0.5, "top_k"),
        "llm-distill check": functools.partial(checked, base),
    }
    return {name: check for name, check in checks.items() if not short or name not in NOT_IN_SHORT}


def device_maps(device: str) -> dict[str, Any]:
    where = {"": 0 if device == "cuda" else "cpu"}
    return {"model_init_kwargs": {"device_map": where}, "teacher_model_init_kwargs": {"device_map": where}}


@functools.cache
def models(short: bool) -> Path:
    """A folder with `student`, `teacher`, and the texts that they learn from."""
    from tiny import tiny_llama

    from llm_distill.data.corpus import load_corpus, train_tokenizer

    folder = Path(tempfile.mkdtemp(prefix="llm_distill_paths_"))
    vocab, widths = (512, (64, 64)) if short else (8192, (256, 512))
    for split, files in load_corpus(max_characters=100_000 if short else 400_000).items():
        lines = [line for file in files for line in file["text"].splitlines() if line.strip()]
        texts = ["\n".join(lines[i : i + 20]) for i in range(0, 64 * 20, 20)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts if text))
    tokenizer = train_tokenizer(read(folder, "train"), vocab)
    for seed, (name, width) in enumerate(zip(("student", "teacher"), widths, strict=True), 1):
        model = tiny_llama(seed, hidden=width, vocab_size=vocab, max_position_embeddings=1024)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def read(folder: Path, split: str) -> Any:
    from datasets import Dataset

    lines = (folder / f"{split}.jsonl").read_text().splitlines()
    return Dataset.from_list([json.loads(line) for line in lines])


def as_prompts(rows: Any) -> Any:
    """The beginnings of texts, for a student that writes the rest."""
    return rows.map(lambda row: {"prompt": row["text"][:60], "completion": row["text"][60:120]}, remove_columns="text")


def train(task: dict[str, Any]) -> dict[str, Any]:
    """A run with these `options`; `lora` and `student_in_4_bits` where they are there; `save` for the student saved;
    `prompts` for their beginnings in place of texts.
    """
    from peft import LoraConfig
    from torch.distributed.tensor import DTensor
    from transformers import AutoModelForCausalLM

    from llm_distill import DistillationConfig, DistillationTrainer
    from llm_distill.loading import bits_and_bytes

    folder = Path(task["folder"])
    data = [read(folder, split) for split in ("train", "test")]
    train_rows, test_rows = map(as_prompts, data) if task.get("prompts") else data
    options = {"max_length": 64 if task["short"] else 256, "use_cpu": task["device"] == "cpu"} | OPTIONS
    if "teacher_cache" not in task["options"]:
        options["teacher_model_name_or_path"] = str(folder / "teacher")
    with tempfile.TemporaryDirectory(prefix="llm_distill_run_") as out:
        trainer = DistillationTrainer(
            model=str(folder / "student"),
            args=DistillationConfig(output_dir=out, **(options | task["options"])),
            train_dataset=train_rows,
            eval_dataset=test_rows.select(range(8)),
            peft_config=LoraConfig(r=8, target_modules="all-linear") if task.get("lora") else None,
            quantization_config=bits_and_bytes(4) if task.get("student_in_4_bits") else None,
        )
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        result = {
            "losses": [entry["loss"] for entry in history] + [trainer.evaluate()["eval_loss"]],
            "kd": history[-1]["kd"],
            "teacher_share": history[-1]["teacher_share"],
            "tokens_per_second": history[-1]["tokens_per_second"],
            "device": str(trainer.accelerator.device),
        }
        teacher = getattr(trainer.teacher, "model", None)
        if teacher is not None:
            result["teacher_mib"] = teacher.get_memory_footprint() / 2**20
            parameters = (*trainer.model.parameters(), *teacher.parameters())
            result["sharded"] = all(isinstance(parameter, DTensor) for parameter in parameters)
        if task.get("save"):
            trainer.save_model(f"{out}/saved")
            saved = AutoModelForCausalLM.from_pretrained(f"{out}/saved")
            result["saved"] = all(bool(parameter.isfinite().all()) for parameter in saved.parameters())
    return result


def run(base: dict[str, Any], options: dict[str, Any], **more: Any) -> dict[str, Any]:
    return train({"folder": str(models(base["short"])), **base, "options": options, **more})


@functools.cache
def losses_elsewhere(device: str, short: bool, options: str) -> list[float]:
    """Of a run with these options, as JSON. Where there is a GPU, one on the CPU gets a process of its own."""
    task = {"device": device, "short": short, "folder": str(models(short)), "options": json.loads(options)}
    if device == "cuda" or not torch.cuda.is_available():
        return train(task)["losses"]
    return succeeded(in_fresh_process(__file__, task))["losses"]


def succeeded(result: dict[str, Any]) -> dict[str, Any]:
    if "error" in result:
        raise RuntimeError(result["error"])
    return result


def difference(losses: list[float], others: list[float]) -> float:
    """NaN where one of them is, which no range has."""
    distances = [abs(a - b) / abs(b) for a, b in zip(losses, others, strict=True)]
    return math.nan if any(map(math.isnan, distances)) else max(distances)


def figures_of(result: dict[str, Any]) -> dict[str, Any]:
    wanted = ("teacher_share", "tokens_per_second")
    return {"first loss": result["losses"][0], "last loss": result["losses"][-2]} | {n: result[n] for n in wanted}


def beside(base: dict[str, Any], device: str, limit: float, **options: Any) -> Outcome:
    """A run here, and one on `device` that differs in what must change nothing: in float32, or without the rest."""
    result = run(base, options)
    kept = {name: value for name, value in options.items() if name in ("divergence", "loss_temperature")}
    reference = kept | {"bf16": options["bf16"] and device != "cpu"}
    others = losses_elsewhere(device, base["short"], json.dumps(reference, sort_keys=True))
    figures = {"difference": difference(result["losses"], others)} | figures_of(result)
    return figures, {"difference": (0, limit), "teacher_share": (1e-4, 1)}


def packed(base: dict[str, Any]) -> Outcome:
    """On a GPU with a kernel that keeps documents apart, or TRL refuses it: then it is said."""
    result = run(base, {"bf16": True, "packing": True, "packing_strategy": "wrapped"})
    figures = figures_of(result)
    return figures, {"last loss": (0, figures["first loss"])}


def teacher_in_4_bits(base: dict[str, Any]) -> Outcome:
    import bitsandbytes  # noqa: F401  # or it is said that there is none

    whole, result = run(base, {"bf16": True}), run(base, {"bf16": True, "teacher_load_in_4bit": True})
    figures = {
        "difference": difference(result["losses"], whole["losses"]),
        "teacher, MiB": result["teacher_mib"],
        "whole, MiB": whole["teacher_mib"],
    }
    ranges = {"difference": (1e-6, 0.5), "teacher, MiB": (0.0, 0.99 * whole["teacher_mib"])}
    return figures | figures_of(result), ranges


def student_in_4_bits(base: dict[str, Any]) -> Outcome:
    import bitsandbytes  # noqa: F401

    result = run(base, {"bf16": True, "teacher_load_in_4bit": True}, lora=True, student_in_4_bits=True)
    figures = figures_of(result)
    return figures, {"last loss": (0, figures["first loss"])}


def written_by_vllm(base: dict[str, Any]) -> Outcome:
    """A run of LoRA on the student's own likeliest text by vLLM, beside one by transformers' `generate`."""
    import vllm  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(tempfile.mkdtemp(prefix="llm_distill_vllm_"))
    for path in models(base["short"]).iterdir():
        if path.is_dir():  # what is not trained would write tokens that the tokenizer does not have
            tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
            model.resize_token_embeddings(len(tokenizer))
            for part in (tokenizer, model):
                part.save_pretrained(folder / path.name)
        else:
            (folder / path.name).symlink_to(path)
    base = base | {"folder": str(folder)}
    options = {"bf16": True, "ce_weight": 0.0, "on_policy_share": 1.0, "max_completion_length": 16}
    options["sampling_temperature"] = 0.0
    ours = run(base, options, lora=True, prompts=True)
    with_vllm = options | {"use_vllm": True, "vllm_max_model_length": 128, "vllm_gpu_memory_utilization": 0.1}
    result = run(base, with_vllm, lora=True, prompts=True)
    return {"difference": difference(result["losses"], ours["losses"])} | figures_of(result), {"difference": (0, 0.1)}


def cached(base: dict[str, Any], limit: float, method: str) -> Outcome:
    """`llm-distill capture` here, and a run from what it has kept beside one with the teacher."""
    from llm_distill.cli import main

    folder = models(base["short"])
    cache = Path(tempfile.mkdtemp(prefix="llm_distill_cache_"), "cache")
    joined = folder / "all.jsonl"
    joined.write_text((folder / "train.jsonl").read_text() + (folder / "test.jsonl").read_text())
    flags = command_line(base, folder, cache.parent) | {
        "dataset_name": joined,
        "teacher_cache": cache,
        "cache_method": method,
    }
    began = time.perf_counter()
    main(["capture", *as_arguments(flags)])
    took = time.perf_counter() - began
    result = run(base, {"bf16": True, "teacher_cache": str(cache)})
    others = losses_elsewhere(base["device"], base["short"], json.dumps({"bf16": True}))
    size = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file()) / 2**20
    figures = {"difference": difference(result["losses"], others), "cache, MiB": size, "capture, s": took}
    return figures | figures_of(result), {"difference": (0, limit)}


def checked(base: dict[str, Any]) -> Outcome:
    """What `llm-distill check` finds of such a run, and how much of it is red."""
    from llm_distill.cli import main

    folder = models(base["short"])
    out = Path(tempfile.mkdtemp(prefix="llm_distill_check_"))
    flags = command_line(base, folder, out) | {"dataset_name": folder / "train.jsonl", "json": out / "check.json"}
    try:
        main(["check", *as_arguments(flags)])
    except SystemExit as ended:
        print(f"ended with {ended.code}")
    findings = json.loads((out / "check.json").read_text())
    levels = [finding["level"] for finding in findings]
    figures: dict[str, Any] = {level: levels.count(level) for level in ("red", "amber", "green", "skipped")}
    figures["memory"] = "; ".join(f["text"] for f in findings if "memory" in f["what"].lower())
    return figures, {"red": (0, 0), "green": (1, 100)}


def command_line(base: dict[str, Any], folder: Path, out: Path) -> dict[str, Any]:
    models_of_run = {"model_name_or_path": folder / "student", "teacher_model_name_or_path": folder / "teacher"}
    length = 64 if base["short"] else 256
    how = {"output_dir": out, "max_length": length, "use_cpu": base["device"] == "cpu", "bf16": True}
    return models_of_run | how | {"report_to": "none", "ce_weight": OPTIONS["ce_weight"]}


def as_arguments(flags: dict[str, Any]) -> list[str]:
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def stopwatch(device: str) -> Outcome:
    """What `Stopwatch` says of work that takes a while, and for how long it makes the program wait."""
    from llm_distill.losses.metrics import Stopwatch

    size = 8192 if device == "cuda" else 512
    a = torch.randn(size, size, device=device)
    a @ a
    synchronize(device)
    watch, began = Stopwatch(torch.device(device)), time.perf_counter()
    with watch:
        for _ in range(20):
            a @ a
    waited = time.perf_counter() - began
    synchronize(device)
    took = time.perf_counter() - began
    told = watch.reset()
    for _ in range(2100):  # more than it keeps before it adds them up
        with watch:
            pass
    figures = {"told / taken": told / took, "waited / taken": waited / took, "of 2100 empty ones, s": watch.reset()}
    ranges = {"told / taken": (0.8, 1.05), "of 2100 empty ones, s": (0.0, 1.0)}
    return figures, ranges | ({"waited / taken": (0.0, 0.5)} if device == "cuda" else {})


def sharded_checks(device: str, short: bool) -> dict[str, Check]:
    return {"FSDP2 on one rank": functools.partial(sharded, {"device": device, "short": short})}


def sharded(base: dict[str, Any]) -> Outcome:
    """The run that `accelerate launch` starts with `recipes/accelerate/fsdp2.yaml`, beside one process without it."""
    if base["device"] == "cpu":
        raise unittest.SkipTest("accelerate has no FSDP2 on a CPU")
    folder = models(base["short"])
    task = {**base, "folder": str(folder), "options": {"bf16": True}, "save": True, "result": str(folder / "result")}
    launcher = ROOT / "recipes" / "accelerate" / "fsdp2.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launcher)]
    command += ["--num_processes", "1", "--main_process_port", "0", __file__, "--task", json.dumps(task)]
    launched = subprocess.Popen(command, stdout=sys.stdout, stderr=subprocess.STDOUT)
    try:
        status = launched.wait(100)
    except subprocess.TimeoutExpired:
        launched.terminate()  # it then ends its rank, which has a session of its own
        status = launched.wait()
    if status:
        raise RuntimeError(f"accelerate launch ended with {status}: see gpu.log")
    result = json.loads((folder / "result").read_text())
    plain = run(base, {"bf16": True})
    figures = {"difference": difference(result["losses"], plain["losses"])} | figures_of(result)
    figures |= {"sharded": result["sharded"], "saved whole": result["saved"]}
    return figures, {"difference": (0, 2e-2), "sharded": (True, True), "saved whole": (True, True)}


def memory_checks(device: str, short: bool) -> dict[str, Check]:
    student, teacher = (
        {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2 if short else 8}
        for width in ((64, 64) if short else (1024, 1536))
    )
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": student["hidden_size"]}
    tasks = {
        "float32": {"options": {"bf16": False}},
        "bfloat16": {"options": {"bf16": True}},
        "bfloat16, accumulation": {"options": {"bf16": True, "gradient_accumulation_steps": 2}},
        "bfloat16, checkpointing": {"options": {"bf16": True, "gradient_checkpointing": True}},
        "bfloat16, loss_buffer_mib 1024": {"options": {"bf16": True, "loss_buffer_mib": 1024}},
        "bfloat16, LoRA": {"options": {"bf16": True}, "lora": {"r": 8, "target_modules": "all-linear"}},
        "bfloat16, mixture of experts": {"student": student | experts, "options": {"bf16": True}},
    }
    base = {"student": student, "teacher": teacher, "device": device}
    names = list(tasks)[1:2] if short else list(tasks)
    return {name: functools.partial(memory, base | tasks[name]) for name in names}


def memory(task: dict[str, Any]) -> Outcome:
    """The peak of a step, over what was there before its models, beside `estimate_memory`."""
    from measured_step import measured

    result = measured(task)
    figures = {"measured, MiB": result["measured"], "estimated, MiB": result["estimated"]}
    figures["measured / estimated"] = result["measured"] / result["estimated"]
    figures["estimate"] = result["parts"]
    return figures, {"measured / estimated": (0.8, 1.1)} if task["device"] == "cuda" else {}


if __name__ == "__main__":
    asked = json.loads(sys.argv[sys.argv.index("--task") + 1])
    outcome = json.dumps(train(asked))
    if "result" in asked:
        Path(asked["result"]).write_text(outcome)
    print(outcome)
