"""A whole step of `DistillationTrainer` against its necessary parts, and against TRL's trainers.

    python benchmarks/train_step.py --output benchmarks/results/train_step_cpu
    python benchmarks/train_step.py --short
    python benchmarks/train_step.py --device cuda --size large --output benchmarks/results/train_step_cuda

The parts are a step of transformers' own `Trainer` with the same student, the teacher's forward without its head, and
the product of its head. A live teacher cannot do without all three, a sparse signal not without the first; each case is
given as the ratio to the sum of its parts. (`Trainer` builds full logits where we do not: a ratio may be below 1.)

Every part and case runs in a process of its own, in turn, and each round in turn with the others: machines are noisy,
ratios within a round less so. A step lasts from the end of the one before to its own end, so that fetching its batch is
in it; the first two are left out. "Peak memory" is that of training over what was there once the models were built:
activations, gradients, AdamW's state and the loss. All weights and tokens are random; every position counts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import in_fresh_process, machine, peak_memory, seconds, synchronize

# Before transformers reads them, here and in the children.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import transformers
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_distill import DistillationConfig, DistillationTrainer
from llm_distill.models import HEAD, Needs
from llm_distill.rows import View
from llm_distill.signals import SparseSignal
from llm_distill.teachers import LiveTeacher, Teacher

LEFT_OUT = 2
"""Steps at the start that are not counted: they compile, allocate and make the optimizer's state."""
K = 64
"""Tokens of a sparse signal."""
PRODUCT_ROWS = 512
"""Rows of the teacher's head product at a time."""


def shape(layers: int, width: int, inner: int, heads: int, kv_heads: int) -> dict[str, int]:
    """In the words of a transformers configuration."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (layers, width, inner, heads, kv_heads), strict=True))


SIZES: dict[str, dict[str, Any]] = {
    "small": {"family": transformers.LlamaConfig, "vocab": 32_000, "batch": 8, "length": 256, "bf16": False}
    | {"student": shape(4, 256, 704, 4, 4), "teacher": shape(8, 512, 1408, 8, 8)},
    "tiny": {"family": transformers.LlamaConfig, "vocab": 500, "batch": 2, "length": 16, "bf16": False}
    | {"student": shape(1, 32, 64, 2, 2), "teacher": shape(1, 32, 64, 2, 2)},  # to see that it runs
    "large": {"family": transformers.Qwen2Config, "vocab": 151_936, "batch": 4, "length": 1024, "bf16": True}
    | {"student": shape(24, 896, 4864, 14, 2), "teacher": shape(28, 3584, 18944, 28, 4)},  # Qwen2.5-0.5B and -7B
}
PARTS: dict[str, dict[str, Any]] = {
    "HF Trainer step": {"trainer": "hf"},
    "teacher backbone": {"part": "backbone"},
    "teacher head product": {"part": "head product"},
}
STUDENT, BOTH = list(PARTS)[:1], list(PARTS)
CASES: dict[str, dict[str, Any]] = {
    "DistillationTrainer, live teacher": {"trainer": "ours", "teacher": "live", "parts": BOTH},
    "DistillationTrainer, live teacher + CE": {"trainer": "ours", "teacher": "live", "ce_weight": 0.5, "parts": BOTH},
    "DistillationTrainer, sparse signal": {"trainer": "ours", "teacher": "sparse", "parts": STUDENT},
    "TRL SFTTrainer (no teacher)": {"trainer": "sft", "parts": STUDENT},
    "TRL GKDTrainer, off-policy": {"trainer": "gkd", "parts": BOTH},
}
NOT_IN_SHORT = ("TRL GKDTrainer, off-policy",)


def build(task: dict[str, Any], who: str) -> transformers.PreTrainedModel:
    """The student, in float32, or the teacher: random weights, on the device."""
    size = SIZES[task["size"]]
    config = size["family"](
        **size[who], vocab_size=size["vocab"], max_position_embeddings=size["length"], tie_word_embeddings=False
    )
    dtype = torch.bfloat16 if size["bf16"] and who == "teacher" else torch.float32
    torch.manual_seed(0)
    with torch.device(task["device"]):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def tokenizer_of(vocab: int) -> transformers.PreTrainedTokenizerFast:
    """As many made-up words as the models have logits: the vocabulary of the loss is the tokenizer's."""
    words = {"<end>": 0} | {f"word{i}": i for i in range(1, vocab)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<end>"))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def tokens(task: dict[str, Any], sequences: int) -> Tensor:
    size = SIZES[task["size"]]
    return torch.randint(1, size["vocab"], (sequences, size["length"]), generator=torch.Generator().manual_seed(0))


class PrecomputedTeacher(Teacher):
    """The top k of every row as they would come from a cache: no model runs."""

    def __init__(self, rows: int, vocab: int, device: str, k: int = K) -> None:
        self.vocab, stratum = vocab, vocab // k
        first = torch.arange(k, device=device) * stratum
        self.ids = first + torch.randint(0, stratum, (rows, k), device=device)  # distinct, and all over the vocabulary
        self.cells = torch.randn(rows, k + 1, device=device).log_softmax(-1)

    def score(self, view: View, needs: Needs = HEAD) -> SparseSignal:
        return SparseSignal(self.ids, self.cells[:, :-1].contiguous(), self.cells[:, -1].contiguous(), self.vocab)

    def describe(self) -> dict[str, Any]:
        return {"model": "precomputed"}


class StepTimes(transformers.TrainerCallback):
    """Seconds from the end of a step to the end of the next."""

    def __init__(self, device: str) -> None:
        self.device, self.seconds = device, []

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        self.last = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        synchronize(self.device)
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


def trainer_of(task: dict[str, Any], folder: str) -> transformers.Trainer:
    """Every trainer with the same student, batches and optimizer."""
    size, device = SIZES[task["size"]], task["device"]
    options = {
        "output_dir": folder,
        "max_steps": task["steps"] + LEFT_OUT,
        "per_device_train_batch_size": size["batch"],
        "learning_rate": 1e-4,
        "bf16": size["bf16"],
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device == "cuda",
        "activation_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 10**6,
    }
    of_trl = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": size["length"]}
    rows = tokens(task, (task["steps"] + LEFT_OUT) * size["batch"]).tolist()
    tokenizer = tokenizer_of(size["vocab"])
    common = {
        "model": build(task, "student"),
        "train_dataset": Dataset.from_dict({"input_ids": rows, "labels": rows}),
        "data_collator": DataCollatorForLanguageModeling(tokenizer.pad_token_id),
        "processing_class": tokenizer,
    }
    if task["trainer"] == "hf":
        return transformers.Trainer(args=transformers.TrainingArguments(**options), **common)
    if task["trainer"] == "sft":
        return SFTTrainer(args=SFTConfig(**options, **of_trl), **common)
    if task["trainer"] == "gkd":
        from trl.experimental.gkd import GKDConfig, GKDTrainer

        off_policy = {"lmbda": 0.0, "seq_kd": False, "beta": 0.0, "temperature": 1.0}  # forward KL on the given text
        config = GKDConfig(**options, **of_trl, **off_policy)
        return GKDTrainer(args=config, teacher_model=build(task, "teacher"), **common)
    if task["teacher"] == "live":
        teacher: Teacher = LiveTeacher(build(task, "teacher"), tokenizer)
    else:
        teacher = PrecomputedTeacher(size["batch"] * (size["length"] - 1), size["vocab"], device)
    config = DistillationConfig(**options, **of_trl, ce_weight=task.get("ce_weight", 0.0))
    return DistillationTrainer(teacher=teacher, args=config, **common)


@torch.inference_mode()
def teacher_part(task: dict[str, Any]) -> Callable[[], object]:
    """One of the two things that a live teacher has to do for a batch."""
    size, device = SIZES[task["size"]], task["device"]
    if task["part"] == "backbone":
        backbone, ids = build(task, "teacher").eval().model, tokens(task, size["batch"]).to(device)
        return torch.inference_mode()(lambda: backbone(input_ids=ids, use_cache=False))
    dtype = torch.bfloat16 if size["bf16"] else torch.float32
    rows, width = size["batch"] * (size["length"] - 1), size["teacher"]["hidden_size"]
    hidden = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(size["vocab"], width, device=device, dtype=dtype)
    buffer = torch.empty(PRODUCT_ROWS, size["vocab"], device=device, dtype=dtype)

    @torch.inference_mode()
    def product() -> None:
        for chunk in hidden.split(PRODUCT_ROWS):
            torch.mm(chunk, weight.T, out=buffer[: len(chunk)])

    return product


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One part or case, in this process."""
    device = task["device"]
    if "part" in task:
        run = teacher_part(task)
        with peak_memory(device) as memory:
            times = [seconds(run, device) for _ in range(task["steps"] + LEFT_OUT)]
    else:
        with tempfile.TemporaryDirectory(prefix="train_step_") as folder:
            trainer, clock = trainer_of(task, folder), StepTimes(device)
            trainer.add_callback(clock)
            with peak_memory(device) as memory:
                trainer.train()
            times = clock.seconds
    return {"first_seconds": times[0], "seconds": times[LEFT_OUT:], "peak_mib": memory["mib"]}


def run_all(cases: list[str], common: dict[str, Any], rounds: int) -> dict[str, dict[str, Any]]:
    """Each part and case `rounds` times in a fresh process, one after the other, and what follows from all of them."""
    tasks = PARTS | {name: CASES[name] for name in cases}
    found: dict[str, dict[str, Any]] = {name: {"rounds": []} for name in tasks}
    for number in range(rounds):
        for name, task in tasks.items():
            print(f"  round {number + 1}/{rounds}: {name:<45}", end="\r", flush=True)
            result = in_fresh_process(__file__, {**common, **task})
            found[name] |= {"error": result["error"]} if "error" in result else {}
            found[name]["rounds"].append(result)
    size = SIZES[common["size"]]
    for name, case in found.items():
        if "error" in case:
            continue
        each_round = case["rounds"]
        case["median_seconds"] = statistics.median(value for each in each_round for value in each["seconds"])
        case["tokens_per_second"] = size["batch"] * size["length"] / case["median_seconds"]
        case["peak_mib"] = statistics.median(each["peak_mib"] for each in each_round)
        case["first_seconds"] = statistics.median(each["first_seconds"] for each in each_round)
        parts = tasks[name].get("parts", ())
        if parts and not any("error" in found[part] for part in parts):
            medians = [_medians(found[part]) for part in parts]
            ratios = [own / sum(of_parts) for own, *of_parts in zip(_medians(case), *medians, strict=True)]
            case |= {"parts": parts, "ratio_to_parts": statistics.median(ratios), "ratios_by_round": ratios}
    return found


def _medians(case: dict[str, Any]) -> list[float]:
    return [statistics.median(each["seconds"]) for each in case["rounds"]]


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: the parts, then the cases, each beside the sum of the parts that it is compared with."""
    lines = [
        "| | time a step, s | tokens/s | sum of its parts, s | × parts | peak memory, MiB | first step, s |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, case in found.items():
        if "error" in case:
            lines.append(f"| {name} | {case['error']} | | | | | |")
            continue
        parts = sum(found[part]["median_seconds"] for part in case.get("parts", ()))
        ratio = f"{parts:.3f} | {case['ratio_to_parts']:.2f}" if parts else " | "
        lines.append(
            f"| {name} | {case['median_seconds']:.3f} | {case['tokens_per_second']:,.0f} | {ratio} | "
            f"{case['peak_mib']:,.0f} | {case['first_seconds']:.2f} |"
        )
    return "\n".join(lines)


def plot(found: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    """Beside each other: every case, and under it the parts that it is compared with, stacked."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = [name for name in found if "error" not in found[name] and "parts" in found[name]][::-1]
    figure, axis = plt.subplots(figsize=(11, 1.2 + 0.9 * len(cases)), layout="constrained")
    for row, name in enumerate(cases):
        case, left = found[name], 0.0
        colour = "tab:blue" if CASES[name]["trainer"] == "ours" else "tab:grey"
        axis.barh(row + 0.2, case["median_seconds"], height=0.38, color=colour)
        label = f" {case['median_seconds']:.2f} s, × {case['ratio_to_parts']:.2f}, {case['peak_mib']:,.0f} MiB"
        axis.text(case["median_seconds"], row + 0.2, label, va="center")
        for part, shade in zip(case["parts"], ("tab:orange", "gold", "tab:olive"), strict=False):
            value, is_new = found[part]["median_seconds"], part not in axis.get_legend_handles_labels()[1]
            axis.barh(row - 0.2, value, left=left, height=0.38, color=shade, label=part if is_new else None)
            left += value
    axis.set_yticks(range(len(cases)), cases)
    axis.set(title=title, xlabel="seconds a step, over the parts that it cannot do without")
    figure.legend(loc="outside lower center", ncols=len(PARTS))
    axis.margins(x=0.35)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--size", default="small", choices=list(SIZES))
    parser.add_argument("--cases", nargs="+", default=None, help=f"of {'; '.join(CASES)}")
    parser.add_argument("--steps", type=int, default=8, help=f"steps measured a process, after {LEFT_OUT} others")
    parser.add_argument("--rounds", type=int, default=2, help="how often every part and case gets a fresh process")
    parser.add_argument("--short", action="store_true", help="one round of 4 steps, without GKD: about two minutes")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json, NAME.md and NAME.png")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(measure(json.loads(args.task))))
        return

    if args.short:
        args.steps, args.rounds = 4, 1
    cases = args.cases or [name for name in CASES if not (args.short and name in NOT_IN_SHORT)]
    if unknown := sorted(set(cases) - set(CASES)):
        parser.error(f"unknown cases {unknown}; known: {', '.join(CASES)}")
    found = run_all(cases, {"device": args.device, "size": args.size, "steps": args.steps}, args.rounds)
    size = SIZES[args.size]
    title = f"{args.size}: a batch of {size['batch']} × {size['length']:,} tokens, V = {size['vocab']:,}"
    print(f"\n{title}\n\n{table(found)}\n", flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        about = machine(args.device)
        settings = {**size, "family": size["family"].__name__, "steps": args.steps, "rounds": args.rounds}
        whole = {"machine": about, "setting": settings, "cases": found}
        args.output.with_suffix(".json").write_text(json.dumps(whole, indent=1) + "\n")
        where = f"{about['date']}, {about['device']}, {about['threads']} threads. `{about['command']}`"
        args.output.with_suffix(".md").write_text(f"# A training step\n\n{where}\n\n{title}:\n\n{table(found)}\n")
        plot(found, title, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
