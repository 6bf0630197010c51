"""A task and a few hundred examples: the teacher writes variations, and the student learns them, then its own text.

    python recipes/few_samples.py --examples examples.jsonl --teacher T --student S --check verify.py:is_right

examples.jsonl has `prompt` and `completion`. What happens:
1. the teacher sees some examples and writes prompts of the same kind; what is (almost) there already is left out,
2. it answers them; `--check`, a function of (prompt, completion, row), says which answers are right,
3. the student learns the examples and those answers (sequence-level),
4. it answers the prompts itself, and the teacher says of each token how likely it is (on-policy).
All other options are those of `llm-distill train`, for 3 and 4 alike. Everything lies in output_dir.

With no argument the task is sums of two numbers: a small teacher that knows them, a student that has seen 30 or 300,
and beside it the same student fine-tuned on these alone. Sums that nobody has seen decide. The result is in
runs/few_samples/results.md; `benchmarks/by_examples.py` takes more numbers of examples, and three seeds.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset
from demo import as_options, use_all_cores
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, set_seed

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.cli.train import train
from llm_distill.data.sums import is_right, split_sums, tokenizer_of_digits
from llm_distill.generation import Sampling, TransformersEngine, generate, load_generated, make_filters, prompts_of
from llm_distill.models import LanguageModel

FOLDER = Path("runs", "few_samples")
SHOWN = 4
"""Examples that the teacher sees for each variation."""
ASKED = "Here are examples of one kind of request:\n\n{examples}\n\nWrite one more of this kind. Answer with it alone."
Row = dict[str, Any]


def ask_for_another(examples: Sequence[Row]) -> str:
    """What a teacher that follows instructions is asked, who has seen some examples."""
    return ASKED.format(examples="\n\n".join(f"- {as_text(row['prompt'])}" for row in examples))


def as_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def write_prompts(
    engine: TransformersEngine,
    examples: Dataset,
    count: int,
    folder: Path,
    show: Callable[[Sequence[Row]], str] = ask_for_another,
    read: Callable[[str, str], str] = lambda asked, written: written.strip(),
    as_chat: bool = True,
) -> list[str]:
    """Prompts of the same kind as those of the examples, each once, without theirs.

    Args:
        count: how often the teacher is asked.
        show: what it goes on from, or answers.
        read: the prompt in what it was asked and has written.
    """
    draw = random.Random(0)
    rows = [{"prompt": show(draw.choices(list(examples), k=SHOWN))} for _ in range(count)]
    filters = make_filters({"finished": {}, "length": {}, "near_duplicates": {}})
    generate(engine, list(prompts_of(rows, as_chat=as_chat)), folder, filters=filters)
    written = load_dataset("parquet", data_files=str(folder / "train.parquet"), split="train")
    prompts = [read(as_text(row["prompt"]), as_text(row["completion"])) for row in written]
    known = {as_text(prompt) for prompt in examples["prompt"]}
    return [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]


def answer(engine: TransformersEngine, prompts: Sequence[str], check: Any, folder: Path, as_chat: bool) -> Dataset:
    """The teacher's answers that `check` finds right, as rows to learn from."""
    filters = make_filters({"finished": {}, "length": {}} | ({"verifier": {"check": check}} if check else {}))
    asked = [{"prompt": prompt} for prompt in prompts]
    report = generate(engine, list(prompts_of(asked, as_chat=as_chat)), folder, filters=filters)
    print(report.as_markdown(), flush=True)
    return load_generated(folder)


def teach_named(arguments: argparse.Namespace, options: Sequence[str]) -> None:
    """For a person's examples and models."""
    folder = Path(arguments.output_dir)
    examples = load_dataset("json", data_files=arguments.examples, split="train")
    teacher = LanguageModel.load(arguments.teacher)
    sampling = Sampling(max_new_tokens=arguments.max_new_tokens)
    engine = TransformersEngine(teacher, sampling, batch_size=16)
    prompts = write_prompts(engine, examples, arguments.variations, folder / "prompts")
    print(f"{len(prompts):,} prompts of the same kind.", flush=True)
    answers = answer(engine, prompts, arguments.check, folder / "answers", as_chat=True)
    texts = [as_conversation(row) for row in (*examples, *answers)]
    write_rows(folder / "texts.jsonl", texts)
    common = {"report_to": "none", "save_strategy": "no"}
    sequence = {"model_name_or_path": arguments.student, "dataset_name": folder / "texts.jsonl"}
    sequence |= {"kd_weight": 0, "ce_weight": 1, "output_dir": folder / "sequence-level"}
    train([*as_options(common | sequence), *options])
    own = {"model_name_or_path": folder / "sequence-level", "dataset_name": folder / "texts.jsonl"}
    own |= {"teacher_model_name_or_path": arguments.teacher, "on_policy_share": 1, "divergence": "reverse_kl"}
    own |= {"max_completion_length": arguments.max_new_tokens, "output_dir": folder / "student"}
    train([*as_options(common | own), *options])


def as_conversation(row: Row) -> Row:
    """A row of messages, as a chat model reads it."""
    prompt, completion = row["prompt"], row["completion"]
    return {
        "prompt": [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt,
        "completion": [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion,
    }


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@dataclass(frozen=True)
class Sizes:
    """Of the run on sums."""

    teacher_width: int = 128
    student_width: int = 64
    taught: int = 6000
    """Sums that the teacher has seen; of the others, students see few."""
    held_out: int = 500
    teacher_steps: int = 500
    student_steps: int = 250
    asked: int = 1500
    """How many variations the teacher is asked for."""
    batch: int = 128


def make_model(width: int, seed: int) -> PreTrainedModel:
    set_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    return AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=13, max_position_embeddings=16, **shape))


def learn(
    model: PreTrainedModel,
    rows: Dataset,
    steps: int,
    seed: int,
    folder: Path,
    teacher: Any = None,
    *,
    batch: int = Sizes.batch,
    **options: Any,
) -> PreTrainedModel:
    """Fine-tuned on the rows, or taught what `options` say."""
    weights = {"ce_weight": 1.0, "kd_weight": 0.0} if teacher is None else {"ce_weight": 0.0, "kd_weight": 1.0}
    args = DistillationConfig(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 10,
        weight_decay=0.1,
        seed=seed,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        bf16=False,
        dataloader_pin_memory=False,
        **(weights | options),
    )
    DistillationTrainer(model, teacher, args, train_dataset=rows, processing_class=tokenizer_of_digits()).train()
    return model.eval()


def share_right(model: PreTrainedModel, rows: Dataset) -> float:
    sampling = Sampling(max_new_tokens=4, temperature=0)
    engine = TransformersEngine(LanguageModel(model, tokenizer_of_digits()), sampling, batch_size=250)
    answers = list(engine.write(list(prompts_of(rows))))
    return sum(is_right(a.prompt.content, a.completions[0].text, {}) for a in answers) / len(answers)


def compare(examples: Sequence[int], seeds: int, sizes: Sizes) -> tuple[dict[str, Any], str]:
    """Shares of unseen sums that are right, by the number of examples and how the student learned; and their table."""
    parts = split_sums(taught=sizes.taught, gold=max(examples), held_out=sizes.held_out)
    whole = parts["taught"].map(
        lambda row: {"text": row["prompt"] + row["completion"]}, remove_columns=["prompt", "completion"]
    )
    work = FOLDER / "work"
    model = learn(make_model(sizes.teacher_width, 0), whole, sizes.teacher_steps, 0, work, batch=sizes.batch)
    teacher = LiveTeacher(model, tokenizer_of_digits())
    right: dict[str, Any] = {"teacher": share_right(model, parts["held_out"]), "students": {}}
    print(f"The teacher: {right['teacher']:.1%} right.", flush=True)
    unseen = set(parts["held_out"]["prompt"])
    for count in examples:
        gold = parts["gold"].select(range(count))
        folder = FOLDER / f"sums-{count}"
        shutil.rmtree(folder, ignore_errors=True)

        def engine_for(completions: int, tokens: int) -> TransformersEngine:
            sampling = Sampling(num_completions=completions, max_new_tokens=tokens)
            return TransformersEngine(teacher.language_model, sampling, batch_size=64)

        beginnings = len({row["prompt"][0] for row in gold})
        prompts = write_prompts(
            engine_for(sizes.asked // beginnings, 10),
            gold,
            10 * beginnings,
            folder / "prompts",
            show=lambda rows: rows[0]["prompt"][0],  # goes on from how an example begins
            read=lambda asked, written: (asked + written).partition("=")[0] + "=",
            as_chat=False,
        )
        prompts = [prompt for prompt in prompts if len(prompt) == 6 and prompt[2] == "+" and prompt not in unseen]
        answers = answer(engine_for(1, 4), prompts, is_right, folder / "answers", as_chat=False)
        columns = ["prompt", "completion"]
        texts = concatenate_datasets(
            [gold.select_columns(columns), answers.select_columns(columns).cast(gold.features)]
        )
        for seed in range(1, seeds + 1):
            steps = sizes.student_steps
            start = lambda seed=seed: make_model(sizes.student_width, seed)  # noqa: E731
            tuned = learn(start(), gold, steps, seed, work, batch=sizes.batch)
            taught = learn(start(), texts, steps, seed, work, batch=sizes.batch)
            first = learn(start(), texts, steps // 2, seed, work, batch=sizes.batch)
            own = {"on_policy_share": 1.0, "divergence": "reverse_kl", "max_completion_length": 4}
            then = learn(first, texts, steps - steps // 2, seed, work, teacher, batch=sizes.batch, **own)
            students = {"fine-tuned": tuned, "sequence-level": taught, "then on-policy": then}
            for name, student in students.items():
                value = share_right(student, parts["held_out"])
                right["students"].setdefault(str(count), {}).setdefault(name, []).append(value)
                print(f"{count} examples, {len(texts):,} texts, seed {seed}, {name}: {value:.1%}", flush=True)
    return right, as_markdown(right)


def as_markdown(right: dict[str, Any]) -> str:
    names = list(next(iter(right["students"].values())))
    lines = ["| examples | " + " | ".join(names) + " |", "|---:|" + "---:|" * len(names)]
    for count, by_name in right["students"].items():
        cells = [f"{sum(v) / len(v):.1%} ({min(v):.1%} to {max(v):.1%})" for v in by_name.values()]
        lines.append(f"| {int(count):,} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"The teacher: {right['teacher']:.1%}."])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--examples", help="a JSON Lines file with `prompt` and `completion`")
    parser.add_argument("--teacher", help="a model that follows instructions, on the Hub or in a folder")
    parser.add_argument("--student", help="a model with the same tokenizer")
    parser.add_argument("--check", help="which answers are right: package.module:function or file.py:function")
    parser.add_argument("--variations", type=int, default=2000, help="asked for; default: %(default)s")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="of what is written; default: %(default)s")
    parser.add_argument("--output_dir", default=str(FOLDER), help="default: %(default)s")
    arguments, options = parser.parse_known_args()
    use_all_cores()
    if arguments.examples is not None:
        if arguments.teacher is None or arguments.student is None:
            parser.error("--examples needs --teacher and --student")
        teach_named(arguments, options)
        return
    if options:
        parser.error(f"{options[0]} needs --examples")
    right, table = compare([30, 300], 1, Sizes())
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "results.md").write_text(table + "\n")
    (FOLDER / "results.json").write_text(json.dumps(right, indent=2) + "\n")
    print(f"\n{table}\n\nIn {FOLDER}.")


if __name__ == "__main__":
    main()
