"""What a student learns from a teacher with another tokenizer, in bits a byte of held-out text of the embedded corpus.

    python benchmarks/cross_tokenizer.py --output benchmarks/results/cross_tokenizer_cpu

The teacher has a byte-level tokenizer of 8,192 tokens, the student one of 2,048. All students of a seed have the same
start (some steps on the text alone), texts, steps and batch, and learn from
- text: the text alone,
- sequence-level: what the teacher writes after the beginnings of these texts, beside them,
- uld, alm, xtoken, prefix: the teacher, aligned by bytes, with a little of the cross-entropy,
- same tokenizer: a teacher of the same size that has the student's tokenizer, which is the bound.

Seconds are those of training without evaluation; their ratio to "same tokenizer" is what alignment costs.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

import torch
from datasets import Dataset, concatenate_datasets
from measure import write_results
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.data.corpus import load_corpus, train_tokenizer
from llm_distill.generation import Sampling, TransformersEngine, prompts_of
from llm_distill.models import LanguageModel

VOCABULARIES = {"student": 2048, "teacher": 8192}
SIZES = {"student": (64, 2), "teacher": (160, 3)}
CHARACTERS, BATCH, CE_WEIGHT = 300, 8, 0.1
METHODS = ("text", "sequence-level", "uld", "alm", "xtoken", "prefix", "same tokenizer")


def passages(texts: list[str], count: int) -> Dataset:
    """So many texts of CHARACTERS letters, evenly from all over."""
    every = [text[at : at + CHARACTERS] for text in texts for at in range(0, len(text) - CHARACTERS, CHARACTERS)]
    return Dataset.from_dict({"text": every[:: max(1, len(every) // count)][:count]})


def make_model(role: str, vocab_size: int, seed: int) -> PreTrainedModel:
    set_seed(seed)
    width, layers = SIZES[role]
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=256,
            tie_word_embeddings=True,
        )
    )


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    steps: int,
    seed: int,
    teacher: LiveTeacher | None = None,
    **options: Any,
) -> float:
    """The seconds that it took."""
    weights = {"kd_weight": 0.0, "ce_weight": 1.0} if teacher is None else {"ce_weight": CE_WEIGHT}
    with tempfile.TemporaryDirectory() as folder:
        args = DistillationConfig(
            output_dir=folder,
            max_steps=steps,
            max_length=256,
            per_device_train_batch_size=BATCH,
            learning_rate=3e-3,
            lr_scheduler_type="cosine",
            warmup_steps=steps // 20,
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
        trainer = DistillationTrainer(model, teacher, args, train_dataset=data, processing_class=tokenizer)
        began = time.perf_counter()
        trainer.train()
        return time.perf_counter() - began


@torch.no_grad()
def bits_a_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Dataset) -> float:
    """After an end token, which stands before each text."""
    nats = 0.0
    for text in texts["text"]:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
        log_probs = model.eval()(ids).logits[0, :-1].log_softmax(-1)
        nats -= float(log_probs.gather(1, ids[0, 1:, None]).sum())
    return nats / math.log(2) / sum(len(text.encode()) for text in texts["text"])


def texts_of(teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Dataset) -> Dataset:
    """What the teacher writes after the first fifth of each text."""
    begins = [text[: CHARACTERS // 5] for text in texts["text"]]
    engine = TransformersEngine(LanguageModel(teacher, tokenizer), Sampling(max_new_tokens=96), batch_size=64)
    answers = engine.write(list(prompts_of(Dataset.from_dict({"prompt": begins}))))
    return Dataset.from_dict({"text": [answer.prompt.content + answer.completions[0].text for answer in answers]})


def measure(seeds: int, steps: int, teacher_steps: int, warm_up: int, texts: int, held_out: int) -> dict[str, Any]:
    corpus = load_corpus()
    tokenizers = {role: train_tokenizer(corpus["train"], size) for role, size in VOCABULARIES.items()}
    everything = passages(corpus["train"]["text"], teacher_steps * BATCH)
    seen, unseen = everything.select(range(texts)), passages(corpus["test"]["text"], held_out)
    teachers = {}
    for role, tokenizer in tokenizers.items():  # of the same size, with either tokenizer
        model = make_model("teacher", VOCABULARIES[role], seed=0)
        train(model, tokenizer, everything, teacher_steps, seed=0)
        teachers[role] = LiveTeacher(model, tokenizer)
    own = tokenizers["student"]
    written = concatenate_datasets([seen, texts_of(teachers["teacher"].model, tokenizers["teacher"], seen)])
    bits = {f"teacher, {VOCABULARIES[role]:,} tokens": [bits_a_byte(teacher.model, tokenizers[role], unseen)]
            for role, teacher in teachers.items()}  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in (*bits, *METHODS)}
    bits |= {name: [] for name in METHODS}
    for seed in range(1, seeds + 1):
        start = make_model("student", VOCABULARIES["student"], seed)
        train(start, own, seen, warm_up, seed)
        for method in METHODS:
            student = make_model("student", VOCABULARIES["student"], seed)
            student.load_state_dict(start.state_dict())
            if method in ("text", "sequence-level"):
                took = train(student, own, seen if method == "text" else written, steps, seed)
            elif method == "same tokenizer":
                took = train(student, own, seen, steps, seed, teachers["student"])
            else:
                took = train(student, own, seen, steps, seed, teachers["teacher"], teacher_alignment=method)
            seconds[method].append(took)
            bits[method].append(bits_a_byte(student, own, unseen))
            print(f"seed {seed}, {method}: {bits[method][-1]:.4f} bits a byte, {took:.0f} s", flush=True)
    settings = {"steps": steps, "teacher_steps": teacher_steps, "warm_up": warm_up, "texts": texts, "seeds": seeds}
    return {"bits": bits, "seconds": seconds, **settings}


def as_markdown(found: dict[str, Any]) -> str:
    lines = ["| | bits a byte | largest − smallest, by seed | of the gain of the same tokenizer | seconds | × |",
             "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
    means = {name: statistics.fmean(values) for name, values in found["bits"].items()}
    bound = means["text"] - means["same tokenizer"]
    for name, values in found["bits"].items():
        took = found["seconds"][name]
        share = f"{(means['text'] - means[name]) / bound:.0%}" if took else ""
        spread = f"{max(values) - min(values):.4f}" if took else ""
        ratio = statistics.median(took) / statistics.median(found["seconds"]["same tokenizer"]) if took else 0
        time_taken = f"{statistics.median(took):.0f} | {ratio:.2f}" if took else " | "
        lines.append(f"| {name} | {means[name]:.4f} | {spread} | {share} | {time_taken} |")
    lines += [
        "",
        f"{found['texts']:,} texts of {CHARACTERS} characters, {found['warm_up']} steps on the text alone and then "
        f"{found['steps']} of {BATCH} texts; {found['seeds']} seeds. The teachers saw "
        f"{found['teacher_steps'] * BATCH:,} texts.",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="students of each kind; default: %(default)s")
    parser.add_argument("--steps", type=int, default=300, help="of each student; default: %(default)s")
    parser.add_argument("--teacher_steps", type=int, default=1000, help="of each teacher; default: %(default)s")
    parser.add_argument("--warm_up", type=int, default=100, help="steps on the text alone; default: %(default)s")
    parser.add_argument("--texts", type=int, default=1200, help="that students see; default: %(default)s")
    parser.add_argument("--held_out", type=int, default=300, help="texts; default: %(default)s")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json and NAME.md")
    arguments = vars(parser.parse_args())
    output = arguments.pop("output")
    torch.set_num_threads(os.cpu_count() or 1)
    began = time.perf_counter()
    found = measure(**arguments)
    table = as_markdown(found)
    print(table)
    if output:
        write_results(output, "A teacher with another tokenizer", found, table, began=began)


if __name__ == "__main__":
    main()
