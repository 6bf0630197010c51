"""The demo on a real model: SmolLM2-135M-Instruct, cut to 24 of its 30 layers, and taught by itself to talk again.

    python recipes/demo_real.py                      # or: make demo-real

The model comes from the package index (93 MB), no Hub is asked. The layers that change a text least are left out; the
whole model answers some questions; the student learns its distributions on those answers and on documentation. Then
teacher, cut model and student are asked three questions that are in no text. A table, learning curves and the answers
come into --output_dir (results.md, results.json, learning_curves.png).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from demo import use_all_cores
from smollm2 import documentation, fetch_model, questions
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.data.corpus import token_blocks
from llm_distill.generation import Sampling, TransformersEngine
from llm_distill.models import LanguageModel
from llm_distill.publish.folder import require_unused
from llm_distill.students.choose import choose_layers
from llm_distill.students.cut import cut_layers

QUESTIONS_ANSWERED, HELD_OUT_ANSWERS, ANSWER_TOKENS = 128, 32, 64
PASSAGES, HELD_OUT_PASSAGES = 160, 32
BATCH, EPOCHS, LEARNING_RATE = 8, 2, 4e-4
ASKED = ("What is the capital of France?", "Why is the sky blue?", "Write a short greeting to a new colleague.")
FIGURES = {"loss": "eval_{}_ce", "kl": "eval_{}_kl", "agreement": "eval_{}_top1_agreement"}


class Talk:
    """Asks a model, as its chat template has it, and takes the likeliest answer. In float32: bfloat16 rounds off what
    makes a small model's token the likeliest.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.author, self.tokenizer = LanguageModel(model, tokenizer), tokenizer

    def answers(self, asked: Sequence[str], tokens: int = ANSWER_TOKENS) -> list[str]:
        engine = TransformersEngine(self.author, Sampling(max_new_tokens=tokens, temperature=0))
        prompts = [self.tokenizer(self.conversation(question))["input_ids"] for question in asked]
        written = dict(engine.complete(prompts))
        return [written[place][0].text.strip() for place in range(len(prompts))]

    def conversation(self, question: str, answer: str | None = None) -> str:
        """As text: with the answer, or up to where it begins."""
        messages = [{"role": "user", "content": question}]
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer is None)


def texts_to_learn_from(teacher: Talk) -> tuple[Dataset, dict[str, Dataset]]:
    """Training texts, and what is held out of each kind."""
    asked = questions()[: QUESTIONS_ANSWERED + HELD_OUT_ANSWERS]
    conversations = [teacher.conversation(*both) for both in zip(asked, teacher.answers(asked), strict=True)]
    answered = Dataset.from_dict({"text": conversations})
    passages = documentation()
    kinds = {
        "answers": (answered.skip(HELD_OUT_ANSWERS), answered.take(HELD_OUT_ANSWERS)),
        "documentation": (passages["train"].take(PASSAGES), passages["test"].take(HELD_OUT_PASSAGES)),
    }
    train = concatenate_datasets([train for train, _ in kinds.values()]).shuffle(seed=0)
    return train, {name: held_out for name, (_, held_out) in kinds.items()}


def distil(
    student: PreTrainedModel, teacher: Talk, train: Dataset, held_out: dict[str, Dataset], folder: Path
) -> list[dict[str, Any]]:
    """Trains and saves the student. What was measured before, between and after."""
    steps = EPOCHS * -(-len(train) // BATCH)
    args = DistillationConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=16,
        train_sampling_strategy="group_by_length",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        max_length=512,
        gradient_checkpointing=False,
        eval_strategy="steps",
        eval_steps=steps // 4,
        eval_on_start=True,
        logging_steps=5,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = DistillationTrainer(
        student, LiveTeacher(teacher.author), args, train_dataset=train, eval_dataset=held_out
    )
    trainer.train()
    trainer.save_model()
    return measured(trainer.state.log_history, held_out)


def measured(log: Sequence[dict[str, Any]], kinds: Iterable[str]) -> list[dict[str, Any]]:
    """Of each step at which it was evaluated, of each kind of text its FIGURES."""
    steps: dict[int, dict[str, Any]] = {}
    for entry in log:
        for kind in kinds:
            if f"eval_{kind}_kl" in entry:
                figures = {name: entry[key.format(kind)] for name, key in FIGURES.items()}
                steps.setdefault(entry["step"], {"step": entry["step"]})[kind] = figures
    return list(steps.values())


def as_markdown(results: dict[str, Any]) -> str:
    """The table, and the answers side by side."""
    kinds = [name for name in results["curve"][0] if name != "step"]
    heads = [f"{figure}, {kind}" for kind in kinds for figure in ("KL to teacher", "agreement")]
    lines = ["| model | layers | parameters | " + " | ".join(heads) + " |", "|---|---:|---:|" + "---:|" * len(heads)]
    lines.append(
        f"| teacher | {results['layers'][0]} | {results['parameters'][0] / 1e6:.1f} M" + " | 0 | 100%" * 2 + " |"
    )
    for name, entry in (("cut", results["curve"][0]), ("distilled", results["curve"][-1])):
        figures = " | ".join(f"{entry[kind]['kl']:.3f} | {entry[kind]['agreement']:.0%}" for kind in kinds)
        lines.append(f"| {name} | {results['layers'][1]} | {results['parameters'][1] / 1e6:.1f} M | {figures} |")
    for question, said in results["answers"].items():
        lines += ["", f"**{question}**", ""]
        lines += [f"- {name}: {' '.join(text.split())}" for name, text in said.items()]
    return "\n".join(lines)


def plot(path: Path, curve: list[dict[str, Any]]) -> None:
    try:
        import matplotlib
    except ImportError:
        print(f"No {path.name}: install matplotlib (pip install 'llm-distill[plots]').")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    for kind, colour in zip((name for name in curve[0] if name != "step"), ("#c2410c", "#1d4ed8"), strict=False):
        axes.plot(
            [entry["step"] for entry in curve], [entry[kind]["kl"] for entry in curve], "o-", color=colour, label=kind
        )
    axes.set(xlabel="training step", ylabel="KL(teacher‖student), nats a token", ylim=(0, None))
    axes.set_title("A cut model learns to say what it said whole (held-out texts)")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs/demo-real"), help="default: %(default)s")
    parser.add_argument("--model", type=Path, default=Path("runs/smollm2"), help="fetched if not there: %(default)s")
    parser.add_argument("--layers", type=int, default=24, help="that are kept; default: %(default)s")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    use_all_cores()
    folder = arguments.output_dir
    try:
        require_unused(folder / "student")
    except ValueError as error:
        parser.error(str(error))
    began = time.perf_counter()
    fetch_model(arguments.model)
    model = LanguageModel.load(str(arguments.model), dtype=torch.float32)
    teacher = Talk(model.model, model.require_tokenizer("teacher"))
    train, held_out = texts_to_learn_from(teacher)
    print(f"{len(train)} texts after {time.perf_counter() - began:.0f} s")
    blocks = torch.tensor(token_blocks(train.take(64), teacher.tokenizer, 128)["input_ids"]).split(8)
    keep = choose_layers(model.model, arguments.layers, "influence", blocks)
    student = cut_layers(model.model, keep)
    said = {"teacher": teacher.answers(ASKED), "cut": Talk(student, teacher.tokenizer).answers(ASKED)}
    curve = distil(student, teacher, train, held_out, folder / "student")
    said["distilled"] = Talk(student, teacher.tokenizer).answers(ASKED)
    results = {
        "layers": [model.model.config.num_hidden_layers, len(keep)],
        "kept": list(keep),
        "parameters": [model.model.num_parameters(), student.num_parameters()],
        "curve": curve,
        "answers": {question: {who: all_said[i] for who, all_said in said.items()} for i, question in enumerate(ASKED)},
        "seconds": time.perf_counter() - began,
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    table = as_markdown(results)
    (folder / "results.md").write_text(table + "\n")
    plot(folder / "learning_curves.png", curve)
    print(f"\n{table}\n\nIn {results['seconds']:.0f} s. Table, curve and student are in {folder}.")


if __name__ == "__main__":
    main()
