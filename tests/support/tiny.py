"""Tiny models and configurations, the same in every process that asks for the same seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from llm_distill import DistillationConfig

VOCAB = 320


def tiny_llama(seed: int, hidden: int = 32, vocab_size: int = VOCAB, **config: Any) -> PreTrainedModel:
    """A Llama with two layers that is the same for the same seed."""
    torch.manual_seed(seed)
    defaults = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,  # logits far from uniform, so that a wrong one is seen
    }
    return AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=vocab_size, hidden_size=hidden, intermediate_size=2 * hidden, **(defaults | config))
    )


def make_config(folder: Path | str, **options: Any) -> DistillationConfig:
    """A configuration for tests: CPU, float32, nothing saved, nothing reported."""
    defaults = {
        "bf16": False,  # the default depends on the machine
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_length": 64,
    }
    return DistillationConfig(output_dir=str(folder), **(defaults | options))
