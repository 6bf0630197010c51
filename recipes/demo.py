"""The demo: does a small model learn more from a teacher than from the text alone?

    accelerate launch recipes/demo.py                # or: make demo

On the embedded corpus (the sources of the Python standard library, no download) it trains a tokenizer, a teacher, and
then two students that share start, data and steps and differ in what they minimise: cross-entropy with the text, or
KL to the teacher on the same text. Students see little data, which is when people distil. Held-out files decide.

Writes a table (results.json, results.md) and learning curves (learning_curves.png) into --output_dir. The teacher is
trained once: a second run finds it there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.data.corpus import load_corpus, token_blocks, train_tokenizer
from llm_distill.publish.folder import require_unused
from llm_distill.ranks import ranks


@dataclass(frozen=True)
class Recipe:
    """Everything that the result depends on. Chosen so that the whole fits into five minutes on two CPU cores."""

    corpus_characters: int | None = None
    """How much of the embedded corpus; by default all."""
    vocab_size: int = 2048
    block: int = 128
    teacher_width: int = 160
    teacher_layers: int = 3
    teacher_steps: int = 800
    student_width: int = 64
    student_layers: int = 2
    student_steps: int = 300
    student_tokens: int = 100_000
    batch: int = 8
    learning_rate: float = 3e-3
    heldout_blocks: int = 128


@dataclass(frozen=True)
class Corpus:
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    short: Dataset
    """What students see."""
    heldout: Dataset


def prepare_corpus(recipe: Recipe) -> Corpus:
    files = load_corpus(max_characters=recipe.corpus_characters)
    tokenizer = train_tokenizer(files["train"], recipe.vocab_size)
    train, heldout = (
        token_blocks(files[split], tokenizer, recipe.block).shuffle(seed=0) for split in ("train", "test")
    )
    short = train.select(range(recipe.student_tokens // recipe.block))
    return Corpus(tokenizer, train, short, heldout.select(range(recipe.heldout_blocks)))


def make_model(recipe: Recipe, width: int, layers: int, seed: int) -> PreTrainedModel:
    set_seed(seed)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=recipe.vocab_size,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=recipe.block,
            tie_word_embeddings=True,
        )
    )


def make_config(folder: Path, recipe: Recipe, steps: int, seed: int, **options: Any) -> DistillationConfig:
    return DistillationConfig(
        output_dir=str(folder),
        max_steps=steps,
        seed=seed,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        weight_decay=0.1,
        per_device_train_batch_size=max(1, recipe.batch // PartialState().num_processes),
        per_device_eval_batch_size=32,
        eval_strategy="steps",
        eval_steps=steps // 3,
        logging_strategy="no",  # the evaluations say enough
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        bf16=None if torch.cuda.is_available() else False,  # models of this size gain nothing from it on a CPU
        dataset_kwargs={"skip_prepare_dataset": True},  # blocks of tokens already
        **options,
    )


def train(
    model: PreTrainedModel, teacher: LiveTeacher | None, data: Dataset, corpus: Corpus, args: DistillationConfig
) -> tuple[DistillationTrainer, float]:
    """The trainer after training, and the seconds that training took without its evaluations."""
    trainer = DistillationTrainer(
        model=model,
        teacher=teacher,
        args=args,
        train_dataset=data,
        eval_dataset=corpus.heldout,
        processing_class=corpus.tokenizer,
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    return trainer, seconds - sum(e["eval_runtime"] for e in trainer.state.log_history if "eval_runtime" in e)


def trained_teacher(folder: Path, recipe: Recipe, corpus: Corpus) -> tuple[PreTrainedModel, dict[str, float]]:
    """The teacher and its figures, from `folder` if it was trained there by the same recipe."""
    record = folder / "recipe.json"
    if record.is_file() and (found := json.loads(record.read_text()))["recipe"] == teacher_settings(recipe):
        PartialState().print(f"The teacher of an earlier run is in {folder}.")
        return AutoModelForCausalLM.from_pretrained(folder), found["figures"]
    PartialState().print("Training the teacher")
    model = make_model(recipe, recipe.teacher_width, recipe.teacher_layers, seed=0)
    args = make_config(folder, recipe, recipe.teacher_steps, seed=0, kd_weight=0.0, ce_weight=1.0)
    trainer, seconds = train(model, None, corpus.train, corpus, args)
    figures = {"ce": trainer.evaluate()["eval_ce"], "seconds": seconds, "parameters": model.num_parameters()}
    trainer.save_model(str(folder))
    if PartialState().is_main_process:
        record_teacher(folder, recipe, figures)
    PartialState().wait_for_everyone()
    return AutoModelForCausalLM.from_pretrained(folder), figures


def record_teacher(folder: Path, recipe: Recipe, figures: dict[str, float]) -> None:
    """Written last: a teacher whose training was cut short is not taken for a whole one."""
    record = {"recipe": teacher_settings(recipe), "figures": figures}
    (folder / "recipe.json").write_text(json.dumps(record, indent=2) + "\n")


def teacher_settings(recipe: Recipe) -> dict[str, Any]:
    settings = {name: value for name, value in asdict(recipe).items() if not name.startswith("student")}
    return settings | {"corpus": f"Python {platform.python_version()}"}


METHODS = {"text alone": {"kd_weight": 0.0, "ce_weight": 1.0}, "distilled": {"kd_weight": 1.0, "ce_weight": 0.0}}
FIGURES = {"ce": "eval_ce", "perplexity": "eval_perplexity", "kl": "eval_kl", "top1_agreement": "eval_top1_agreement"}


def train_students(
    folder: Path, recipe: Recipe, corpus: Corpus, teacher: LiveTeacher, seeds: int
) -> dict[str, list[dict[str, Any]]]:
    """Each method's runs, one a seed: figures on held-out text, and the learning curve. The first distilled is kept."""
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for seed in range(1, seeds + 1):
        for method, weights in METHODS.items():
            PartialState().print(f"Training a student: {method}, seed {seed} of {seeds}")
            model = make_model(recipe, recipe.student_width, recipe.student_layers, seed)
            is_kept = method == "distilled" and seed == 1
            output = folder / ("student" if is_kept else "others")
            args = make_config(output, recipe, recipe.student_steps, seed, **weights)
            trainer, seconds = train(model, teacher, corpus.short, corpus, args)
            history = [entry for entry in trainer.state.log_history if "eval_ce" in entry]
            final = {name: history[-1][key] for name, key in FIGURES.items()}
            curve = {entry["step"]: entry["eval_ce"] for entry in history}
            runs[method].append({**final, "seconds": seconds, "parameters": model.num_parameters(), "curve": curve})
            if is_kept:
                trainer.save_model()
                trainer.create_model_card("demo-student", dataset_name=None)
    return runs


def summarise(teacher: dict[str, float], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Means over the seeds, the spread (largest minus smallest), and how much of the gap to the teacher was closed."""
    rows = {"teacher": {**teacher, "perplexity": float(torch.tensor(teacher["ce"]).exp()), "spread": 0.0}}
    for method, each in runs.items():
        names = ("parameters", *FIGURES, "seconds")
        rows[method] = {name: statistics.fmean(run[name] for run in each) for name in names}
        rows[method]["spread"] = max(run["ce"] for run in each) - min(run["ce"] for run in each)
    text, distilled = rows["text alone"], rows["distilled"]
    gain = text["ce"] - distilled["ce"]
    return {
        "rows": rows,
        "gap_closed": gain / (text["ce"] - teacher["ce"]),
        "gain": gain,
        "wins": gain > max(text["spread"], distilled["spread"]),
    }


def as_markdown(summary: dict[str, Any], seeds: int) -> str:
    lines = [
        "| model | parameters | held-out loss | perplexity | KL to teacher | top-1 agreement | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in summary["rows"].items():
        spread = f" ± {row['spread'] / 2:.3f}" if row["spread"] else ""
        likeness = f"{row['kl']:.3f} | {row['top1_agreement']:.1%}" if "kl" in row else "0 | 100%"
        figures = f"{row['ce']:.3f}{spread} | {row['perplexity']:.1f} | {likeness} | {row['seconds']:.0f}"
        lines.append(f"| {name} | {row['parameters'] / 1e6:.2f} M | {figures} |")
    verdict = "more" if summary["wins"] else "NOT more"
    lines += [
        "",
        f"Distillation closed {summary['gap_closed']:.0%} of the gap between text alone and the teacher: "
        f"{summary['gain']:.3f} nats a token, {verdict} than the spread over {seeds} seed{'s' if seeds > 1 else ''}.",
    ]
    return "\n".join(lines)


def plot(path: Path, teacher: dict[str, float], runs: dict[str, list[dict[str, Any]]]) -> None:
    try:
        import matplotlib
    except ImportError:
        print(f"No {path.name}: install matplotlib (pip install 'llm-distill[plots]').")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for (method, each), colour in zip(runs.items(), ("#7a7a7a", "#c2410c"), strict=True):
        steps = list(each[0]["curve"])
        curves = [list(run["curve"].values()) for run in each]
        axes.plot(steps, [statistics.fmean(at) for at in zip(*curves, strict=True)], "o-", color=colour, label=method)
        low, high = ([end(at) for at in zip(*curves, strict=True)] for end in (min, max))
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.axhline(teacher["ce"], color="black", linestyle="--", linewidth=1, label="teacher")
    axes.set(xlabel="training step", ylabel="held-out loss (nats a token)", title="The same student, text and steps")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def as_options(values: dict[str, object]) -> list[str]:
    """Flags of a command."""
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def use_all_cores() -> None:
    """`accelerate launch` gives each process one thread unless told otherwise, which on a CPU wastes the others."""
    state = ranks()
    if state.device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // state.num_processes))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo"), help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="students per method; default: %(default)s")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error("--seeds must be at least 1")
    logging.set_verbosity_error()
    use_all_cores()
    folder, recipe = arguments.output_dir, Recipe()
    try:
        require_unused(folder / "student")
    except ValueError as error:
        parser.error(str(error))

    began = time.perf_counter()
    corpus = prepare_corpus(recipe)
    model, figures = trained_teacher(folder / "teacher", recipe, corpus)
    runs = train_students(folder, recipe, corpus, LiveTeacher(model, corpus.tokenizer), arguments.seeds)
    summary = summarise(figures, runs)
    if PartialState().is_main_process:
        table = as_markdown(summary, arguments.seeds)
        results = {"recipe": asdict(recipe), **summary, "runs": runs, "total_seconds": time.perf_counter() - began}
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (folder / "results.md").write_text(table + "\n")
        plot(folder / "learning_curves.png", figures, runs)
        print(f"\n{table}\n\nIn {results['total_seconds']:.0f} s. Table, curves, teacher and student are in {folder}.")


if __name__ == "__main__":
    main()
