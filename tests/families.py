"""Tiny, randomly initialised models of the causal-LM families of transformers, by `model_type`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB = 96

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 3,
    "cls_token_id": 3,
    "initializer_range": 0.1,
    "init_std": 0.1,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "ffn_dim": 64,
    "sliding_window": 16,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "index_topk": 8,
    "mamba_n_heads": 4,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    "state_size": 8,
}

SPECIAL: dict[str, dict[str, Any]] = {}


def _shrink(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    names = {field.name for field in fields(config_class)}
    values = {name: value for name, value in SMALL.items() if name in names}
    values |= SPECIAL.get(config_class.model_type, {}) | overrides
    for name, part in config_class.sub_configs.items():
        if "model_type" in vars(part):
            values[name] = _shrink(part, values.get(name) or {})
    return config_class(**values)


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    return _shrink(CONFIG_MAPPING[model_type], overrides)


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), dtype=torch.float32).eval()
    head = model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        torch.nn.init.normal_(head.bias)
    return model
