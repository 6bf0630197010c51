"""What the students of `smollm2-135m-cut` learn from and are measured on: the teacher's answers, as its chat template
has them, documentation and code.

    python recipes/smollm2_texts.py                  # after `llm-distill generate`, see the README there

`runs/smollm2-cut/texts`: `train.jsonl`, all kinds mixed, and `test.jsonl`; `answers.jsonl`, `documentation.jsonl` and
`code.jsonl` are what is held out of each kind. All answers about a subject are on one side.
"""

from __future__ import annotations

import zlib
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from smollm2 import SUBJECTS, code, documentation
from transformers import AutoTokenizer

FOLDER, MODEL = Path("runs", "smollm2-cut"), Path("runs", "smollm2")
HELD_OUT_SUBJECTS, MOST_CODE, HELD_OUT = 8, 600, 48
"""One subject in so many; passages to learn from; passages of each kind to measure on."""


def answers() -> dict[str, Dataset]:
    """`train` and `test`, by the subject that was asked about."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    held_out = [name for name in ", ".join(SUBJECTS).split(", ") if zlib.crc32(name.encode()) % HELD_OUT_SUBJECTS == 0]
    splits: dict[str, list[str]] = {"train": [], "test": []}
    for row in Dataset.from_parquet(str(FOLDER / "answers" / "train.parquet")):
        text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False).strip()
        if not row["finished"]:
            text = text.removesuffix(tokenizer.eos_token)
        question = row["prompt"][-1]["content"].rstrip("?.") + " "
        splits["test" if any(f" {name} " in question for name in held_out) else "train"].append(text)
    return {split: Dataset.from_dict({"text": texts}) for split, texts in splits.items()}


def main() -> None:
    kinds = {"answers": answers(), "documentation": documentation(), "code": code()}
    kinds["code"]["train"] = kinds["code"]["train"].take(MOST_CODE)
    held_out = {}
    for name, splits in kinds.items():
        held_out[name] = splits["test"].shuffle(seed=0).take(min(HELD_OUT, len(splits["test"])))
        held_out[name].to_json(FOLDER / "texts" / f"{name}.jsonl")
        print(f"{name}: {len(splits['train'])} to learn from, {len(held_out[name])} held out")
    train = concatenate_datasets([splits["train"] for splits in kinds.values()]).shuffle(seed=0)
    train.to_json(FOLDER / "texts" / "train.jsonl")
    concatenate_datasets(list(held_out.values())).to_json(FOLDER / "texts" / "test.jsonl")


if __name__ == "__main__":
    main()
