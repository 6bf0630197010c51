"""Where a training step goes on a CPU, by part, and which options make it faster: a real student beside its teacher.

    python benchmarks/cpu_step.py --model FOLDER --output benchmarks/results/cpu_step

FOLDER is SmolLM2-135M-Instruct or another causal LM; the student has --layers of its layers, in float32, and trains
under bfloat16 autocast where the processor has it (--float32 for none) with the teacher beside it in bfloat16. The
texts are the documentation in the Python standard library, of all lengths. Each case runs in a process of its own, one
after the other; its parts are timed from outside, without a profiler, and what is in a part that has a row of its own
does not count there. Kinds of operators: of one further step under torch.profiler, whose own time is in them.

The share of the machine is of the rate at which torch multiplies two matrices of 2,048 in the same dtype, measured in
the same process: 6 products of the student's weights and 2 of the teacher's for each token that is no padding.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import in_fresh_process, write_results

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.data.corpus import load_corpus
from llm_distill.losses import objective
from llm_distill.models import LanguageModel, decoder_layers
from llm_distill.ranks import has_fast_bfloat16
from llm_distill.students.choose import even_layers
from llm_distill.students.cut import cut_layers

CASES: dict[str, dict[str, Any]] = {
    "packed": {"packing": True},
    "packed, cut anywhere": {"packing": True, "packing_strategy": "wrapped"},
    "padded": {},
    "padded, by length": {"train_sampling_strategy": "group_by_length"},
    "packed, plain AdamW": {"packing": True, "optim": "adamw_torch"},
    "packed, fused AdamW": {"packing": True, "optim": "adamw_torch_fused"},
    "packed, 4 micro-batches": {"packing": True, "gradient_accumulation_steps": 4},
    "packed, 4 micro-batches, casts kept": {"packing": True, "gradient_accumulation_steps": 4, "keep_casts": True},
    "packed, 1 worker": {"packing": True, "dataloader_num_workers": 1},
}
PARTS = ("data", "teacher", "student's forward", "head's loss", "backward", "optimizer", "rest")
KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::linear", "mkldnn"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "casts and copies": ("aten::copy_", "aten::_to_copy", "aten::to", "aten::clone", "aten::cat", "aten::index"),
    "optimizer": ("Optimizer", "_fused_adam", "aten::_foreach"),
    "head's loss": ("FusedHeadLoss", "llm_distill"),
}
LEFT_OUT = 1
"""Steps at the beginning that do not count."""


class Clock(TrainerCallback):
    """Seconds of each part of each step; what is called within a part is not in it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.tokens: list[int] = []
        self.inside: list[float] = []
        self._begin()

    def _begin(self) -> None:
        self.current, self.began, self.read = dict.fromkeys(PARTS, 0.0), time.perf_counter(), 0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.inside.append(0.0)
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds = time.perf_counter() - began
                self.current[part] += seconds - self.inside.pop()
                if self.inside:
                    self.inside[-1] += seconds

        return run

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self, part: str) -> None:
        self.current[part] += time.perf_counter() - self.started

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._begin()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        whole = time.perf_counter() - self.began
        self.steps.append({**self.current, "rest": whole - sum(self.current.values()), "step": whole})
        self.tokens.append(self.read)
        self._begin()


def documentation(characters: int) -> Dataset:
    """Texts of all lengths: each docstring of the standard library."""
    texts: list[str] = []
    for row in load_corpus(max_characters=characters)["train"]:
        try:
            nodes = [*ast.walk(ast.parse(row["text"]))]
        except SyntaxError:  # where the corpus was cut
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = (ast.get_docstring(node) for node in nodes if isinstance(node, kinds))
        texts += [inspect.cleandoc(text) for text in found if text and len(text) > 80]
    return Dataset.from_dict({"text": texts}).shuffle(seed=0)


def product_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations a second of a matrix product, the best of several."""
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    out, best = torch.empty(size, size, dtype=dtype), 0.0
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(a, b, out=out)
        best = max(best, 2 * size**3 / (time.perf_counter() - began))
    return best


def make_trainer(task: dict[str, Any], folder: str, clock: Clock) -> DistillationTrainer:
    """With its parts timed."""
    mixed = task["bfloat16"]
    original = LanguageModel.load(task["model"], dtype=torch.float32)
    keep = even_layers(len(decoder_layers(original.model)), task["layers"])
    student = cut_layers(original.model, keep)
    tokenizer = original.require_tokenizer("teacher")
    teacher = LiveTeacher(LanguageModel(original.model.to(torch.bfloat16 if mixed else torch.float32), tokenizer))
    options = {name: value for name, value in CASES[task["case"]].items() if name != "keep_casts"}
    micro_batches = options.get("gradient_accumulation_steps", 1)
    config = DistillationConfig(
        output_dir=folder,
        max_steps=task["steps"] + LEFT_OUT + 1,
        max_length=task["length"],
        **{"per_device_train_batch_size": max(1, task["batch"] // micro_batches), "bf16": mixed, **options},
        report_to="none",
        disable_tqdm=True,
        save_strategy="no",
        logging_strategy="no",
        use_cpu=True,
    )
    data = documentation(task["characters"])
    trainer = DistillationTrainer(student, teacher, config, train_dataset=data, processing_class=tokenizer)
    trainer.add_callback(clock)
    trainer.teacher.score = clock.timed("teacher", trainer.teacher.score)
    trainer.accelerator.backward = clock.timed("backward", trainer.accelerator.backward)
    trainer.compute_loss = clock.timed("student's forward", trainer.compute_loss)
    trainer.get_batch_samples = clock.timed("data", counting(trainer.get_batch_samples, clock))
    objective.fused_head_loss = clock.timed("head's loss", objective.fused_head_loss)
    make_optimizer = trainer.create_optimizer

    def create_optimizer(*args: Any) -> Any:
        optimizer = make_optimizer(*args)
        optimizer.register_step_pre_hook(lambda *_: clock.start())
        optimizer.register_step_post_hook(lambda *_: clock.stop("optimizer"))
        if CASES[task["case"]].get("keep_casts"):
            optimizer.register_step_post_hook(lambda *_: torch.clear_autocast_cache())
        return optimizer

    trainer.create_optimizer = create_optimizer
    return trainer


def counting(get_batches: Callable[..., Any], clock: Clock) -> Callable[..., Any]:
    """The same, and the tokens of a step that are no padding are counted."""

    def run(*args: Any) -> Any:
        batches, rows = get_batches(*args)
        for batch in batches:
            clock.read += int(batch["attention_mask"].sum() if "attention_mask" in batch else batch["labels"].numel())
        return batches, rows

    return run


class Profiled(TrainerCallback):
    """The last step under torch.profiler."""

    def __init__(self, steps: int) -> None:
        self.steps, self.profiler = steps, profile(activities=[ProfilerActivity.CPU], acc_events=True)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.steps:
            self.profiler.start()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self.profiler.stop()

    def shares(self) -> dict[str, float]:
        """Of the processor's time, of each kind of operator."""
        seconds = dict.fromkeys([*KINDS, "other"], 0.0)
        for event in self.profiler.key_averages():
            kind = next((kind for kind, names in KINDS.items() if any(name in event.key for name in names)), "other")
            seconds[kind] += event.self_cpu_time_total
        return {kind: value / sum(seconds.values()) for kind, value in seconds.items()}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One case, in this process."""
    torch.set_num_threads(task["threads"])
    rate = product_rate(torch.bfloat16 if task["bfloat16"] else torch.float32)
    clock, profiled = Clock(), Profiled(task["steps"] + LEFT_OUT)
    with tempfile.TemporaryDirectory(prefix="cpu_step_") as folder:
        trainer = make_trainer(task, folder, clock)
        trainer.add_callback(profiled)
        sizes = trainer.model.num_parameters(), trainer.teacher.models[0].model.num_parameters()
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(CASES[task["case"]].get("keep_casts"))):
            trainer.train()
    counted = slice(LEFT_OUT, LEFT_OUT + task["steps"])
    steps, tokens = clock.steps[counted], clock.tokens[counted]
    seconds = sum(step["step"] for step in steps)
    return {
        "parts": {part: statistics.mean(step[part] for step in steps) for part in (*PARTS, "step")},
        "tokens_per_second": sum(tokens) / seconds,
        "tokens_per_step": statistics.mean(tokens),
        "flops_of_products": rate,
        "share_of_products": (6 * sizes[0] + 2 * sizes[1]) * sum(tokens) / seconds / rate,
        "kinds": profiled.shares(),
        "optimizer": type(trainer.optimizer).__name__ + f", fused={trainer.optimizer.param_groups[0].get('fused')}",
    }


def table(found: dict[str, dict[str, Any]]) -> str:
    """Seconds a step by part, then shares by kind of operator."""
    lines = [f"| case | tokens/s | share of products | tokens a step | {' | '.join((*PARTS, 'step'))} |"]
    lines.append("|---|" + (3 + len(PARTS) + 1) * "---:|")
    for name, row in found.items():
        if "error" in row:
            lines.append(f"| {name} | {row['error']} |" + (2 + len(PARTS) + 1) * " |")
            continue
        figures = [
            f"{row['tokens_per_second']:.0f}",
            f"{row['share_of_products']:.0%}",
            f"{row['tokens_per_step']:.0f}",
        ]
        figures += [f"{row['parts'][part]:.2f}" for part in (*PARTS, "step")]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    kinds = [*KINDS, "other"]
    lines += ["", f"| case | {' | '.join(kinds)} |", "|---|" + len(kinds) * "---:|"]
    for name, row in found.items():
        if "error" not in row:
            shares = [f"{row['kinds'][kind]:.0%}" for kind in kinds]
            lines.append(f"| {name} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="the folder of a causal LM")
    parser.add_argument("--layers", type=int, default=24, help="of the student; default: %(default)s")
    parser.add_argument("--steps", type=int, default=4, help="that count, of each case; default: %(default)s")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row at most; default: %(default)s")
    parser.add_argument("--batch", type=int, default=4, help="rows of a step; default: %(default)s")
    parser.add_argument("--characters", type=int, default=2_000_000, help="of the corpus; default: %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: all processors")
    parser.add_argument("--float32", action="store_true", help="no autocast, and a teacher in float32")
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES], help="default: all")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json and NAME.md")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        print(json.dumps(measure(json.loads(arguments.task))))
        return
    options = vars(arguments)
    common = {name: options[name] for name in ("model", "layers", "steps", "length", "batch", "characters", "threads")}
    common["bfloat16"] = has_fast_bfloat16() and not arguments.float32
    found = {}
    for name in arguments.cases:
        found[name] = in_fresh_process(__file__, {**common, "case": name})
        print(table({name: found[name]}), flush=True)
    if arguments.output:
        content = {"settings": {**common, "model": ""}, "cases": found}
        write_results(arguments.output, "A training step on a CPU", content, table(found))


if __name__ == "__main__":
    main()
