"""Students that teach each other in one run: deep mutual learning (arXiv:1706.00384).

    accelerate launch recipes/peers.py --students A B --config run.yaml

Each student is saved in a folder of output_dir, `0`, `1`, …. A teacher that is named stands beside them all; without
one they have each other. All other options are those of `llm-distill train`; ce_weight is 1 unless it is given.

With no argument it runs on the embedded corpus and asks whether that helps: students that learn from the text alone,
that teach each other, and the same two beside the demo's teacher (trained on the first call). Held-out files decide.
Writes results.json and results.md into runs/peers; `--seeds 3` takes three times as long.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from demo import Corpus, Recipe, make_config, make_model, prepare_corpus, trained_teacher, use_all_cores
from transformers import PreTrainedModel
from transformers.utils import logging

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.cli.build import build_trainer
from llm_distill.cli.parsing import parse
from llm_distill.students.peers import Peers

FOLDER = Path("runs", "peers")


def train_named(students: Sequence[str], options: Sequence[str]) -> None:
    """Those that a person names, each with the same options."""
    parsed = [parse("train", ["--ce_weight", "1.0", *options, "--model_name_or_path", name]) for name in students]
    _, first, _, _ = parsed[0]
    name, folder, resume = first.teacher_model_name_or_path, Path(first.output_dir), first.resume_from_checkpoint
    peers = Peers(len(students), None if name is None else LiveTeacher.load(name))
    trainers = []
    for number, (script, args, model, _) in enumerate(parsed):
        args = dataclasses.replace(args, teacher_model_name_or_path=None, output_dir=str(folder / str(number)))
        trainers.append(build_trainer(script, args, model, peers[number]))
    peers.train(trainers, resume_from_checkpoint=str(resume).lower() == "true")
    for trainer in trainers:
        trainer.save_model()
        trainer.create_model_card(dataset_name=script.dataset_name)
        trainer.accelerator.print(f"A student is in {trainer.args.output_dir}.")


def train_on_corpus(
    students: Sequence[PreTrainedModel], taught: str, teacher: LiveTeacher, corpus: Corpus, recipe: Recipe, seed: int
) -> list[dict[str, float]]:
    """The figures of each student, with the seconds that all took together."""
    peers = Peers(len(students), teacher if "teacher" in taught else None) if taught != "text alone" else None
    weights = {"ce_weight": 1.0, "kd_weight": 0.0 if peers is None else 1.0}
    trainers = [
        DistillationTrainer(
            model=student,
            teacher=peers[number] if peers is not None else teacher,
            args=make_config(FOLDER / f"{number}", recipe, recipe.student_steps, seed, **weights),
            train_dataset=corpus.short,
            eval_dataset=corpus.heldout,
            processing_class=corpus.tokenizer,
        )
        for number, student in enumerate(students)
    ]
    for trainer in trainers:
        trainer.args.eval_strategy = "no"
    began = time.perf_counter()
    if peers is None:
        for trainer in trainers:
            trainer.train()
    else:
        peers.train(trainers)
    seconds = time.perf_counter() - began
    return [{"held-out loss": trainer.evaluate()["eval_ce"], "seconds of both": seconds} for trainer in trainers]


def compare(seeds: int) -> str:
    """The table, which is written too."""
    recipe = Recipe()
    corpus = prepare_corpus(recipe)
    teacher = LiveTeacher(trained_teacher(Path("runs", "demo", "teacher"), recipe, corpus)[0], corpus.tokenizer)
    runs: dict[str, list[dict[str, Any]]] = {}
    for seed in range(1, seeds + 1):
        for taught in ("text alone", "by each other", "by each other and a teacher"):
            PartialState().print(f"Training two students: {taught}, seed {seed} of {seeds}")
            students = [make_model(recipe, recipe.student_width, recipe.student_layers, 2 * seed + i) for i in (0, 1)]
            runs.setdefault(taught, []).extend(train_on_corpus(students, taught, teacher, corpus, recipe, seed))
    lines = ["| taught | held-out loss | seconds of both |", "|---|---:|---:|"]
    for taught, students in runs.items():
        losses, seconds = ([student[name] for student in students] for name in ("held-out loss", "seconds of both"))
        loss = f"{statistics.fmean(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"
        lines.append(f"| {taught} | {loss} | {statistics.fmean(seconds):.0f} |")
    if PartialState().is_main_process:
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / "results.json").write_text(json.dumps(runs, indent=2) + "\n")
        (FOLDER / "results.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--students", nargs="+", help="models or folders; two at least, or one beside a teacher")
    parser.add_argument("--seeds", type=int, default=1, help="of the comparison; default: %(default)s")
    arguments, options = parser.parse_known_args()
    use_all_cores()
    if arguments.students is not None:
        train_named(arguments.students, options)
        return
    if options:
        parser.error(f"{options[0]} needs --students: the comparison on the embedded corpus takes --seeds alone.")
    logging.set_verbosity_error()
    table = compare(arguments.seeds)
    PartialState().print(f"\n{table}\n\nOf the losses mean, least and most over students. The table is in {FOLDER}.")


if __name__ == "__main__":
    main()
