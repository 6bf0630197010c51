"""Born-again students: each generation learns from the one before (Furlanello et al., 2018, arXiv:1805.04770).

    accelerate launch recipes/born_again.py --config run.yaml --generations 4

It takes every option of `llm-distill train`. The teacher that they name is generation 0 (without one it is the student
itself, trained on the text alone), and the first generation plain distillation from it. With `--ensemble` a generation
learns from the mixture of all before it. It ends with the first generation whose held-out loss is not lower than that
of the one before by more than chance: the 95 % interval of the difference, over texts, reaches 0.

Unlike in the paper, every generation begins from the same weights, those of the student that is named; what differs is
the order of the data.

With no option it runs on the embedded corpus, with a student as its own first teacher. output_dir has a folder for each
generation and the table, generations.md.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from demo import as_options, use_all_cores
from token_kl import embedded_defaults

from llm_distill import EnsembleTeacher, LiveTeacher
from llm_distill.cli.build import build_trainer, require_free_folder
from llm_distill.cli.parsing import errors_in_one_line, parse
from llm_distill.evaluation.compare import HeldOutTexts
from llm_distill.evaluation.stages import Losses, increase, text_losses
from llm_distill.evaluation.statistics import format_interval
from llm_distill.tables import Table

GENERATIONS = 4
TEXT_ALONE: dict[str, Any] = {"kd_weight": 0.0, "ce_weight": 1.0}


class Generation(NamedTuple):
    """A student and its losses on held-out texts."""

    name: str
    folder: Path
    losses: Losses


def embedded() -> list[str]:
    """Options for a small run without downloads: few texts, which are read several times."""
    more = {
        "dataset_train_split": "train[:6]",
        "output_dir": Path("runs", "born_again"),
        "max_steps": 250,
        "kd_weight": 0.5,
        "ce_weight": 0.5,
    }
    return [*embedded_defaults(has_teacher=False), *as_options(more)]


def train_generation(options: list[str], name: str, teachers: list[Path], **changed: Any) -> Generation:
    """A student that learns from the mixture of these, or from the text alone."""
    script, args, model, _ = parse("train", [*options, *as_options(changed)])
    folder = Path(args.output_dir, name)
    args.output_dir, args.seed = str(folder), args.seed + (int(name) if name.isdigit() else 0)
    teacher = EnsembleTeacher([LiveTeacher.load(str(path)) for path in teachers]) if len(teachers) > 1 else None
    args.teacher_model_name_or_path = str(teachers[0]) if len(teachers) == 1 else None
    if teachers and teachers[0].name.isdigit():
        args.teacher_model_revision = None  # that of the first teacher
    require_free_folder(script, args, model)
    trainer = build_trainer(script, args, model, teacher)
    if trainer.eval_dataset is None:
        raise ValueError(
            f"generations are compared on held-out texts, and {script.dataset_name!r} has no split "
            f"{script.dataset_test_split!r}: name one with --dataset_test_split."
        )
    trainer.train()
    trainer.save_model(_internal_call=True)
    data = trainer.data
    (texts,) = data.evaluation.values()
    held_out = HeldOutTexts(texts, data.collate, data.tokenizer, args.per_device_eval_batch_size)
    return Generation(name, folder, text_losses(trainer.model, held_out))


def raise_generations(options: list[str], most: int = GENERATIONS, ensemble: bool = False) -> list[Generation]:
    """All generations that were trained; the last may be no better than the one before."""
    _, args, _, _ = parse("train", options)
    named = args.teacher_model_name_or_path
    generations, teachers = list[Generation](), [Path(named)] if named else []
    if not named:
        generations.append(train_generation(options, "0", [], **TEXT_ALONE))
        teachers.append(generations[0].folder)
    for number in range(1, most + 1):
        generation = train_generation(options, str(number), teachers if ensemble else teachers[-1:])
        generations.append(generation)
        teachers.append(generation.folder)
        PartialState().print(f"\n{table_of(generations)}\n", flush=True)
        if len(generations) > 1 and increase(generations[-2].losses, generation.losses)["high"] >= 0:
            break
    return generations


def table_of(generations: list[Generation]) -> str:
    """In Markdown, with the change from each generation to the next."""
    rows = []
    for place, generation in enumerate(generations):
        change = increase(generations[place - 1].losses, generation.losses) if place else None
        losses = [format_interval(generation.losses.mean()), format_interval(change, "+.4f") if change else ""]
        rows.append([generation.name, *losses])
    return Table(["generation", "held-out loss", "change"], rows).markdown()


@errors_in_one_line
def main(argv: list[str]) -> None:
    """Its own two options, and those of `llm-distill train`."""
    options, ensemble, most = [option for option in argv if option != "--ensemble"], "--ensemble" in argv, GENERATIONS
    if "--generations" in options:
        place = options.index("--generations")
        most = int("".join(options[place + 1 : place + 2]) or 0)
        options = [*options[:place], *options[place + 2 :]]
    if most < 1:
        raise ValueError("--generations must be at least 1.")
    named = {option.split("=")[0] for option in options} & {"--config", "--model_name_or_path", "--help", "-h"}
    options = options if named else [*embedded(), *options]
    generations = raise_generations(options, most, ensemble)
    best = min(generations, key=lambda generation: generation.losses.mean()["value"])
    if PartialState().is_main_process:
        (best.folder.parent / "generations.md").write_text(table_of(generations) + "\n")
        print(f"The best is generation {best.name}, in {best.folder}.")


if __name__ == "__main__":
    use_all_cores()
    main(sys.argv[1:])
