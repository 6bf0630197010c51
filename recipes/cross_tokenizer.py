"""A teacher with another tokenizer: it writes, the student learns from its text, then from what it says of it.

    accelerate launch recipes/cross_tokenizer.py --generate_config generate.yaml --train_config train.yaml

generate.yaml has the options of `llm-distill generate`, train.yaml those of `llm-distill train`, with the student and
the teacher. The student is trained twice: from the text alone (`kd_weight` 0, so that it knows the teacher's kind of
text), and from there with the teacher beside it, aligned by bytes. `output_dir` has a folder for each.

With no configuration it runs on the embedded corpus: a teacher with a byte-level tokenizer of 8,192 tokens is trained
(once), and teaches a student that has 2,048; beside it one goes on from the text alone for as many steps. Held-out
files decide, in bits a byte, which do not depend on the tokenizer. The table is in runs/cross_tokenizer/results.md.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from demo import Recipe, as_options, make_model, prepare_corpus, trained_teacher, use_all_cores
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_distill.cli.generate import generate
from llm_distill.cli.train import train
from llm_distill.data.corpus import NAME, load_corpus

FOLDER = Path("runs", "cross_tokenizer")
TEACHER = Recipe(vocab_size=8192, teacher_steps=400)
STUDENT = Recipe()
BEGINNING, CHARACTERS, PASSAGES = 60, 300, 200
"""Of each passage that decides, how much is given and how long it is; and how many passages."""


def embedded() -> tuple[list[str], list[str]]:
    """Options of writing and of training, for a small run without downloads."""
    trained_teacher(FOLDER / "teacher", TEACHER, prepare_corpus(TEACHER))
    if PartialState().is_main_process:
        make_model(STUDENT, STUDENT.student_width, STUDENT.student_layers, seed=1).save_pretrained(FOLDER / "start")
        prepare_corpus(STUDENT).tokenizer.save_pretrained(FOLDER / "start")
    PartialState().wait_for_everyone()
    writing = {
        "teacher_model_name_or_path": FOLDER / "teacher",
        "dataset_name": NAME,
        "prompt_tokens": 16,
        "max_prompts": 200,
        "max_new_tokens": 64,
        "num_completions": 2,
        "batch_size": 64,
        "filters": "{repetition: {}, exact_duplicates: {}}",
        "output_dir": FOLDER / "generated",
    }
    training = {
        "model_name_or_path": FOLDER / "start",
        "teacher_model_name_or_path": FOLDER / "teacher",
        "output_dir": FOLDER / "student",
        "max_length": STUDENT.block,
        "max_steps": 150,
        "per_device_train_batch_size": STUDENT.batch,
        "learning_rate": STUDENT.learning_rate,
        "save_strategy": "no",
        "report_to": "none",
    }
    return as_options(writing), [*as_options(training), "--dataset_name", str(FOLDER / "generated")]


@torch.no_grad()
def bits_a_byte(folder: Path, passages: list[str]) -> float:
    """Of what comes after the beginning of each passage."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    nats = 0.0
    for passage in passages:
        given, rest = (tokenizer(part)["input_ids"] for part in (passage[:BEGINNING], passage[BEGINNING:]))
        ids = torch.tensor([*given, *rest])
        log_probs = model(ids[None]).logits[0, len(given) - 1 : -1].log_softmax(-1)
        nats -= float(log_probs.gather(1, ids[len(given) :, None]).sum())
    return nats / math.log(2) / sum(len(passage[BEGINNING:].encode()) for passage in passages)


def compare(folders: dict[str, Path]) -> str:
    """Their table, which is written too."""
    texts = load_corpus()["test"]["text"]
    every = [text[at : at + CHARACTERS] for text in texts for at in range(0, len(text) - CHARACTERS, CHARACTERS)]
    passages = every[:: len(every) // PASSAGES][:PASSAGES]
    lines = ["| | bits a byte of held-out text |", "|---|---:|"]
    lines += [f"| {name} | {bits_a_byte(folder, passages):.3f} |" for name, folder in folders.items()]
    (FOLDER / "results.md").write_text("\n".join(lines) + "\n")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generate_config", type=Path, help="YAML with options of `llm-distill generate`")
    parser.add_argument("--train_config", type=Path, help="YAML with options of `llm-distill train`")
    arguments = parser.parse_args()
    if (arguments.generate_config is None) != (arguments.train_config is None):
        parser.error("--generate_config and --train_config go together")
    use_all_cores()
    if arguments.generate_config is None:
        writing, training = embedded()
        folder = FOLDER / "student"
    else:
        texts = yaml.safe_load(arguments.generate_config.read_text()).get("output_dir", "generated")
        folder = Path(yaml.safe_load(arguments.train_config.read_text())["output_dir"])
        writing = ["--config", str(arguments.generate_config)]
        training = ["--config", str(arguments.train_config), "--dataset_name", str(texts)]
    warm, aligned = str(folder / "from_text"), str(folder / "aligned")
    generate(writing)
    PartialState().wait_for_everyone()
    train([*training, "--kd_weight", "0", "--ce_weight", "1", "--output_dir", warm])
    PartialState().wait_for_everyone()
    train([*training, "--model_name_or_path", warm, "--output_dir", aligned])
    if arguments.generate_config is None:
        more = str(folder / "from_more_text")
        go_on = {"model_name_or_path": warm, "kd_weight": 0, "ce_weight": 1, "output_dir": more}
        train([*training, *as_options(go_on)])
        names = {"teacher": FOLDER / "teacher", "from the text": warm, "then aligned": aligned, "or more text": more}
        if PartialState().is_main_process:
            print(f"\n{compare({name: Path(path) for name, path in names.items()})}\n\nIn {FOLDER}.")


if __name__ == "__main__":
    main()
