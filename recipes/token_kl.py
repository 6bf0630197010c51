"""Token-level distillation: every option of `llm-distill train`, launched on as many ranks as you like.

    accelerate launch recipes/token_kl.py --config run.yaml --learning_rate 1e-4

With no student named it runs on the embedded corpus: the demo's teacher (trained on the first call) teaches a student
with random weights.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

from accelerate import PartialState
from demo import Recipe, make_model, prepare_corpus, trained_teacher, use_all_cores

from llm_distill.cli.train import train
from llm_distill.data.corpus import NAME


@functools.cache  # reading the corpus takes half a minute
def embedded_defaults(folder: Path = Path("runs"), has_teacher: bool = True) -> list[str]:
    """Options for a small run without downloads: student and data, and the teacher unless there is to be none."""
    recipe = Recipe()
    corpus = prepare_corpus(recipe)
    if has_teacher:
        trained_teacher(folder / "demo" / "teacher", recipe, corpus)
    student = folder / "token_kl" / "start"
    if PartialState().is_main_process:
        make_model(recipe, recipe.student_width, recipe.student_layers, seed=1).save_pretrained(student)
        corpus.tokenizer.save_pretrained(student)
    PartialState().wait_for_everyone()
    options = {
        "model_name_or_path": student,
        **({"teacher_model_name_or_path": folder / "demo" / "teacher"} if has_teacher else {}),
        "dataset_name": NAME,
        "output_dir": folder / "token_kl" / "student",
        "packing": True,
        "packing_strategy": "wrapped",
        "max_length": recipe.block,
        "max_steps": 200,
        "per_device_train_batch_size": recipe.batch,
        "learning_rate": recipe.learning_rate,
        "save_strategy": "no",
        "report_to": "none",
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


if __name__ == "__main__":
    use_all_cores()
    options = sys.argv[1:]
    named = {option.split("=")[0] for option in options} & {"--config", "--model_name_or_path", "--help", "-h"}
    train(options if named else [*embedded_defaults(), *options])
