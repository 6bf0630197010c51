"""What a model writes when it is asked nothing else."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig

from llm_distill.generation import Prompt, Sampling
from llm_distill.models import LanguageModel

GREEDY = Sampling(max_new_tokens=6, temperature=0)
ENDS = [0, 2]
"""The tokenizer's, and the one that the model's configuration names."""


def write_alone(teacher: LanguageModel, prompt: Prompt, **how: Any) -> list[list[int]]:
    """What transformers' `generate` writes after this prompt alone, greedily: the tokens up to the first end."""
    inputs = teacher.tokenizer(prompt.content, return_tensors="pt")
    config = GenerationConfig(eos_token_id=ENDS, pad_token_id=0, max_new_tokens=6, do_sample=False, **how)
    with torch.no_grad():
        output = teacher.model.generate(**inputs, generation_config=config)
    written = output[:, inputs["input_ids"].shape[1] :].tolist()
    ends = [next((n for n, token in enumerate(ids) if token in ENDS), len(ids)) for ids in written]
    return [ids[: end + 1] for ids, end in zip(written, ends, strict=True)]
