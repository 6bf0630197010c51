"""Tiny, randomly initialised models of the causal-LM families of transformers that run on text alone, by `model_type`.

    model = tiny_model("gemma2", **POST_PROCESSED["gemma2"])

The families are sorted by what their code does between the last hidden state and the logits: `POST_PROCESSED` changes
the logits after the output projection, `PRE_PROCESSED` changes the hidden states before it, `ORDINARY` does neither.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCAB = 96


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of `model_type` shrunk to `SMALL` and `SPECIAL`, then overridden.

    A part of a composite configuration is overridden by a dictionary: `text_config={"final_logit_softcapping": 0.5}`.
    """
    return _shrunk(CONFIG_MAPPING[model_type], overrides)


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A causal LM of `tiny_config`, in float32 and evaluation mode, the same for the same seed."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **overrides), dtype=torch.float32).eval()
    bias = model.get_output_embeddings().bias
    if bias is not None:
        torch.nn.init.normal_(bias)  # it starts at zero, where nobody would see it left out
    return model


def _shrunk(config_class: type[PreTrainedConfig], overrides: dict[str, Any]) -> PreTrainedConfig:
    """A `config_class` whose attributes, and those of its parts, are as small as the family allows."""
    names = {field.name for field in fields(config_class)}
    values = {name: value for name, value in SMALL.items() if name in names}
    if "kv_lora_rank" in names:  # latent attention has as many key heads as query heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    values |= deepcopy(SPECIAL.get(config_class.model_type, {}) | overrides)
    for name, part_class in config_class.sub_configs.items():
        part = values.get(name, {})
        if part is not None:
            part_class = CONFIG_MAPPING[part.pop("model_type")] if "model_type" in part else part_class
            values[name] = _shrunk(part_class, part)
    return config_class(**values)


SMALL: dict[str, Any] = {
    # the text
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 3,
    "cls_token_id": 3,
    "max_position_embeddings": 128,
    "n_positions": 128,
    # weights large enough for logits far from uniform
    "initializer_range": 0.1,
    "init_std": 0.1,
    # width
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "emb_dim": 32,
    "embedding_size": 16,
    "hidden_size_per_layer_input": 8,
    "intermediate_size": 64,
    "dense_intermediate_size": 64,
    "decoder_ffn_dim": 64,
    "encoder_ffn_dim": 64,
    "ffn_dim": 64,
    "ffn_hidden_size": 64,
    "dim_ff": 64,
    "dff": 64,
    "d_inner": 64,
    # depth
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layers": 2,
    "n_layer": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "is_decoder": True,
    # attention
    "num_attention_heads": 4,
    "swa_num_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "attention_heads": 4,
    "n_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "swa_num_key_value_heads": 2,
    "head_dim": 8,
    "swa_head_dim": 8,
    "dim_head": 8,
    "rotary_dim": 4,
    "d_rel": 4,
    "rel_extent": 16,
    "sliding_window": 16,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "o_lora_rank": 8,
    "o_groups": 2,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 4,
    "index_head_dim": 8,
    "index_topk": 8,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    # linear attention and state spaces
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 2,
    "mamba_chunk_size": 8,
    "chunk_size": 8,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "expert_ffn_hidden_size": 32,
    "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "router_hidden_size": 16,
}
"""What every configuration that has the attribute gets."""

LINEAR_AND_FULL = {"layer_types": ["linear_attention", "full_attention"]}
CONV_AND_FULL = {"layer_types": ["conv", "full_attention"]}
TEXT_ONLY = {"vision_config": None, "audio_config": None}

SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 16, "encoder_hash_byte_group_size": [3], "num_hidden_layers": 2},
    "blt_local_decoder": {"hidden_size_global": 32},
    "blt_local_encoder": {"hidden_size_global": 32},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense", "dense"]},
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "gemma3": {
        "vision_config": {"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 4},
        "mm_tokens_per_image": 4,
    },
    "gemma3n_text": {"num_kv_shared_layers": 0, "laurel_rank": 8},
    "gemma4": TEXT_ONLY,
    "gemma4_text": {"global_head_dim": 8, "enable_moe_block": True, "top_k_experts": 2},
    "gemma4_unified": TEXT_ONLY,
    "gemma4_unified_text": {"global_head_dim": 8},
    "got_ocr2": {"text_config": {"model_type": "qwen2"}},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": 4},
    "granitemoehybrid": LINEAR_AND_FULL,
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": LINEAR_AND_FULL,
    "lfm2": CONV_AND_FULL,
    "lfm2_moe": CONV_AND_FULL | {"num_dense_layers": 1},
    "lfm3": CONV_AND_FULL,
    "longcat_flash": {"zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "moshi": {"audio_encoder_config": None, "depth_decoder_config": None},
    "moss_transcribe_diarize": {"text_config": {"model_type": "qwen3"}},
    "phi4_multimodal_audio": {
        "num_blocks": 2,
        "ext_pw_out_channel": 32,
        "depthwise_separable_out_channel": 32,
        "nemo_conv_channels": 32,
    },
    "phi4_multimodal_vision": {"image_size": 28, "crop_size": 28},
    "qwen3_5_moe_text": LINEAR_AND_FULL,
    "qwen3_5_text": LINEAR_AND_FULL,
    "qwen3_next": LINEAR_AND_FULL,
    "qwen4_exp_text": LINEAR_AND_FULL | {"hc_lowrank": 8},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "attention_head_size": 8,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
        "feed_forward_size": 64,
    },
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 48},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": VOCAB,
        "shape_embed_dim": 8,
        "shape_vocab_size": VOCAB,
    },
    "xlstm": {"hidden_size": 64, "qk_dim_factor": 1.0, "num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"], "adapter_rank": 8},
    "zaya": {"num_experts_per_tok": 1},
}
"""What a family needs besides. A part that is None keeps its family's default, which no text-only model builds."""

CAP = {"final_logit_softcapping": 0.5}  # small, so that tanh bends
SCALE = {"logit_scale": 0.3}
DIVISOR = {"logits_scaling": 4.0}

POST_PROCESSED: dict[str, dict[str, Any]] = {
    "beam": CAP,
    "cohere": SCALE,
    "cohere2": SCALE,
    "cohere2_moe": SCALE,
    "cohere_compass_text": SCALE,
    "falcon_h1": {"lm_head_multiplier": 0.3},
    "gemma2": CAP,
    "gemma3_text": CAP,
    "gemma3n_text": CAP,
    "gemma4": {"text_config": CAP},
    "gemma4_text": CAP,
    "gemma4_unified": {"text_config": CAP},
    "gemma4_unified_text": CAP,
    "granite": DIVISOR,
    "granite_swa": DIVISOR,
    "granitemoe": DIVISOR,
    "granitemoe_swa": DIVISOR,
    "granitemoehybrid": DIVISOR,
    "granitemoeshared": DIVISOR,
    "hyperclovax": {"logits_scaling": 0.3},  # multiplies, where Granite's attribute of the same name divides
    "inkling2_text": CAP,  # and drops the rows past `unpadded_vocab_size`, here none
    "nanochat": CAP,
    "recurrent_gemma": {"logits_soft_cap": 0.5},
    "vaultgemma": CAP,
    "xlstm": {"output_logit_soft_cap": 0.5},
}
"""Families that scale or softly cap their logits, with the options that make it plain to see."""

PRE_PROCESSED: dict[str, dict[str, Any]] = {
    "inkling_text": {"logits_mup_width_multiplier": 4.0},
    "minicpm3": {"dim_model_base": 8},  # divides by hidden_size / dim_model_base
    # the rest: a dense layer, an activation and a norm
    "bert": {},
    "big_bird": {},
    "camembert": {},
    "data2vec-text": {},
    "electra": {},
    "ernie": {},
    "megatron-bert": {},
    "modernbert-decoder": {},
    "rembert": {},
    "roberta": {},
    "roberta-prelayernorm": {},
    "roc_bert": {},
    "roformer": {},
    "xlm-roberta": {},
    "xlm-roberta-xl": {},
    "xmod": {},
}
"""Families whose projection sees something else than the last hidden state, with the options that make it plain."""

UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "drafts from another model's hidden states and keys, not from tokens",
    "gemma4_unified_assistant": "drafts from another model's hidden states and keys, not from tokens",
    "musicgen": "predicts audio codebooks, from one head each",
    "musicgen_melody": "predicts audio codebooks, from one head each",
    "prophetnet": "predicts several tokens ahead: its projection sees (batch, stream, sequence, hidden)",
}
"""Families left out, and why."""

ORDINARY: list[str] = [
    family for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if family not in POST_PROCESSED | PRE_PROCESSED | UNBUILDABLE
]
"""Every other family of the installed transformers: logits = W h + b of the last hidden state h."""

# fmt: off
MOE: list[str] = [
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "cohere2_moe", "dbrx", "deepseek_v2", "deepseek_v3",
    "deepseek_v32", "deepseek_v4", "dots1", "dots3_note", "dots3_note_text", "ernie4_5_moe", "exaone_moe",
    "flex_olmo", "gemma4", "gemma4_text", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe",
    "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4", "inkling2_text",
    "inkling_text", "jamba", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2_moe", "llama4", "llama4_text",
    "longcat_flash", "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text", "mixtral",
    "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_moe", "qwen3_next",
    "qwen4_exp", "qwen4_exp_text", "solar_open", "zaya",
]
# fmt: on
"""Those that are mixtures of experts."""
