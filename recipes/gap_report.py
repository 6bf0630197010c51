"""The gap report: every option of `llm-distill evaluate`, on as many ranks as you like.

    accelerate launch recipes/gap_report.py --student student --teacher teacher --data held_out.jsonl

With no student named it reports on the demo's (trained on the first call), on the embedded corpus.
"""

from __future__ import annotations

import sys
from pathlib import Path

from demo import Recipe, prepare_corpus, train_students, trained_teacher, use_all_cores

from llm_distill import LiveTeacher
from llm_distill.cli.evaluate import evaluate
from llm_distill.data.corpus import NAME


def embedded_defaults(folder: Path = Path("runs", "demo")) -> list[str]:
    """Options for a report without downloads: the demo's teacher and student, and held-out files."""
    recipe = Recipe()
    corpus = prepare_corpus(recipe)
    teacher, _ = trained_teacher(folder / "teacher", recipe, corpus)
    if not (folder / "student" / "config.json").is_file():
        train_students(folder, recipe, corpus, LiveTeacher(teacher, corpus.tokenizer), seeds=1)
    models = ["--student", str(folder / "student"), "--teacher", str(folder / "teacher")]
    return [*models, "--data", NAME, "--max_new_tokens", "32", "--output_dir", str(folder / "gap_report")]


if __name__ == "__main__":
    use_all_cores()
    options = sys.argv[1:]
    named = {option.split("=")[0] for option in options} & {"--config", "--student", "--help", "-h"}
    evaluate(options if named else [*embedded_defaults(), *options])
