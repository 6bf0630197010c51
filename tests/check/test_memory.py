"""The memory estimate beside what training steps take, measured in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measured_step
import pytest
import torch
from families import tiny_config
from peft import LoraConfig
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llm_distill import DistillationConfig
from llm_distill.check.memory import estimate_memory

DENSE = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
TEACHER = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}


TASKS: dict[str, dict[str, Any]] = {
    "full": {},
    "checkpointing": {"options": {"activation_checkpointing": True}},
    "bf16, accumulation": {"options": {"bf16": True, "gradient_accumulation_steps": 2}},
    "tied, sgd": {"student": DENSE | {"tie_word_embeddings": True}, "options": {"optim": "sgd"}},
    "lora": {"lora": {"r": 8, "target_modules": "all-linear"}},
    "terms on layers": {"options": {"losses": {"hidden": 1.0, "relations": 1.0, "attention": 1.0, "selectivity": 1.0}}},
    "mixture of experts": {"student": DENSE | EXPERTS, "teacher": TEACHER | EXPERTS},
}


@pytest.fixture(scope="module")
def measured() -> dict[str, dict[str, Any]]:
    """In another process, whose allocator gives back at once: by default, glibc's holds up to half as much again."""
    tasks = [{"student": DENSE, "teacher": TEACHER} | task for task in TASKS.values()]
    worker, environment = Path(measured_step.__file__), {"MALLOC_TRIM_THRESHOLD_": "131072"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", worker, json.dumps(tasks)],
        capture_output=True,
        text=True,
        env=os.environ | environment | {"MALLOC_MMAP_THRESHOLD_": "131072"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(TASKS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize("task", TASKS)
def test_the_measured_peak_is_a_little_below_the_estimate(measured: dict[str, dict[str, Any]], task: str) -> None:
    result = measured[task]
    assert 0.85 < result["measured"] / result["estimated"] < 1.1, result


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "mixtral", "qwen3_moe", "mamba", "gpt2", "gemma3"])
def test_families_are_estimated_from_their_configuration(
    config: Callable[..., DistillationConfig], family: str
) -> None:
    estimate = estimate_memory(tiny_config(family), tiny_config(family), config())
    assert 0 < estimate.weights <= estimate.teacher_weights
    assert estimate.total > estimate.weights + estimate.optimizer + estimate.teacher_weights


def test_a_family_whose_forward_reads_values_is_refused(config: Callable[..., DistillationConfig]) -> None:
    with pytest.raises(ValueError, match="xlm cannot be estimated"):
        estimate_memory(tiny_config("xlm"), None, config())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_packed_weights_take_what_bitsandbytes_packs(
    tmp_path: Path, config: Callable[..., DistillationConfig], family: str, bits: int
) -> None:
    shape = tiny_config(family, hidden_size=64, vocab_size=64)
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(**{f"load_in_{bits}bit": True}, bnb_4bit_quant_type="nf4"),
    )
    taken = sum(p.numel() * p.element_size() for p in packed.parameters())
    taken += sum(p.quant_state.absmax.nbytes for p in packed.parameters() if hasattr(p, "quant_state"))
    estimate = estimate_memory(shape, shape, config(), teacher_bits=bits, teacher_dtype="bfloat16")
    assert estimate.teacher_weights == pytest.approx(taken, rel=0.02)


def test_ranks_that_shard_have_their_share_and_what_they_gather(config: Callable[..., DistillationConfig]) -> None:
    shape = tiny_config("llama", num_hidden_layers=8)
    one = estimate_memory(shape, shape, config())
    eight = estimate_memory(shape, shape, config(), ranks=8, sharded=True)
    assert eight.optimizer == one.optimizer // 8
    assert one.weights / 8 < eight.weights < one.weights / 2
    assert estimate_memory(shape, shape, config(), ranks=8) == one, "copies"
    assert estimate_memory(shape, shape, config(), ranks=8, sharded=True, teacher_bits=4).teacher_weights == (
        estimate_memory(shape, shape, config(), teacher_bits=4).teacher_weights
    ), "packed weights are not sharded"


def test_adapters_alone_have_gradients(config: Callable[..., DistillationConfig]) -> None:
    shape, lora = tiny_config("llama"), LoraConfig(r=4, target_modules=["q_proj"])
    estimate = estimate_memory(shape, None, config(), peft_config=lora)
    assert estimate.gradients == 2 * 4 * (32 + 32) * 4  # layers · r · (in + out) · float32
    assert estimate.optimizer == 2 * estimate.gradients
    packed = estimate_memory(shape, None, config(), peft_config=lora, bits=4)
    assert packed.weights < estimate.weights
