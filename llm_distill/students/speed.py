"""How fast a model reads and writes on the machine at hand, and what a token costs in a shape that is not made yet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
from transformers import GenerationConfig, PreTrainedModel

from llm_distill.evaluation.inference import random_prompts, time_batch
from llm_distill.models import context_length
from llm_distill.students.target import config_of_shape

PROMPT_TOKENS, NEW_TOKENS, REPEATS, MOST_SECONDS = 128, 16, 3, 5.0


class Speed(NamedTuple):
    """Tokens a second of one text, the median of several runs."""

    prefill: float
    decode: float


def measure_speed(model: PreTrainedModel) -> Speed:
    """Of a model on the device that it is on: it reads 128 random tokens, and writes 16 with a cache."""
    prompt_tokens = min(PROMPT_TOKENS, (context_length(model) or 2 * PROMPT_TOKENS) - NEW_TOKENS)
    own, model.generation_config = model.generation_config, GenerationConfig()  # its own may end a text early
    try:
        prompt = random_prompts(model, 1, prompt_tokens)
        figures = time_batch(model, prompt, NEW_TOKENS, REPEATS, MOST_SECONDS, str(model.device))
    finally:
        model.generation_config = own
    return Speed(*(figures[f"{kind}_tokens_per_second"]["median"] for kind in ("prefill", "decode")))


def parameters_read(model: PreTrainedModel) -> int:
    """Those that are read for each token that is written, if all experts are: of embeddings that are no head a row."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_tied = getattr(head, "weight", None) is embeddings.weight
    return model.num_parameters() - (0 if is_tied else embeddings.weight.numel())


class Latency:
    """Milliseconds a token that is written, of shapes with random weights, which are as fast as any: a `target.Cost`.
    Each shape is measured once.
    """

    def __init__(self) -> None:
        self.measured: dict[str, float] = {}

    def __call__(self, model: PreTrainedModel, layers: int, sizes: Mapping[str, int]) -> float:
        key = json.dumps([layers, dict(sizes)], sort_keys=True)
        if key not in self.measured:
            config, attention = config_of_shape(model, layers, sizes), model.config._attn_implementation
            with torch.device(model.device):
                shape = type(model)._from_config(config, dtype=model.dtype, attn_implementation=attention)
            self.measured[key] = 1000 / measure_speed(shape.eval()).decode
        return self.measured[key]
