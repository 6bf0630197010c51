"""Tiny, randomly initialised models of the causal-LM families of transformers, by `model_type`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
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
    "qk_rope_head_dim": 8,
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
    "is_decoder": True,
    "dff": 64,
    "dim_ff": 64,
    "dim_head": 8,
    "d_inner": 64,
    "emb_dim": 32,
    "rotary_dim": 4,
    "embedding_size": 16,
    "n_shared_experts": 1,
    "expert_ffn_hidden_size": 32,
    "ffn_hidden_size": 64,
    "moe_shared_expert_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "dense_intermediate_size": 64,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size_per_layer_input": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "d_rel": 4,
    "rel_extent": 16,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "o_groups": 2,
    "o_lora_rank": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "n_groups": 2,
    "router_hidden_size": 16,
    "moe_k": 2,
}

HYBRID = {"layer_types": ["linear_attention", "full_attention"]}

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 16, "encoder_hash_byte_group_size": [3], "cross_attn_k": 2},
    "blt_local_encoder": {"hidden_size_global": 32},
    "blt_local_decoder": {"hidden_size_global": 32},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4}},
    "dots3_note_text": {"num_key_value_heads": 4},
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "gemma3": {"vision_config": {"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 4}, "mm_tokens_per_image": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 8},
    "gemma4": {"vision_config": None, "audio_config": None},
    "gemma4_text": {"global_head_dim": 8},
    "gemma4_unified": {"vision_config": None, "audio_config": None},
    "gemma4_unified_text": {"global_head_dim": 8},
    "got_ocr2": {"text_config": {"model_type": "qwen2"}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "granitemoehybrid": HYBRID,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": HYBRID,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"}},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": HYBRID | {"hc_lowrank": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 16], "num_buckets": 4, "attn_layers": ["local", "lsh"], "attention_head_size": 8, "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "feed_forward_size": 64},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 48},
    "roc_bert": {"pronunciation_embed_dim": 8, "pronunciation_vocab_size": 96, "shape_embed_dim": 8, "shape_vocab_size": 96},
    "xlstm": {"num_heads": 4, "num_blocks": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "adapter_rank": 8},
    "zaya": {"num_experts_per_tok": 1},
    "prophetnet": {"num_encoder_layers": 1, "num_decoder_layers": 2, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4},
    "inkling2_text": {"unpadded_vocab_size": 90},
}


def _shrink(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    names = {field.name for field in fields(config_class)}
    values = {name: value for name, value in SMALL.items() if name in names}
    values |= SPECIAL.get(config_class.model_type, {}) | overrides
    for name, part in config_class.sub_configs.items():
        inner = values.get(name, {})
        if inner is None: continue
        inner=dict(inner)
        part_type = inner.pop("model_type", None)
        if part_type: part = CONFIG_MAPPING[part_type]
        if part is AutoConfig: continue
        values[name] = _shrink(part, inner)
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
