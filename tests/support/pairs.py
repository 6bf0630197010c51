"""The models of `recipes/*-from-*`: their published configurations, and the same shrunk to what a test can train.

`configs/` holds the `config.json` of each model. Shrunk are depth and width; class, options and the padding past the
tokenizer are the model's own.
"""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

RECIPES = Path(__file__).parents[2] / "recipes"
PAIRS = sorted(path.parent.name for path in RECIPES.glob("*-from-*/live.yaml"))

PARAMETERS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-30B-A3B": 30_532_122_624,
    "google/gemma-3-1b-it": 999_885_952,
    "google/gemma-3-12b-it": 12_187_325_040,
}
"""As the Hub counts them."""
TOKENS = {"Qwen2.5": 151_665, "Llama": 128_256, "SmolLM2": 49_152, "Qwen3": 151_669, "gemma": 262_144}
"""Of each family's tokenizer; Gemma's without the placeholder for pictures that it has besides."""

CHATML = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "extra_special_tokens": ["<|im_start|>"]}
SPECIAL_TOKENS: dict[str, dict[str, Any]] = {
    "Qwen2.5": CHATML,
    "Qwen3": CHATML | {"extra_special_tokens": ["<|im_start|>", "<think>", "</think>"]},
    "SmolLM2": CHATML | {"pad_token": "<|im_end|>"},
    "Llama": {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "extra_special_tokens": ["<|start_header_id|>", "<|end_header_id|>"],
    },
    "gemma": {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "extra_special_tokens": {
            "sot_token": "<start_of_turn>",
            "eot_token": "<end_of_turn>",
            "image_token": "<image_soft_token>",
        },
    },
}
TEMPLATES = {
    "Qwen2.5": "qwen2_5",
    "Llama-3.1": "llama3_1",
    "Llama-3.2": "llama3_2",
    "Qwen3": "qwen3",
    "gemma": "gemma3",
}
"""TRL has copies of what the models come with, but for SmolLM2's."""
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful AI assistant "
    "named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def recipe(pair: str, kind: str) -> Path:
    return RECIPES / pair / f"{kind}.yaml"


def options_of(pair: str, kind: str) -> dict[str, Any]:
    return yaml.safe_load(recipe(pair, kind).read_text())


def models_of(pair: str) -> tuple[str, str]:
    """Student and teacher."""
    live = options_of(pair, "live")
    return live["model_name_or_path"], live["teacher_model_name_or_path"]


MODELS = [model for pair in PAIRS for model in models_of(pair)]


def family_of(model: str, families: dict[str, Any] = TOKENS) -> str:
    return next(family for family in families if model.split("/")[1].startswith(family))


def published(model: str) -> dict[str, Any]:
    """What its `config.json` says."""
    return json.loads((Path(__file__).parent / "configs" / f"{model.split('/')[1]}.json").read_text())


def published_config(model: str) -> PreTrainedConfig:
    return as_config(published(model))


def as_config(values: dict[str, Any]) -> PreTrainedConfig:
    return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def tiny_tokenizer(model: str, trained: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """`trained` with the special tokens and the chat template of `model`'s own."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=type(trained.backend_tokenizer).from_str(trained.backend_tokenizer.to_str()),
        **SPECIAL_TOKENS[family_of(model)],
    )
    name = None if "SmolLM2" in model else TEMPLATES[family_of(model, TEMPLATES)]
    tokenizer.chat_template = (
        SMOLLM2_TEMPLATE if name is None else (files("trl") / "chat_templates" / f"{name}.jinja").read_text()
    )
    return tokenizer


def tiny_config(model: str, tokens: int, hidden: int = 64) -> PreTrainedConfig:
    """`model`'s configuration shrunk, for a tokenizer of `tokens`."""
    values = published(model)
    text = values.get("text_config", values)
    padding = published_config(model).get_text_config().vocab_size - TOKENS[family_of(model)]
    text |= {
        "vocab_size": tokens + padding,
        "hidden_size": hidden,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "initializer_range": 0.1,  # logits far from uniform
    }
    if "num_experts" in text:
        text |= {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2}
    if "gemma" in model:
        text |= {"sliding_window": 8, "sliding_window_pattern": 2}  # a layer of each kind
    if "vision_config" in values:
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
        values["vision_config"] |= tower | {"image_size": 8, "patch_size": 4}
        values |= {"mm_tokens_per_image": 4, "image_token_index": tokens, "boi_token_index": 0, "eoi_token_index": 1}
    for part in (values, text):
        part |= {name: None for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in part}
    return as_config(values)


def tiny_model(model: str, tokens: int, seed: int = 0, hidden: int = 64) -> PreTrainedModel:
    torch.manual_seed(seed)
    tiny = AutoModelForCausalLM.from_config(tiny_config(model, tokens, hidden), dtype=torch.float32).eval()
    tiny.get_output_embeddings().weight.data[tokens:] = 0  # nobody has learned to say these
    return tiny
