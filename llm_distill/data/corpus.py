"""The embedded corpus: the sources of the installed Python standard library, so that everything runs with no download.

About 11 MB of real code and prose, split by file, so that no held-out file has a passage in training.
"""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

NAME = "stdlib"
"""What `--dataset_name` calls it (its first TRIAL_CHARACTERS)."""
TRIAL_CHARACTERS = 2_000_000
LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "__pycache__"}
END = "<|endoftext|>"


def load_corpus(test_share: float = 0.1, max_characters: int | None = None) -> DatasetDict:
    """`train` and `test`, a row per file with its `text` and `file`.

    Which files are held out depends on their names alone, so every machine holds out the same. `max_characters` stops
    the training split there and the test split at a tenth of it (the last file is cut), for quick trials.
    """
    limits = {"train": max_characters, "test": max_characters and max_characters // 10}
    splits: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    sizes = {"train": 0, "test": 0}
    for name, text in _source_files():
        split = "test" if zlib.crc32(name.encode()) % 1000 < 1000 * test_share else "train"
        limit = limits[split]
        text = text if limit is None else text[: limit - sizes[split]]
        sizes[split] += len(text)
        if text.strip():
            splits[split].append({"file": name, "text": text})
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def train_tokenizer(dataset: Dataset, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, trained on `dataset["text"]`; its pad token is its end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[END], initial_alphabet=alphabet)
    tokenizer.train_from_iterator((row["text"] for row in dataset), trainer, length=len(dataset))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


def token_blocks(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """`input_ids` and `labels` of `length` tokens each: the files one after the other, an end token between them."""
    stream: list[int] = []
    for start in range(0, len(dataset), 100):  # a batch at a time is encoded in parallel
        for ids in tokenizer(dataset[start : start + 100]["text"])["input_ids"]:
            stream += [*ids, tokenizer.eos_token_id]
    blocks = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
    return Dataset.from_dict({"input_ids": blocks, "labels": blocks})


def _source_files() -> Iterator[tuple[str, str]]:
    """(name, text) of each source file, in an order that mixes the packages and is the same everywhere."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path.relative_to(root) for path in root.rglob("*.py")]
    names = [path.as_posix() for path in files if not LEFT_OUT & set(path.parts)]
    for name in sorted(names, key=lambda name: zlib.crc32(name[::-1].encode())):
        yield name, (root / name).read_text(encoding="utf-8", errors="replace")
