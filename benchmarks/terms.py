"""What terms on layers are worth beside the logits alone, at equal wall time, on a student cut from its teacher.

    python benchmarks/terms.py --model FOLDER --output benchmarks/results/terms_cpu

FOLDER is a causal LM. The student is it with the layers that change hidden states most (`llm-distill prune --layers`),
on the sources of Python's standard library. Each case begins with the same student, in a process of its own, and stops
when its seconds of training are over; the learning rate falls with the time, along a cosine. A term's weight makes it,
before the first step, the given share of the divergence.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import in_fresh_process, write_results

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from llm_distill import DistillationConfig, DistillationTrainer
from llm_distill.data.corpus import load_corpus, token_blocks
from llm_distill.students.choose import choose_layers
from llm_distill.students.cut import cut_layers
from llm_distill.students.smaller import save_smaller

CASES: dict[str, list[dict[str, Any]]] = {
    "logits alone": [],
    "+ hidden": [{"name": "hidden", "layers": "cut"}],
    "+ hidden, cosine": [{"name": "hidden", "layers": "cut", "distance": "cosine"}],
    "+ relations": [{"name": "relations"}],
    "+ attention": [{"name": "attention", "layers": "cut"}],
}
LENGTH, BATCH, LEARNING_RATE, WARMUP, HELD_OUT, CALIBRATION = 256, 8, 4e-4, 0.05, 32, 4
FIGURES = {"kl": "KL(teacher‖student), nats", "ce": "cross-entropy, nats", "top1_agreement": "same likeliest token"}


class Clock(TrainerCallback):
    """Ends training when its seconds are over, and says how much of them is gone. They begin after the first step, in
    which kernels are compiled.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.began, self.taken = seconds, math.inf, 0.0

    @property
    def share(self) -> float:
        return min(1.0, max(0.0, (time.perf_counter() - self.began) / self.seconds))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        self.began = min(self.began, now)
        self.taken = now - self.began
        control.should_training_stop = self.taken >= self.seconds

    def learning_rate(self, step: int) -> float:
        """Relative to the highest."""
        share = self.share
        return max(0.01, share / WARMUP) if share < WARMUP else 0.5 + 0.5 * math.cos(math.pi * share)


def cut_student(folder: str, layers: int, output: str) -> list[int]:
    """Saves the student, and says which layers it has."""
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    blocks = token_blocks(load_corpus(max_characters=100_000)["train"], tokenizer, LENGTH).select(range(CALIBRATION))
    keep = choose_layers(teacher, layers, "influence", [torch.tensor(blocks["input_ids"])])
    save_smaller(cut_layers(teacher, keep), tokenizer, output, {"layers": keep})
    return keep


def make_trainer(task: dict[str, Any], losses: list[dict[str, Any]], output: str, clock: Clock) -> DistillationTrainer:
    tokenizer = AutoTokenizer.from_pretrained(task["student"])
    files = {name: split.shuffle(0).take(min(task["files"], len(split))) for name, split in load_corpus().items()}
    data = {name: token_blocks(split, tokenizer, LENGTH) for name, split in files.items()}
    args = DistillationConfig(
        output_dir=output,
        losses=losses,
        max_steps=1_000_000,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    student = AutoModelForCausalLM.from_pretrained(task["student"], dtype=torch.float32)
    optimizer = AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    return DistillationTrainer(
        student,
        task["teacher"],
        args,
        train_dataset=data["train"],
        eval_dataset=data["test"].select(range(task["held_out"])),
        processing_class=tokenizer,
        callbacks=[clock],
        optimizers=(optimizer, LambdaLR(optimizer, clock.learning_rate)),
    )


def measure_case(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(os.cpu_count() or 1)
    losses, clock = [dict(term) for term in CASES[task["case"]]], Clock(task["seconds"])
    with tempfile.TemporaryDirectory() as output:
        before = make_trainer(task, losses, output, clock).evaluate()
        for term in losses:
            value = before[f"eval_{term['name']}"]  # 0 where only the last layers were cut
            term["weight"] = task["share"] * before["eval_kd"] / value if value else 1.0
        trainer = make_trainer(task, losses, output, clock)
        trainer.train()
        after = trainer.evaluate()
    figures = {
        name: {"before": before[f"eval_{name}"], "after": after[f"eval_{name}"]}
        for name in (*FIGURES, *(term["name"] for term in losses))
    }
    steps = trainer.state.global_step
    tokens_per_second = (steps - 1) * BATCH * LENGTH / clock.taken
    return {"figures": figures, "losses": losses, "steps": steps, "tokens_per_second": tokens_per_second}


def as_markdown(rows: dict[str, Any]) -> str:
    lines = [f"| learned from | steps | tokens/s | {' | '.join(FIGURES.values())} |", f"|---|{'---:|' * 5}"]
    before = next(iter(rows.values()))["figures"]
    lines.append(f"| nothing yet | | | {values_at(before, 'before')} |")
    for case, row in rows.items():
        values = values_at(row["figures"], "after")
        lines.append(f"| {case} | {row['steps']:,} | {row['tokens_per_second']:,.0f} | {values} |")
    return "\n".join(lines)


def values_at(figures: dict[str, dict[str, float]], when: str) -> str:
    return " | ".join(f"{figures[name][when]:.3f}" for name in FIGURES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required="--task" not in sys.argv, help="the folder of a causal LM")
    parser.add_argument("--layers", type=int, default=20, help="of the student; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=80, help="of training, each case; default: %(default)s")
    parser.add_argument("--share", type=float, default=0.5, help="of a term; default: %(default)s")
    parser.add_argument("--held_out", type=int, default=HELD_OUT, help="texts; default: %(default)s")
    parser.add_argument("--files", type=int, default=60, help="of each split; default: %(default)s")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json and NAME.md")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task is not None:
        print(json.dumps(measure_case(arguments.task)))
        return
    began, rows = time.perf_counter(), {}
    with tempfile.TemporaryDirectory() as student:
        kept = cut_student(arguments.model, arguments.layers, student)
        options = {name: getattr(arguments, name) for name in ("seconds", "share", "held_out", "files")}
        for case in CASES:
            row = in_fresh_process(__file__, {"case": case, "teacher": arguments.model, "student": student, **options})
            if "error" in row:
                sys.exit(f"{case}: {row['error']}")
            rows[case] = row
            print(f"{case}: {row['steps']} steps, KL {row['figures']['kl']['after']:.3f}", flush=True)
    table = as_markdown(rows)
    print(table)
    if arguments.output:
        intro = (
            f"{arguments.seconds:.0f} s of training each, batches of {BATCH} × {LENGTH} tokens; {arguments.held_out} "
            f"held-out texts. The student has the layers {', '.join(map(str, kept))}. A term begins at "
            f"{arguments.share:g} of the divergence."
        )
        found = {"layers": kept, "rows": rows}
        write_results(arguments.output, "Terms beside the logits", found, intro, table, began=began)


if __name__ == "__main__":
    main()
