"""What a student learns from a teacher's texts, on a task with answers that can be checked: sums of two numbers.

    python benchmarks/sequence_kd.py --output benchmarks/results/sequence_kd_cpu

A teacher learns `37+58=095` from most sums there are. Students, all with the same start, steps and batch, see
- gold: few sums with their answers,
- sequence-level: many sums as the teacher answers them, one sample each,
- filtered: the same, without the answers that are wrong (the filter `verifier`),
- filtered, sequence + token level: the same, and the teacher's distribution over each token.

All are asked for sums that none of them has seen; right is what is right to the last digit. Everything runs through
`llm_distill.generation` and `DistillationTrainer`, as `recipes/sequence_kd.py` does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import Dataset
from measure import write_results
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, set_seed

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.data.sums import LARGEST, is_right, split_sums, tokenizer_of_digits
from llm_distill.generation import Sampling, TransformersEngine, generate, load_generated, make_filters, prompts_of
from llm_distill.models import LanguageModel

TAUGHT, ASKED, GOLD, HELD_OUT = 6000, 3000, 200, 1000
SIZES = {"teacher": (128, 2), "student": (64, 2)}
BATCH = 128
TEACHER_STEPS, STUDENT_STEPS = 450, 600


def sums() -> dict[str, Dataset]:
    """Four sets of sums with nothing in common."""
    return split_sums(taught=TAUGHT, asked=ASKED, gold=GOLD, held_out=HELD_OUT)


def make_model(name: str, seed: int) -> PreTrainedModel:
    set_seed(seed)
    width, layers = SIZES[name]
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=13,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=16,
        )
    )


def train(
    model: PreTrainedModel,
    data: Dataset,
    steps: int,
    seed: int,
    tokenizer: Any,
    folder: Path,
    teacher: Any = None,
    **options: Any,
) -> PreTrainedModel:
    weights = {"kd_weight": 0.0 if teacher is None else 1.0, "ce_weight": 1.0}
    args = DistillationConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.1,
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        dataloader_pin_memory=False,
        **(weights | options),
    )
    DistillationTrainer(model, teacher, args, train_dataset=data, processing_class=tokenizer).train()
    return model.eval()


def accuracy(model: PreTrainedModel, tokenizer: Any, asked: Dataset) -> float:
    engine = TransformersEngine(
        LanguageModel(model, tokenizer), Sampling(max_new_tokens=4, temperature=0), batch_size=250
    )
    answers = engine.write(list(prompts_of(asked)))
    return statistics.fmean(is_right(a.prompt.content, a.completions[0].text, {}) for a in answers)


def measure(seeds: int, folder: Path) -> dict[str, Any]:
    tokenizer, data = tokenizer_of_digits(), sums()
    began = time.perf_counter()
    model = train(make_model("teacher", 0), data["taught"], TEACHER_STEPS, 0, tokenizer, folder)
    rows: dict[str, Any] = {"teacher": {"accuracy": accuracy(model, tokenizer, data["held_out"]), "texts": TAUGHT}}
    print(f"teacher: {rows['teacher']['accuracy']:.1%} after {time.perf_counter() - began:.0f} s", flush=True)
    teacher, sampling = LiveTeacher(model, tokenizer), Sampling(max_new_tokens=4)
    engine, prompts = (
        TransformersEngine(teacher.language_model, sampling, batch_size=250),
        list(prompts_of(data["asked"])),
    )
    texts, reports = {"gold": data["gold"]}, {}
    for name, filters in (("sequence-level", {}), ("filtered", {"verifier": {"check": is_right}})):
        chosen = make_filters({"finished": {}, **filters})  # the second time nothing is written again, only filtered
        reports[name] = generate(engine, prompts, folder / "generated", filters=chosen)
        texts[name] = load_generated(folder / "generated", tokenizer)
        print(f"{name}\n{reports[name].as_markdown()}", flush=True)
    cases = {name: (data, None) for name, data in texts.items()}
    cases["filtered, sequence + token level"] = (texts["filtered"], teacher)
    found: dict[str, list[float]] = {name: [] for name in cases}
    for seed in range(1, seeds + 1):
        for name, (learned, tutor) in cases.items():
            student = train(make_model("student", seed), learned, STUDENT_STEPS, seed, tokenizer, folder, tutor)
            found[name].append(accuracy(student, tokenizer, data["held_out"]))
            print(f"seed {seed}, {name}: {found[name][-1]:.1%}", flush=True)
    for name, values in found.items():
        rows[name] = {
            "accuracy": statistics.fmean(values),
            "spread": max(values) - min(values),
            "by seed": values,
            "texts": len(cases[name][0]),
        }
    return {"rows": rows, "reports": {name: report._asdict() for name, report in reports.items()}}


def as_markdown(rows: dict[str, Any]) -> str:
    lines = ["| learned from | texts | right | largest − smallest, by seed |", "|---|---:|---:|---:|"]
    for name, row in rows.items():
        spread = f"{row['spread']:.1%}" if "spread" in row else ""
        lines.append(f"| {name} | {row['texts']:,} | {row['accuracy']:.1%} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="students of each kind; default: %(default)s")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json and NAME.md")
    args = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(args.seeds, Path(folder))
    table = as_markdown(found["rows"])
    print(table)
    if args.output:
        size = {name: make_model(name, 0).num_parameters() / 1e3 for name in SIZES}
        sizes = ", ".join(f"{name} {value:,.0f} k parameters" for name, value in size.items())
        intro = f"Sums of two numbers below {LARGEST}, {HELD_OUT:,} that nobody has seen; {sizes}; {args.seeds} seeds."
        write_results(args.output, "Learning from a teacher's texts", found, intro, table, began=began)


if __name__ == "__main__":
    main()
