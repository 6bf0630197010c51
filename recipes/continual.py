"""Continual distillation: domains one after the other, and what is forgotten of those before.

    accelerate launch recipes/continual.py --config run.yaml --domains code=code.jsonl mail=mail.jsonl:train

It takes every option of `llm-distill train` but a dataset. Each domain is a stage, in which the student of the last one
goes on:

    naive                 the domain's own texts, and the teacher
    replay                a share of the rows are texts of the stages before (a reservoir on disk)
    previous student      the student of the last stage is a second teacher, as in learning without forgetting
                          (Li & Hoiem, 2016, arXiv:1606.09282)
    both

A tenth of each domain's rows is held out. continual.md in output_dir has for each method the mean loss over the domains
after the last stage, backward transfer and the loss on each domain after each stage.

With no option it runs on four packages of the embedded corpus, with the demo's teacher (trained on the first call).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from accelerate import PartialState
from datasets import Dataset
from demo import as_options, use_all_cores
from token_kl import embedded_defaults
from trl import get_peft_config, get_quantization_config

from llm_distill import DistillationTrainer, EnsembleTeacher, LiveTeacher
from llm_distill.cli.parsing import errors_in_one_line, parse
from llm_distill.data.corpus import load_corpus
from llm_distill.data.earlier import EarlierTexts
from llm_distill.data.load import load_split
from llm_distill.evaluation.compare import HeldOutTexts
from llm_distill.evaluation.domains import usable_rows
from llm_distill.evaluation.stages import Losses, stage_figures, stage_parts, text_losses
from llm_distill.evaluation.statistics import format_interval
from llm_distill.publish.folder import require_unused
from llm_distill.tables import Table

Domains = dict[str, tuple[Dataset, Dataset]]
"""Of each, in order, the texts to learn from and those held out."""
FOLDER = Path("runs", "continual")
PACKAGES = ("encodings", "email", "asyncio", "xml")
CHARACTERS, PASSAGES = 400, 500
METHODS = {"naive": (False, False), "replay": (True, False), "previous student": (False, True), "both": (True, True)}
"""Whether earlier texts are learned from again, and whether the previous student is a second teacher."""
SHARE, MAX_BYTES = 0.3, 2**26
PREVIOUS_WEIGHT = 0.5
"""Of the previous student in the mixture; the teacher has the rest. For forward KL, the gradient is as of two terms."""


def packages() -> dict[str, Dataset]:
    """Passages of four packages of the standard library, which have little in common."""
    files = load_corpus()["train"]
    passages: dict[str, list[str]] = {name: [] for name in PACKAGES}
    for name, text in zip(files["file"], files["text"], strict=True):
        if (package := name.partition("/")[0]) in passages:
            passages[package] += [text[place : place + CHARACTERS] for place in range(0, len(text), CHARACTERS)]
    return {name: Dataset.from_dict({"text": texts}).shuffle(seed=0).take(PASSAGES) for name, texts in passages.items()}


def split_domains(datasets: dict[str, Dataset]) -> Domains:
    """A tenth of each is held out. Raises ValueError for a sequence that is none, before the first stage."""
    if len(datasets) < 2:
        raise ValueError("--domains: two at least, NAME=SOURCE each, in the order in which they are learned.")
    domains: Domains = {}
    for place, (name, dataset) in enumerate(datasets.items(), 1):
        rows = usable_rows(dataset)
        if len(rows) < 2:
            raise ValueError(f"stage {place}, {name}, has {len(rows)} texts: leave it out, or give it some.")
        parts = rows.train_test_split(max(1, len(rows) // 10), seed=0)
        domains[name] = (parts["train"], parts["test"])
    return domains


def learn(
    options: list[str], folder: Path, domains: Domains, name: str, start: str | None, earlier: EarlierTexts | None
) -> dict[str, Losses]:
    """One stage, saved in `folder`; its losses on every domain.

    Args:
        start: the student of the last stage if it is a second teacher, or none.
        earlier: what is learned from again.
    """
    _, args, model, _ = parse("train", options)
    args.output_dir = str(folder)
    args.eval_strategy = "no"
    require_unused(folder)
    texts, teacher = domains[name][0], None
    if start is not None:
        both = [LiveTeacher.load(name) for name in (args.teacher_model_name_or_path, start)]
        teacher, args.teacher_model_name_or_path = EnsembleTeacher(both, [1 - PREVIOUS_WEIGHT, PREVIOUS_WEIGHT]), None
    trainer = DistillationTrainer(
        model=model.model_name_or_path,
        teacher=teacher,
        args=args,
        train_dataset=texts if earlier is None else earlier.add_to(texts),
        eval_dataset={name: held_out for name, (_, held_out) in domains.items()},
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    trainer.train()
    trainer.save_model(_internal_call=True)
    if earlier is not None:
        earlier.remember(texts)
    data, size = trainer.data, args.per_device_eval_batch_size
    return {
        domain: text_losses(trainer.model, HeldOutTexts(rows, data.collate, data.tokenizer, size, domain))
        for domain, rows in data.evaluation.items()
    }


def learn_all(options: list[str], folder: Path, domains: Domains, method: str) -> list[dict[str, Losses]]:
    """The losses on every domain after every stage of a method."""
    replays, has_two_teachers = METHODS[method]
    place = folder / method.replace(" ", "_")
    earlier = EarlierTexts(place, SHARE, MAX_BYTES) if replays else None
    stages, student = list[dict[str, Losses]](), None
    for name in domains:
        PartialState().print(f"\n{method}: {name}", flush=True)
        start = [] if student is None else as_options({"model_name_or_path": student})
        second = str(student) if has_two_teachers and student is not None else None
        stages.append(learn([*options, *start], place / name, domains, name, second, earlier))
        student = place / name
    return stages


def report(results: dict[str, list[dict[str, Losses]]]) -> str:
    """In Markdown: the methods beside each other, and each by domain and stage."""
    figures = {method: stage_figures(stages) for method, stages in results.items()}
    rows = [
        [method, format_interval(of["average"][-1]), format_interval(of["backward_transfer"], "+.3f")]
        for method, of in figures.items()
    ]
    parts = [Table(["", "mean loss at the end", "backward transfer"], rows).markdown()]
    for method, of in figures.items():
        table, *said = stage_parts(of)
        assert isinstance(table, Table)
        parts += [f"## {method}", table.markdown()]
    return "\n\n".join([*parts, str(said[-1])]) + "\n"


def run(options: list[str], domains: Domains, folder: Path, methods: tuple[str, ...] = tuple(METHODS)) -> str:
    """Every method, and what `report` says of them; in `folder` as continual.md and, in numbers, continual.json."""
    results = {method: learn_all(options, folder, domains, method) for method in methods}
    text = report(results)
    if PartialState().is_main_process:
        (folder / "continual.md").write_text(text)
        content = {method: stage_figures(stages) for method, stages in results.items()}
        (folder / "continual.json").write_text(json.dumps(content, indent=1) + "\n")
    return text


def embedded() -> list[str]:
    """Options of a stage on the embedded corpus, which begins with a warm-up: the student goes on from a low rate."""
    more: dict[str, Any] = {"max_steps": 80, "warmup_steps": 8, "packing": False, "output_dir": FOLDER}
    return [*embedded_defaults(), *as_options(more)]


@errors_in_one_line
def main(argv: list[str]) -> None:
    """Its own option, and those of `llm-distill train`."""
    if {*argv} & {"-h", "--help", "--help-all"}:
        print(__doc__)
        parse("train", argv)  # which shows them, and ends
    if "--domains" in argv:
        first = argv.index("--domains") + 1
        count = next((n for n, word in enumerate(argv[first:]) if word.startswith("--")), len(argv) - first)
        named = [word.partition("=") for word in argv[first : first + count]]
        datasets = {name: load_split(source, preferred=("train",)) for name, _, source in named if source}
        options = [*argv[: first - 1], *argv[first + count :]]
    else:
        datasets, options = packages(), [*embedded(), *argv]
    domains = split_domains(datasets)
    _, args, _, _ = parse("train", options)
    PartialState().print(f"\n{run(options, domains, Path(args.output_dir))}")


if __name__ == "__main__":
    use_all_cores()
    main(sys.argv[1:])
