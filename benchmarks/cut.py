"""Students made from a real model: which layers, how many, or narrower ones, and what some minutes of teaching do.

    python benchmarks/cut.py --model FOLDER --minutes 10 --output benchmarks/results/cut_cpu

FOLDER is SmolLM2-135M-Instruct, or another chat model. Nothing is downloaded: the texts are the sources of the Python
standard library (code), the reference of the language that is installed with it and the documentation in those sources
(prose), and the teacher's own answers to questions about that reference. Held out are other files, topics, questions.

Each student is measured before it is taught, taught for so many minutes of this machine (forward KL, the teacher beside
it, the same texts in the same order; a smaller student takes more steps), and measured again: KL to the teacher, top-1
agreement with 95 % intervals over blocks of text, loss, answers, and tokens a second with a cache. The results are
written after each student, and what they have of the same settings is not measured again.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import statistics
import tempfile
import time
import zlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from measure import write_results

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

from accelerate import Accelerator
from datasets import Dataset, concatenate_datasets
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.data.corpus import load_corpus, token_blocks
from llm_distill.evaluation.compare import HeldOutTexts, compare
from llm_distill.evaluation.figures import likeness_figures, loss_figures
from llm_distill.evaluation.statistics import format_interval
from llm_distill.models import LanguageModel, decoder_layers, millions
from llm_distill.ranks import has_fast_bfloat16
from llm_distill.students.choose import choose_layers, mean_loss
from llm_distill.students.cut import cut_layers
from llm_distill.students.prune import prune_widths
from llm_distill.students.target import count_parameters, propose_shapes

LENGTH, BATCH, LEARNING_RATE = 256, 8, 4e-4
CALIBRATION_BLOCKS = 32
QUESTIONS = (
    "What is the capital of France?",
    "Write a Python function that returns the larger of two numbers.",
    "Explain in one sentence why the sky is blue.",
    "Name three fruits.",
    "What does the Python keyword `yield` do?",
)
ASKED = (
    "Explain {} in Python.",
    "Give a short example of {} in Python.",
    "What should a beginner know about {} in Python?",
)
STUDENTS = ("24 layers", "20 layers", "16 layers", "20 even", "20 greedy", "narrower", "20 random")
"""By influence unless the name says otherwise; the narrower one has the parameters of 20 layers."""


def texts_of_prose() -> dict[str, str]:
    """By their names: the topics of the reference, and the documentation of each module of the library."""
    texts = {f"topic {name}": text for name, text in topics.items()}
    for split in load_corpus(max_characters=3_000_000).values():
        for row in split:
            try:
                nodes = [node for node in ast.walk(ast.parse(row["text"])) if isinstance(node, DOCUMENTED)]
            except SyntaxError:  # where the corpus was cut
                continue
            documentation = "\n\n".join(filter(None, (ast.get_docstring(node) for node in nodes)))
            if len(documentation) > 500:
                texts[row["file"]] = inspect.cleandoc(documentation)
    return texts


DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % 10 == 0


def answers_of(teacher: LanguageModel, count: int) -> dict[str, str]:
    """The teacher's own answers, by the topic that was asked about, as chats."""
    tokenizer: Any = teacher.require_tokenizer("teacher")
    names = sorted(topics, key=lambda name: zlib.crc32(name.encode()))
    asked = [(name, form.format(f"`{name}`")) for form in ASKED for name in names][:count]
    texts: dict[str, str] = {}
    for start in range(0, len(asked), 16):
        part = asked[start : start + 16]
        chats = [[{"role": "user", "content": question}] for _, question in part]
        prompts = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, return_dict=True, return_tensors="pt", padding=True, padding_side="left"
        )
        written = teacher.model.generate(**prompts, max_new_tokens=160, do_sample=True, temperature=0.7, top_p=0.95)
        for (name, question), ids, mask in zip(part, written, prompts["attention_mask"], strict=True):
            padding = int((mask == 0).sum())
            texts[f"{name}: {question}"] = tokenizer.decode(ids[padding:]).replace(tokenizer.eos_token * 2, "")
    return texts


def make_data(teacher: LanguageModel, answers: int, held_out_blocks: int) -> tuple[Dataset, dict[str, Dataset]]:
    """Blocks to learn from, of all kinds mixed, and held-out ones by their kind."""
    tokenizer: Any = teacher.require_tokenizer("teacher")
    code = load_corpus(max_characters=3_000_000)
    kinds = {"prose": texts_of_prose(), "answers": answers_of(teacher, answers)}
    train, held_out = [token_blocks(code["train"], tokenizer, LENGTH)], {"code": code["test"]}
    for kind, texts in kinds.items():
        parts: dict[bool, list[str]] = {True: [], False: []}
        for name, text in texts.items():
            parts[is_held_out(name.partition(":")[0])].append(text)
        train.append(token_blocks(Dataset.from_dict({"text": parts[False]}), tokenizer, LENGTH))
        held_out[kind] = Dataset.from_dict({"text": parts[True]})
    most = max(map(len, train[1:]))
    blocks = concatenate_datasets([part.shuffle(seed=0).select(range(min(len(part), most))) for part in train])
    return blocks.shuffle(seed=0), {
        kind: (found := token_blocks(data, tokenizer, LENGTH).shuffle(seed=0)).select(
            range(min(len(found), held_out_blocks))
        )
        for kind, data in held_out.items()
    }


def make_student(name: str, teacher: PreTrainedModel, blocks: list[torch.Tensor]) -> tuple[PreTrainedModel, list[int]]:
    """A student of STUDENTS, and the layers that it was made of."""
    total = len(decoder_layers(teacher))
    if name == "narrower":
        shapes = {shape.name: shape for shape in propose_shapes(teacher, count_parameters(teacher, 20, {}))}
        return prune_widths(teacher, shapes["narrower"].sizes, blocks).student, list(range(1, total + 1))
    count, how = name.split()
    keep = choose_layers(teacher, int(count), how if how in ("even", "greedy") else "influence", blocks)
    student = cut_layers(teacher, keep)
    if how == "random":
        set_seed(0)
        return AutoModelForCausalLM.from_config(student.config, dtype=student.dtype), []
    return student, keep


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def measure(student: PreTrainedModel, teacher: LiveTeacher, held_out: dict[str, Dataset]) -> dict[str, Any]:
    """Of each kind of text and of all: KL, agreement and loss."""
    figures: dict[str, Any] = {}
    tokenizer = teacher.language_model.require_tokenizer("teacher")
    for kind, data in {**held_out, "all": concatenate_datasets(list(held_out.values()))}.items():
        scores = compare({"student": student}, teacher, HeldOutTexts(data, collate, tokenizer, BATCH, kind))
        figures[kind] = likeness_figures(scores["student"]) | loss_figures(scores["student"])
    return figures


def teach(
    student: PreTrainedModel, teacher: LiveTeacher, data: Dataset, tokenizer: PreTrainedTokenizerBase, minutes: float
) -> dict[str, Any]:
    """So many minutes of steps, whose number three steps of a copy tell."""

    def trainer(model: PreTrainedModel, steps: int, folder: str) -> DistillationTrainer:
        args = DistillationConfig(
            output_dir=folder,
            max_steps=steps,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
            per_device_train_batch_size=BATCH,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=torch.cuda.is_available() or has_fast_bfloat16(),
            dataset_kwargs={"skip_prepare_dataset": True},
            train_sampling_strategy="sequential",
        )
        return DistillationTrainer(model, teacher, args, train_dataset=data, processing_class=tokenizer)

    with tempfile.TemporaryDirectory() as folder:
        copy = cut_layers(student, list(range(1, len(decoder_layers(student)) + 1)))
        seconds = []
        for _ in range(2):  # the first one compiles
            began = time.perf_counter()
            trainer(copy, 2, folder).train()
            seconds.append((time.perf_counter() - began) / 2)
        steps = max(2, int(60 * minutes / seconds[-1]))
        began = time.perf_counter()
        trainer(student, steps, folder).train()
    return {"steps": steps, "tokens": steps * BATCH * LENGTH, "seconds": time.perf_counter() - began}


@torch.inference_mode()
def say(model: PreTrainedModel, tokenizer: Any) -> dict[str, Any]:
    """Greedy answers to QUESTIONS, and tokens a second, the median over them."""
    answers, rates = {}, []
    for question in QUESTIONS:
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        began = time.perf_counter()
        written = model.generate(**prompt, max_new_tokens=48, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        rates.append(len(written) / (time.perf_counter() - began))
        answers[question] = tokenizer.decode(written, skip_special_tokens=True)
    return {"answers": answers, "tokens_per_second": statistics.median(rates)}


def table(found: dict[str, Any]) -> str:
    lines = [
        "| student | parameters | KL before | KL after | agreement after | loss after | tokens/s | steps |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in found.items():
        before, after = (row.get(when, {}).get("all", {}) for when in ("before", "after"))
        cells = [name, millions(row["parameters"]), format_interval(before.get("kl")), format_interval(after.get("kl"))]
        cells += [format_interval(after.get("top1_agreement"), ".1%"), format_interval(after.get("loss"))]
        cells += [f"{row['said']['tokens_per_second']:.1f}", f"{row.get('taught', {}).get('steps', '–')}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "KL after, by kind of text:", "", "| student | code | prose | answers |", "|---|---:|---:|---:|"]
    for name, row in found.items():
        if "after" in row:
            cells = [format_interval(row["after"][kind]["kl"]) for kind in ("code", "prose", "answers")]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    for question in QUESTIONS:
        lines += ["", f"**{question}**", ""]
        lines += [f"- {name}: {' '.join(row['said']['answers'][question].split())}" for name, row in found.items()]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="the folder of a causal LM with a chat template")
    parser.add_argument("--minutes", type=float, default=10.0, help="of teaching, each; default: %(default)s")
    parser.add_argument("--answers", type=int, default=192, help="that the teacher writes; default: %(default)s")
    parser.add_argument("--held_out", type=int, default=32, help="blocks of each kind; default: %(default)s")
    parser.add_argument("--students", nargs="+", default=STUDENTS, choices=STUDENTS, help="default: all")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json and NAME.md")
    arguments = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    set_seed(0)
    dtype = torch.bfloat16 if torch.cuda.is_available() or has_fast_bfloat16() else torch.float32
    settings = {"minutes": arguments.minutes, "answers": arguments.answers, "held_out": arguments.held_out}
    found: dict[str, Any] = {}
    if arguments.output and arguments.output.with_suffix(".json").is_file():
        earlier = json.loads(arguments.output.with_suffix(".json").read_text())
        found = earlier["students"] if earlier["settings"] == settings else {}

    original = LanguageModel.load(arguments.model, dtype=torch.float32)
    tokenizer = original.require_tokenizer("teacher")
    original.model.eval()
    began = time.perf_counter()
    teacher = LiveTeacher(LanguageModel(original.model.to(dtype), tokenizer))
    teacher.prepare(Accelerator(), torch.nn.Module())
    data, held_out = make_data(teacher.language_model, arguments.answers, arguments.held_out)
    print(f"texts: {len(data)} blocks, {time.perf_counter() - began:.0f} s", flush=True)
    blocks = [torch.tensor(part["input_ids"]) for part in data.select(range(CALIBRATION_BLOCKS)).iter(BATCH)]
    if "teacher" not in found:
        said = say(teacher.language_model.model, tokenizer)
        found = {"teacher": {"parameters": original.model.num_parameters(), "said": said}, **found}
    for name in arguments.students:
        if name in found:
            continue
        began = time.perf_counter()
        student, layers = make_student(name, teacher.language_model.model, blocks)
        row: dict[str, Any] = {"parameters": student.num_parameters(), "layers": layers}
        row["made_seconds"], row["calibration_loss"] = time.perf_counter() - began, mean_loss(student, blocks)
        row["before"] = measure(student, teacher, held_out)
        student = student.float()
        row["taught"] = teach(student, teacher, data, tokenizer, arguments.minutes)
        student = student.to(dtype).eval()
        row |= {"after": measure(student, teacher, held_out), "said": say(student, tokenizer)}
        row["seconds"] = time.perf_counter() - began
        found[name] = row
        print(table({name: row}), flush=True)
        if arguments.output:
            content = {"settings": settings, "students": found}
            write_results(arguments.output, "Students made from their teacher", content, table(found))


if __name__ == "__main__":
    main()
