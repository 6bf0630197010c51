"""What training steps take of a process's memory, beside the estimate: one JSON list for a JSON list of tasks.

A task: `student`, `teacher` (fields of a `LlamaConfig`, or of a `Qwen3MoeConfig` with `num_experts`), `options` of the
configuration, `lora`, `device` (cpu).
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # last: recipes have some of its names
from measure import peak_memory
from tiny import make_config

from llm_distill import DistillationTrainer
from llm_distill.check.memory import estimate_memory

VOCAB, LENGTH = 4096, 256


def model_config(**config: Any) -> PreTrainedConfig:
    kind = Qwen3MoeConfig if "num_experts" in config else LlamaConfig
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": VOCAB, "pad_token_id": 0}
    return kind(**(shape | config))


def train(task: dict[str, Any], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, VOCAB, (32, LENGTH)).tolist()
    DistillationTrainer(
        model=AutoModelForCausalLM.from_config(model_config(**task["student"]), dtype=torch.float32),
        teacher=AutoModelForCausalLM.from_config(model_config(**task["teacher"]), dtype=torch.float32),
        args=make_config(tempfile.mkdtemp(), dataset_kwargs={"skip_prepare_dataset": True}, **options),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": ids}),
        processing_class=tokenizer(),
        peft_config=LoraConfig(**task["lora"]) if "lora" in task else None,
    ).train()


def tokenizer() -> PreTrainedTokenizerFast:
    words = models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="w0", eos_token="w1")


def measured(task: dict[str, Any]) -> dict[str, Any]:
    device = task.get("device", "cpu")
    options = {"max_length": LENGTH, "per_device_train_batch_size": 8, "loss_buffer_mib": 16} | task.get("options", {})
    options["use_cpu"] = device == "cpu"
    small = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    train(task | {name: task[name] | small for name in ("student", "teacher")}, options)  # imports and compiles
    with peak_memory(device) as taken:
        train(task, options)
    estimate = estimate_memory(
        model_config(**task["student"]),
        model_config(**task["teacher"]),
        make_config(tempfile.mkdtemp(), **options),
        peft_config=LoraConfig(**task["lora"]) if "lora" in task else None,
        device=device,
        teacher_dtype="float32",
    )
    return {"measured": taken["mib"], "estimated": estimate.total / 2**20, "parts": str(estimate)}


if __name__ == "__main__":
    print(json.dumps([measured(task) for task in json.loads(sys.argv[-1])]))
