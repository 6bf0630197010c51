"""Real servers on 127.0.0.1: vLLM from its own environment, and `transformers serve`; each is started once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from launch_vllm import START_SECONDS, serving_vllm
from servers import RunningServer, serving
from tiny import VOCAB, tiny_llama
from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def served_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """The folder of a model that vLLM runs on a CPU, where heads are 32 wide at least."""
    folder = tmp_path_factory.mktemp("served") / "teacher"
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    tiny_llama(2, hidden=64, max_position_embeddings=256, **heads).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vllm_server(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Tells the whole vocabulary, if asked."""
    with serving_vllm(
        served_model, tmp_path_factory.mktemp("log") / "vllm.log", "--max-logprobs", str(VOCAB)
    ) as server:
        yield server


@pytest.fixture(scope="session")
def transformers_server(served_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """`transformers serve`, which knows the model by its folder: `str(served_model)`."""
    where = ["--host", "127.0.0.1", "--port", "PORT", "--device", "cpu"]
    with serving(
        [Path(sys.executable).with_name("transformers"), "serve", served_model, *where],
        tmp_path_factory.mktemp("log") / "transformers.log",
        ready="/health",
        seconds=START_SECONDS,
    ) as server:
        yield server
