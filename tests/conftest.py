"""Fixtures of every test: offline, quiet, shapes checked at run time, tiny models of real architectures.

Libraries are imported where they are used, as pytest-xdist reads this file once more than it has workers.
"""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import cxx
import pytest
from hub_server import home, home_folder, hub, hub_server  # noqa: F401
from jaxtyping import install_import_hook

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from llm_distill import DistillationConfig

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: more threads wait for each other
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
if "CXX" not in os.environ:
    libraries = tempfile.mkdtemp(prefix="row-kernels-")
    atexit.register(shutil.rmtree, libraries)
    compiler = Path(libraries, "c++")  # one word, as DeepSpeed and inductor want it
    compiler.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-SE", cxx.__file__, libraries])} "$@"\n')
    compiler.chmod(0o755)
    os.environ["CXX"] = str(compiler)

FUSED = ("cpp_backend", "head_loss", "task", "logits", "products", "sparse", "torch_backend")  # Triton reads its own
CACHE = ("methods", "select")
install_import_hook(
    [
        "llm_distill.divergences",
        "llm_distill.rows",
        *(f"llm_distill.losses.fused.{name}" for name in FUSED),
        *(f"llm_distill.cache.{name}" for name in CACHE),
        "llm_distill.capture.fidelity",
        "llm_distill.evaluation.bias",
    ],
    "beartype.beartype",
)


def pytest_collection_finish() -> None:
    """What is imported by now is no garbage: to look through it again and again takes two fifths of the time."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def texts() -> Dataset:
    """A few hundred short passages of real code."""
    from datasets import Dataset

    from llm_distill.data.corpus import load_corpus

    files = load_corpus(max_characters=60_000)["train"]
    lines = [line for row in files for line in row["text"].splitlines() if len(line) > 20]
    return Dataset.from_dict({"text": ["\n".join(lines[i : i + 3]) for i in range(0, len(lines), 3)]})


@pytest.fixture(scope="session")
def tokenizer(texts: Dataset) -> PreTrainedTokenizerBase:
    from tiny import VOCAB

    from llm_distill.data.corpus import train_tokenizer

    return train_tokenizer(texts, VOCAB)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A folder with a `student` and a `teacher`, each with the tokenizer, as a user has them."""
    from tiny import tiny_llama

    folder = tmp_path_factory.mktemp("saved")
    for name, seed, hidden in (("student", 1, 16), ("teacher", 2, 32)):
        tiny_llama(seed, hidden=hidden).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., DistillationConfig]:
    from tiny import make_config

    return lambda **options: make_config(tmp_path / "out", **options)
