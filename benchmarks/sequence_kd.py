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
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import Dataset
from measure import write_results

sys.path.append(str(Path(__file__).parents[1] / "recipes"))
from few_samples import learn, make_model, share_right

from llm_distill import LiveTeacher
from llm_distill.data.sums import LARGEST, is_right, split_sums, tokenizer_of_digits
from llm_distill.generation import Sampling, TransformersEngine, generate, load_generated, make_filters, prompts_of

TAUGHT, ASKED, GOLD, HELD_OUT = 6000, 3000, 200, 1000
WIDTHS = {"teacher": 128, "student": 64}
TEACHER_STEPS, STUDENT_STEPS = 450, 600


def sums() -> dict[str, Dataset]:
    """Four sets of sums with nothing in common."""
    return split_sums(taught=TAUGHT, asked=ASKED, gold=GOLD, held_out=HELD_OUT)


def measure(seeds: int, folder: Path) -> dict[str, Any]:
    tokenizer, data = tokenizer_of_digits(), sums()
    began = time.perf_counter()
    model = learn(make_model(WIDTHS["teacher"], 0), data["taught"], TEACHER_STEPS, 0, folder)
    rows: dict[str, Any] = {"teacher": {"accuracy": share_right(model, data["held_out"]), "texts": TAUGHT}}
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
            student = make_model(WIDTHS["student"], seed)
            learn(student, learned, STUDENT_STEPS, seed, folder, tutor, ce_weight=1.0)
            found[name].append(share_right(student, data["held_out"]))
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
        size = {name: make_model(width, 0).num_parameters() / 1e3 for name, width in WIDTHS.items()}
        sizes = ", ".join(f"{name} {value:,.0f} k parameters" for name, value in size.items())
        intro = f"Sums of two numbers below {LARGEST}, {HELD_OUT:,} that nobody has seen; {sizes}; {args.seeds} seeds."
        write_results(args.output, "Learning from a teacher's texts", found, intro, table, began=began)


if __name__ == "__main__":
    main()
