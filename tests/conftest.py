"""Fixtures of every test: offline, quiet, shapes checked at run time, tiny models of real architectures."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from jaxtyping import install_import_hook

install_import_hook(["llm_distill.divergences", "llm_distill.rows", "llm_distill.fused"], "beartype.beartype")

from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset
from tiny import VOCAB, make_config
from transformers import PreTrainedTokenizerBase

from llm_distill import DistillationConfig
from llm_distill.corpus import load_corpus, train_tokenizer


@pytest.fixture(scope="session")
def texts() -> Dataset:
    """A few hundred short passages of real code."""
    files = load_corpus(max_characters=60_000)["train"]
    lines = [line for row in files for line in row["text"].splitlines() if len(line) > 20]
    return Dataset.from_dict({"text": ["\n".join(lines[i : i + 3]) for i in range(0, len(lines), 3)]})


@pytest.fixture(scope="session")
def tokenizer(texts: Dataset) -> PreTrainedTokenizerBase:
    return train_tokenizer(texts, VOCAB)


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DistillationConfig]:
    return lambda **options: make_config(tmp_path / "out", **options)
