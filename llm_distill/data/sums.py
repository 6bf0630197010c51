"""A task with answers that can be checked, for runs that take seconds: sums of two numbers, a token each digit."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LARGEST = 100


def tokenizer_of_digits() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({token: place for place, token in enumerate([*"0123456789+=", "<end>"])}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("<end>|."), "isolated")
    tokenizer.decoder = decoders.Fuse()  # without spaces, which it could not read again
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def split_sums(**sizes: int) -> dict[str, Dataset]:
    """Sets of sums with nothing in common, such as `37+58=` with the completion `095`, by name and size."""
    pairs = [(a, b) for a in range(LARGEST) for b in range(LARGEST)]
    random.Random(0).shuffle(pairs)
    rows = [{"prompt": f"{a:02d}+{b:02d}=", "completion": f"{a + b:03d}"} for a, b in pairs]
    start, parts = 0, {}
    for name, size in sizes.items():
        parts[name], start = Dataset.from_list(rows[start : start + size]), start + size
    return parts


def is_right(prompt: str, completion: str, row: dict[str, Any]) -> bool:
    """The verifier: `llm-distill generate` takes it as llm_distill.data.sums:is_right."""
    first, second = prompt.rstrip("=").split("+")
    return completion == f"{int(first) + int(second):03d}"
