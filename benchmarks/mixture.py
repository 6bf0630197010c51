"""Three teachers, each of one domain: what does a student of all three learn from their mixture?

    python benchmarks/mixture.py --output benchmarks/results/mixture_cpu

The teachers are trained here, each on one domain of the embedded corpus (those of `recipes/federated.py`). Students are
alike in start, steps and texts, which are of all three domains and which no teacher has seen. They differ in whom they
learn from: the text alone, one teacher, all by `mean`, by likelihood or entropy in each text, `geometric`, `best`,
`vote`, or, as the bound, by the domain that each text is of, which a column says. Figures are nats a token on held-out
texts of each domain, means over seeds of the student, and the largest minus the smallest over them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import torch
from datasets import Dataset, concatenate_datasets
from federated import DOMAINS, Recipe, blocks_of, losses_of, make_config, make_model, train
from measure import write_results
from transformers import PreTrainedModel

from llm_distill import DistillationTrainer, EnsembleTeacher, LiveTeacher, Teacher
from llm_distill.data.corpus import load_corpus, train_tokenizer

NAMES = ("web", "tasks", "building")
TEMPERATURE = 0.1
"""Nats a token: between a text of one's own domain and of another the teachers' losses differ by several tenths."""
RECIPE = Recipe(site_blocks=1200, site_steps=400, student_steps=300, heldout_blocks=32)
SHORT = replace(RECIPE, site_blocks=60, site_steps=10, student_steps=6, heldout_blocks=4)
MIXTURES: dict[str, dict[str, Any]] = {
    "mean": {},
    "mean by likelihood": {"weights_by": "likelihood", "temperature": TEMPERATURE},
    "mean by entropy": {"weights_by": "entropy", "temperature": TEMPERATURE},
    "geometric": {"mixture": "geometric"},
    "best": {"mixture": "best"},
    "vote": {"mixture": "vote"},
}


def teach(
    student: PreTrainedModel, teacher: Teacher | None, rows: Dataset, tokenizer: Any, recipe: Recipe, folder: Path
) -> float | None:
    """Trains it in place. How much the teachers differed, in nats."""
    options = {} if teacher is not None else {"kd_weight": 0.0, "ce_weight": 1.0}
    args = make_config(recipe, folder, recipe.student_steps, **options)
    trainer = DistillationTrainer(student, teacher, args, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return next((log["disagreement"] for log in trainer.state.log_history if "disagreement" in log), None)


def measure(recipe: Recipe, seeds: int, folder: Path) -> dict[str, Any]:
    """Each student's losses by domain and seed."""
    public = load_corpus()["train"].filter(lambda row: "/" not in row["file"])
    tokenizer = train_tokenizer(public.select(range(60)), recipe.vocab_size)
    heldout = {name: blocks_of(DOMAINS[name], "test", tokenizer, recipe) for name in NAMES}
    models, texts = {}, []
    for seed, name in enumerate(NAMES, 100):
        blocks = blocks_of(DOMAINS[name], "train", tokenizer, recipe)
        half = len(blocks) // 2
        own, others = blocks.select(range(half)), blocks.select(range(half, len(blocks)))
        texts.append(others.add_column("teacher", [name] * len(others)))
        models[name] = make_model(recipe, seed)
        train(
            models[name], tokenizer, own, make_config(recipe, folder, recipe.site_steps, kd_weight=0.0, ce_weight=1.0)
        )
    rows = concatenate_datasets(texts).shuffle(seed=0)
    unnamed = rows.remove_columns("teacher")
    teachers = {name: LiveTeacher(model, tokenizer) for name, model in models.items()}
    members, names = list(teachers.values()), list(teachers)
    learned_from: dict[str, tuple[Teacher | None, Dataset]] = {"the text alone": (None, unnamed)}
    learned_from |= {f"{name} alone": (teacher, unnamed) for name, teacher in teachers.items()}
    for name, options in MIXTURES.items():
        learned_from[name] = (EnsembleTeacher(members, names=names, **options), unnamed)
    learned_from["by domain"] = (EnsembleTeacher(members, names=names), rows)

    found: dict[str, Any] = {name: {"losses": [], "disagreement": None} for name in learned_from}
    for seed in range(1, seeds + 1):
        for name, (teacher, data) in learned_from.items():
            student = make_model(recipe, seed)
            found[name]["disagreement"] = teach(student, teacher, data, tokenizer, recipe, folder)
            found[name]["losses"].append(losses_of(student, heldout))
            print(f"seed {seed}, {name}: {found[name]['losses'][-1]}", flush=True)
    return {"teachers": {name: losses_of(model, heldout) for name, model in models.items()}, "students": found}


def as_markdown(found: dict[str, Any]) -> str:
    lines = ["| learned from | " + " | ".join(NAMES) + " | mean | spread | teachers differ by |"]
    lines.append("|---|" + "---:|" * (len(NAMES) + 3))
    for name, student in found["students"].items():
        means = [statistics.fmean(losses[domain] for losses in student["losses"]) for domain in NAMES]
        of_seeds = [statistics.fmean(losses.values()) for losses in student["losses"]]
        differ = "" if student["disagreement"] is None else f"{student['disagreement']:.3f}"
        cells = [f"{value:.3f}" for value in (*means, statistics.fmean(of_seeds), max(of_seeds) - min(of_seeds))]
        lines.append(f"| {name} | {' | '.join(cells)} | {differ} |")
    for name, losses in found["teachers"].items():
        cells = [f"{value:.3f}" for value in (*losses.values(), statistics.fmean(losses.values()))]
        lines.append(f"| *the teacher of {name} itself* | {' | '.join(cells)} | | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="students of each kind; default: %(default)s")
    parser.add_argument("--short", action="store_true", help="in tiny sizes, to see that it runs")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json and NAME.md")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(SHORT if arguments.short else RECIPE, arguments.seeds, Path(folder))
    table = as_markdown(found)
    print(table)
    if arguments.output:
        intro = f"Nats a token on held-out texts of three domains; means of {arguments.seeds} seeds, and their spread."
        content = {"seeds": arguments.seeds, **found}
        write_results(arguments.output, "A mixture of three teachers", content, intro, table, began=began)


if __name__ == "__main__":
    main()
