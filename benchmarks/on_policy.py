"""Text that the student writes: a whole step against its parts and TRL, and what it learns from it.

    python benchmarks/on_policy.py --part step --model FOLDER --output benchmarks/results/on_policy_step_cpu
    python benchmarks/on_policy.py --part sums --output benchmarks/results/on_policy_sums_cpu

`step`: FOLDER is a causal LM with a chat template; the student is it without some of its layers. 8 prompts, at most 64
tokens after each. The parts are the same `generate` by hand (longest prompt first, in the forward's dtype), and a step
of ours on the same tokens written beforehand, the teacher's forward with it. Rounds of all, in processes of their own.

`sums`: the task of `sequence_kd.py`. All students have the same start, steps and batch, but for the last, which has as
many steps as the first one's time allows. Those that write begin with a third of the steps, or two, on the
teacher's texts.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import in_fresh_process, write_results

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from datasets import Dataset
from sequence_kd import STUDENT_STEPS, TEACHER_STEPS, WIDTHS, learn, make_model, share_right, sums
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.data.on_policy_rows import rows_of
from llm_distill.data.policy import Policy
from llm_distill.data.sums import is_right, tokenizer_of_digits
from llm_distill.generation import Sampling, TransformersEngine, generate, load_generated, make_filters, prompts_of
from llm_distill.models import LanguageModel, decoder_layers
from llm_distill.students.cut import cut_layers

LEFT_OUT_LAYERS = {14, 25, 17, 13, 15, 26}
PROMPTS, NEW_TOKENS, STEPS = 8, 64, 3
SUBJECTS = ("rivers", "bread", "the moon", "sorting", "bicycles", "glass", "whales", "opera", "salt", "maps")
CASES = ("generate", "step on the same tokens", "on-policy step", "TRL DistillationTrainer")
COMMON = {
    "per_device_train_batch_size": PROMPTS,
    "max_steps": STEPS,
    "learning_rate": 1e-5,
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": True,
    "gradient_checkpointing": False,
    "max_completion_length": NEW_TOKENS,
}


def cut_student(folder: str) -> PreTrainedModel:
    """The model without some of its layers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return cut_layers(model, [n + 1 for n in range(len(decoder_layers(model))) if n not in LEFT_OUT_LAYERS])


def prompts_for_steps() -> Dataset:
    questions = [f"Explain {subject} to a child in {count} sentences." for count in "234567" for subject in SUBJECTS]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": question}] for question in questions]})


class StepTimes(TrainerCallback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.ends.append(time.perf_counter())

    on_train_begin = on_step_end


def measure_case(case: str, folder: str) -> dict[str, Any]:
    """Seconds of the median step after the first."""
    torch.set_num_threads(os.cpu_count() or 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    student, times = cut_student(folder), StepTimes()
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as output:
        if case.startswith("TRL"):
            from trl import DistillationConfig as TRLConfig
            from trl import DistillationTrainer as TRLTrainer

            args = TRLConfig(output, temperature=1.0, **COMMON)
            trainer: Any = TRLTrainer(
                student,
                teacher,
                args,
                train_dataset=prompts_for_steps(),
                processing_class=tokenizer,
                callbacks=[times],
            )
        else:
            args = DistillationConfig(output, on_policy_share=1.0, divergence="jsd", max_length=512, **COMMON)
            trainer = DistillationTrainer(
                student,
                LiveTeacher(teacher, tokenizer),
                args,
                train_dataset=prompts_for_steps(),
                processing_class=tokenizer,
                callbacks=[times],
            )
        if case == "generate":
            return {"seconds": generation_seconds(trainer)}
        if case == "step on the same tokens":
            write, written = trainer.policy, {}

            class WrittenBefore(Policy):
                """The text of each step, and the time begins when it is written."""

                def __call__(self, coming: Any, step: int) -> list[Any]:
                    if step not in written:
                        written[step] = write(coming, step)
                        times.ends[-1] = time.perf_counter()
                    return written[step]

            trainer.policy = WrittenBefore()
        trainer.train()
    steps = [end - start for start, end in zip(times.ends, times.ends[1:], strict=False)]
    return {"seconds": statistics.median(steps[1:])}


def generation_seconds(trainer: DistillationTrainer) -> float:
    """Of transformers' `generate`, called by hand on the prompts of one step."""
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    batch = next(iter(trainer.get_train_dataloader()))
    prompts = [
        row["input_ids"][: next(i for i, label in enumerate(row["labels"]) if label != -100)] for row in rows_of(batch)
    ]
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        with torch.inference_mode(), trainer.accelerator.autocast():
            model.generate(
                **padded, max_new_tokens=NEW_TOKENS, do_sample=True, top_k=0, pad_token_id=tokenizer.pad_token_id
            )
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def measure_steps(folder: str, rounds: int) -> tuple[dict[str, Any], str]:
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    for _ in range(rounds):
        for case in CASES:
            seconds[case].append(in_fresh_process(__file__, {"case": case, "model": folder})["seconds"])
            print(f"{case}: {seconds[case][-1]:.2f} s", flush=True)
    medians = {case: statistics.median(values) for case, values in seconds.items()}
    parts = medians["generate"] + medians["step on the same tokens"]
    lines = ["| | seconds | × its parts | × TRL |", "|---|---:|---:|---:|"]
    for case, value in medians.items():
        lines.append(f"| {case} | {value:.2f} | {value / parts:.2f} | {value / medians[CASES[-1]]:.2f} |")
    return {"seconds": seconds}, "\n".join(lines)


WRITING = {"ce_weight": 0.0, "max_completion_length": 4}
THEN_ITS_OWN = {"on_policy_share": 1.0, "divergence": "reverse_kl", **WRITING}
CURRICULA: dict[str, list[tuple[float, str, dict[str, Any]]]] = {
    "the teacher's texts": [(1, "texts", {"kd_weight": 0.0})],
    "of them those that are right": [(1, "right texts", {"kd_weight": 0.0})],
    "its texts and distributions": [(1, "texts", {})],
    "then the student's texts, forward KL": [
        (1 / 3, "texts", {}),
        (2 / 3, "prompts", THEN_ITS_OWN | {"divergence": "forward_kl"}),
    ],
    "then the student's texts, reverse KL": [(1 / 3, "texts", {}), (2 / 3, "prompts", THEN_ITS_OWN)],
    "after twice as long a start, its own texts, reverse KL": [(2 / 3, "texts", {}), (1 / 3, "prompts", THEN_ITS_OWN)],
    "then half of each, skewed by origin (DistiLLM-2)": [
        (1 / 3, "texts", {}),
        (
            2 / 3,
            "texts",
            {"on_policy_share": 0.5, "divergence": "skew_kl", "on_policy_divergence": "skew_reverse_kl", **WRITING},
        ),
    ],
    "then what the student wrote once (cached on-policy)": [
        (1 / 3, "texts", {}),
        (2 / 3, "its own", {"ce_weight": 0.0, "divergence": "reverse_kl"}),
    ],
}
"""What a student learns from, in order: the share of the steps, the data, the options."""
SHORTENED = "then the student's texts, reverse KL, in the time of the teacher's texts"


def measure_sums(seeds: int, folder: Path) -> tuple[dict[str, Any], str]:
    tokenizer, parts = tokenizer_of_digits(), sums()
    model = learn(make_model(WIDTHS["teacher"], 0), parts["taught"], TEACHER_STEPS, 0, folder)
    teacher, asked = LiveTeacher(model, tokenizer), list(prompts_of(parts["asked"]))

    def written(author: LanguageModel, name: str, **filters: Any) -> Dataset:
        engine = TransformersEngine(author, Sampling(max_new_tokens=4), batch_size=250)
        generate(engine, asked, folder / name, filters=make_filters({"finished": {}, **filters}))
        return load_generated(folder / name, tokenizer)

    data = {
        "texts": written(teacher.language_model, "teacher"),
        "right texts": written(teacher.language_model, "teacher, right", verifier={"check": is_right}),
        "prompts": parts["asked"].select_columns("prompt"),
    }

    def follow(curriculum: list[tuple[float, str, dict[str, Any]]], seed: int, name: str, steps: int) -> float:
        """The seconds of its training, and of the writing for it."""
        student, began = make_model(WIDTHS["student"], seed), time.perf_counter()
        for share, texts, options in curriculum:
            if texts == "its own":
                data[texts] = written(LanguageModel(student, tokenizer), f"{name}, seed {seed}")
            learn(student, data[texts], round(share * steps), seed, folder, teacher, **{"ce_weight": 1.0} | options)
        seconds = time.perf_counter() - began
        rows[name]["seconds"].append(seconds)
        rows[name]["right"].append(share_right(student, parts["held_out"]))
        print(f"seed {seed}, {name}: {rows[name]['right'][-1]:.1%} in {seconds:.0f} s", flush=True)
        return seconds

    rows: dict[str, Any] = {name: {"right": [], "seconds": []} for name in (*CURRICULA, SHORTENED)}
    for seed in range(1, seeds + 1):
        seconds = {name: follow(curriculum, seed, name, STUDENT_STEPS) for name, curriculum in CURRICULA.items()}
        whole = "then the student's texts, reverse KL"
        steps = round(STUDENT_STEPS * seconds["the teacher's texts"] / seconds[whole])
        follow(CURRICULA[whole], seed, SHORTENED, steps)
    rows["teacher"] = {"right": [share_right(model, parts["held_out"])], "seconds": [0.0]}
    lines = ["| learned from | right | largest − smallest, by seed | seconds |", "|---|---:|---:|---:|"]
    for name, row in rows.items():
        mean, spread = statistics.fmean(row["right"]), max(row["right"]) - min(row["right"])
        lines.append(f"| {name} | {mean:.1%} | {spread:.1%} | {statistics.median(row['seconds']):.0f} |")
    return rows, "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=("step", "sums"), required="--task" not in sys.argv)
    parser.add_argument("--model", help="for step: the folder of a causal LM with a chat template")
    parser.add_argument("--rounds", type=int, default=3, help="of step; default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="of sums; default: %(default)s")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json and NAME.md")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    if arguments.task is not None:
        print(json.dumps(measure_case(arguments.task["case"], arguments.task["model"])))
        return
    began = time.perf_counter()
    if arguments.part == "step":
        found, table = measure_steps(arguments.model, arguments.rounds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            found, table = measure_sums(arguments.seeds, Path(folder))
    print(table)
    if arguments.output:
        write_results(arguments.output, "Text that the student writes", found, table, began=began)


if __name__ == "__main__":
    main()
