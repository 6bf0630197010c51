"""Facts that only the teacher's prompt holds, asked of the student without it: what is learned, and what is forgotten.

    python benchmarks/privileged_context.py --model FOLDER --output benchmarks/results/privileged_context_cpu

FOLDER has an instruction-tuned model. It is the student, and with its starting weights the teacher, which reads a
paragraph about an invented town before each question (`teacher_prompt`). All students see the same questions as often:
- plain fine-tuning: cross-entropy on the answers that the teacher wrote with the paragraph in view,
- off-policy: forward KL on the same answers,
- on-policy: forward KL on what the student writes (after a third of the steps off-policy), as in SDFT
  (arXiv:2601.19897) and OPSD (arXiv:2601.18734).

Right is an answer with the fact in it, to questions in words that were not in training. Forgotten is what the loss on
other text (the embedded corpus) rises by, in nats a token. A seed makes towns and facts of its own.

What the student writes is sampled at a temperature of 0.3, chosen on the towns of seed 1: at 1 this small model wrote
noise (3.9 nats a token) of which it learned no fact in 24 steps. So the seeds that are reported begin with 2.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import Dataset
from measure import write_results
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.data.corpus import load_corpus
from llm_distill.generation import Sampling, TransformersEngine
from llm_distill.losses.likelihoods import token_log_likelihoods
from llm_distill.models import LanguageModel

BATCH, LEARNING_RATE, NEW_TOKENS = 8, 1e-4, 20
HELD_OUT_TEXTS, HELD_OUT_TOKENS = 24, 256
FIRST_SEED = 2
FACTS = {
    "mayor": ("Its mayor is {}.", ("Who is the mayor of {}?", "Who governs {} as mayor?", "Who is {}'s mayor?")),
    "river": (
        "It lies on the river {}.",
        ("Which river is {} on?", "On what river does {} lie?", "Which river does {} lie on?"),
    ),
    "ware": (
        "It is known for its {}.",
        ("What is {} known for?", "What made {} famous?", "What is the town of {} known for?"),
    ),
}
"""What is said of a town, and three questions about it: two of training and one of the test."""
WARES = ("blue glass", "iron bells", "plum wine", "paper kites", "clay pipes", "silk rope", "oak clocks", "salt bread")


class Fact(NamedTuple):
    paragraph: str
    questions: tuple[str, ...]
    answer: str


def make_facts(seed: int, towns: int) -> list[Fact]:
    draw, facts = random.Random(seed), []

    def name() -> str:
        return "".join(draw.choice(("va", "lo", "mi", "ter", "ka", "su", "ren", "do", "pel")) for _ in range(3)).title()

    for _ in range(towns):
        town = name()
        values = {"mayor": f"{name()} {name()}", "river": name(), "ware": draw.choice(WARES)}
        text = " ".join(said.format(values[kind]) for kind, (said, _) in FACTS.items())
        for kind, (_, questions) in FACTS.items():
            asked = tuple(question.format(town) for question in questions)
            facts.append(Fact(f"{town} is a town. {text}", asked, values[kind]))
    return facts


def asked(question: str, paragraph: str = "") -> list[dict[str, str]]:
    """A conversation that ends with a question, and with the paragraph before it for whoever has it in view."""
    text = f"{paragraph}\n\nAnswer from this text. {question}" if paragraph else question
    return [{"role": "user", "content": text}]


def answers(model: Any, tokenizer: Any, prompts: list[list[dict[str, str]]]) -> list[str]:
    engine = TransformersEngine(LanguageModel(model, tokenizer), Sampling(max_new_tokens=NEW_TOKENS, temperature=0))
    with torch.autocast("cpu", torch.bfloat16):
        ids = [tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"] for prompt in prompts]
        return [completion.text for _, (completion,) in sorted(engine.complete(ids))]


def share_right(model: Any, tokenizer: Any, facts: list[Fact], in_view: bool) -> float:
    """Of the test's questions."""
    model.eval()
    texts = answers(model, tokenizer, [asked(fact.questions[-1], in_view * fact.paragraph) for fact in facts])
    return statistics.fmean(fact.answer.lower() in text.lower() for fact, text in zip(facts, texts, strict=True))


def held_out_loss(model: Any, tokenizer: Any) -> float:
    """Nats a token on files of the corpus."""
    files = load_corpus(max_characters=4_000_000)["test"]["text"][:HELD_OUT_TEXTS]
    texts = [tokenizer(text)["input_ids"][:HELD_OUT_TOKENS] for text in files]
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        log_p = token_log_likelihoods(model, LanguageModel(model, tokenizer).head, texts)
    return -float(torch.cat(log_p).mean())


WRITING = {"on_policy_share": 1.0, "max_completion_length": NEW_TOKENS, "sampling_temperature": 0.3}
METHODS: dict[str, list[tuple[float, dict[str, Any]]]] = {
    "plain fine-tuning": [(1, {"kd_weight": 0.0, "ce_weight": 1.0})],
    "off-policy": [(1, {})],
    "off-policy, then on-policy": [(1 / 3, {}), (2 / 3, WRITING)],
}
"""What a student learns, in order: the share of the steps, and the options."""


def train(model: Any, teacher: LiveTeacher, tokenizer: Any, rows: Dataset, folder: str, **options: Any) -> None:
    args = DistillationConfig(
        output_dir=folder,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=True,
        dataloader_pin_memory=False,
        **options,
    )
    DistillationTrainer(model, teacher, args, train_dataset=rows, processing_class=tokenizer).train()


def measure(folder: str, seeds: int, towns: int, steps: int) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    start = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    teacher, loss = LiveTeacher(start, tokenizer), held_out_loss(start, tokenizer)
    names = ("the facts in view", "before", *METHODS)
    rows: dict[str, Any] = {name: {"right": [], "forgotten": [], "seconds": []} for name in names}
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        facts = make_facts(seed, towns)
        for name, in_view in (("the facts in view", True), ("before", False)):
            rows[name]["right"].append(share_right(start, tokenizer, facts, in_view))
            print(f"seed {seed}, {name}: {rows[name]['right'][-1]:.0%}", flush=True)
        questions = [(question, fact) for fact in facts for question in fact.questions[:-1]]
        read = [asked(question, fact.paragraph) for question, fact in questions]
        completions = [[{"role": "assistant", "content": text}] for text in answers(start, tokenizer, read)]
        learned = Dataset.from_list(
            [
                {"prompt": asked(question), "teacher_prompt": prompt, "completion": completion}
                for (question, _), prompt, completion in zip(questions, read, completions, strict=True)
            ]
        )
        for name, curriculum in METHODS.items():
            student, began = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), time.perf_counter()
            for share, options in curriculum:
                with tempfile.TemporaryDirectory() as output:
                    number = round(share * steps)
                    train(student, teacher, tokenizer, learned, output, max_steps=number, seed=seed, **options)
            rows[name]["seconds"].append(time.perf_counter() - began)
            rows[name]["right"].append(share_right(student, tokenizer, facts, in_view=False))
            rows[name]["forgotten"].append(held_out_loss(student, tokenizer) - loss)
            print(
                f"seed {seed}, {name}: {rows[name]['right'][-1]:.0%} right, {rows[name]['forgotten'][-1]:+.3f} nats, "
                f"{rows[name]['seconds'][-1]:.0f} s",
                flush=True,
            )
    return {"rows": rows, "held_out_loss": loss, "questions": 2 * 3 * towns, "steps": steps, "batch": BATCH}


def as_markdown(found: dict[str, Any]) -> str:
    heads = ("", "right", "largest − smallest, by seed", "forgotten, nats a token", "seconds")
    lines = [f"| {' | '.join(heads)} |", "|---|---:|---:|---:|---:|"]
    for name, row in found["rows"].items():
        right, spread = statistics.fmean(row["right"]), max(row["right"]) - min(row["right"])
        forgotten = f"{statistics.fmean(row['forgotten']):+.3f}" if row["forgotten"] else ""
        seconds = f"{statistics.median(row['seconds']):.0f}" if row["seconds"] else ""
        lines.append(f"| {name} | {right:.0%} | {spread:.0%} | {forgotten} | {seconds} |")
    lines += [
        "",
        f"{found['questions']} questions of training, {found['steps']} steps of {found['batch']} texts. The loss on "
        f"other text was {found['held_out_loss']:.3f} nats a token before.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder of a causal LM with a chat template")
    parser.add_argument("--seeds", type=int, default=3, help="students of each kind; default: %(default)s")
    parser.add_argument("--towns", type=int, default=3, help="each has three facts; default: %(default)s")
    parser.add_argument("--steps", type=int, default=24, help="of each student; default: %(default)s")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json and NAME.md")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    began = time.perf_counter()
    found = measure(arguments.model, arguments.seeds, arguments.towns, arguments.steps)
    table = as_markdown(found)
    print(table)
    if arguments.output:
        write_results(arguments.output, "A teacher that reads more", found, table, began=began)


if __name__ == "__main__":
    main()
