"""A smaller model of a larger one's class: what it can be made of, how it is loaded, and what is written beside it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from llm_distill.files import read_json, write_atomically
from llm_distill.models import evaluating

FILE = "pruning.json"
"""Beside a pruned student: what was taken, of which model, and why."""
PROBE_TOKENS = 48


def require_whole(model: Any) -> None:
    """Raises ValueError for a model of whose weights none can be taken."""
    if isinstance(model, PeftModel):
        raise ValueError(
            "the model has adapters, which are no weights of its own: merge them first (model.merge_and_unload())."
        )
    require_unquantized(model.config, f"the {type(model).__name__}")
    if any(weight.is_meta for weight in model.parameters()):
        raise ValueError("some weights are offloaded: load the whole model into memory, without a device_map.")


def require_unquantized(config: PreTrainedConfig, what: str) -> None:
    """Raises ValueError for the configuration of a model whose weights are packed, naming `what` it is of."""
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{what} is quantised: prune the model that it was made from, in float32 or bfloat16, and quantise the "
            "student."
        )


def make_smaller(
    model: PreTrainedModel, config: PreTrainedConfig, take: Callable[[str, torch.Size], Tensor]
) -> PreTrainedModel:
    """A model of the class of another, in its dtype and on its device, in evaluation mode.

    Args:
        model: what it is made from.
        config: its own configuration.
        take: gives it the weight of a name and a shape, not shared with the model.

    Raises:
        ValueError: these weights are not all that the configuration asks for.
    """
    config = type(config).from_dict(config.to_dict())  # as it will be read
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in type(model)(config).state_dict().items()}
    with _without_bars():
        student, info = type(model).from_pretrained(
            None,
            config=config,
            state_dict={name: take(name, shape) for name, shape in shapes.items()},
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
            output_loading_info=True,
        )
    if lost := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise ValueError(f"its class does not load {lost[0]} as it is.")
    if model.generation_config is not None:
        student.generation_config = copy.deepcopy(model.generation_config)
    student.config._name_or_path = model.config._name_or_path  # where its tokenizer lies
    return student.to(model.device).eval()


def say_the_same(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Whether two computations in `dtype` differ by no more than its rounding: by a thousandth in float32."""
    return bool((logits - expected).norm() <= max(1e-3, 16 * torch.finfo(dtype).eps) * expected.norm())


@torch.no_grad()
def probe_logits(model: PreTrainedModel) -> Tensor:
    """What a model says about a few random tokens, in float32 on the CPU."""
    vocab_size = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        return model(input_ids=ids.to(model.device), use_cache=False).logits.float().cpu()


def save_smaller(
    student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, record: dict[str, Any]
) -> None:
    """A folder that `from_pretrained` loads: the student, the tokenizer, and in `pruning.json` what was taken."""
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_atomically(Path(folder, FILE), (json.dumps(record, indent=2) + "\n").encode())


def kept_layers(folder: str | Path) -> list[int]:
    """Which layer of its teacher each layer of a pruned student was, from 1. Raises ValueError if it is none."""
    return read_json(Path(folder, FILE))["layers"]


@contextmanager
def _without_bars() -> Iterator[None]:
    """Transformers shows how far it is with loading, also where nothing is read."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
