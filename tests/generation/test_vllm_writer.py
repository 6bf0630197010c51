"""What vLLM is given of a student, and what it cannot write for. That it writes is shown in `tests/served`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from tiny import make_config, tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llm_distill import DistillationTrainer
from llm_distill.generation.engines.base import Sampling
from llm_distill.generation.options import OnPolicyOptions
from llm_distill.generation.writers import choose
from llm_distill.generation.writers.vllm import VLLMWriter, merged_weights, seeded, sums_of_bits
from llm_distill.loading import bits_and_bytes

ADAPTERS = {
    "LoRA": {"target_modules": ["q_proj", "down_proj"]},
    "DoRA": {"target_modules": ["v_proj"], "use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "k_proj"]},
    "a head trained whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "none": None,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_merged_weights_are_those_of_the_merged_student_and_its_own_stay_to_the_bit(
    kind: str, dtype: torch.dtype
) -> None:
    student: Any = tiny_llama(1).to(dtype)
    if adapters := ADAPTERS[kind]:
        student = get_peft_model(student, LoraConfig(r=4, init_lora_weights=False, **adapters))
    before = copy.deepcopy(student.state_dict())
    given = {name: weight.clone() for name, weight in merged_weights(student)}
    assert all(torch.equal(before[name], weight) for name, weight in student.state_dict().items())
    merged = copy.deepcopy(student).merge_and_unload() if adapters else student
    expected = dict(merged.named_parameters())
    assert given.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(given[name], weight), name


def test_tied_weights_come_once() -> None:
    names = [name for name, _ in merged_weights(tiny_llama(1, tie_word_embeddings=True))]
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_number_that_has_changed_is_seen(dtype: torch.dtype) -> None:
    student = tiny_llama(1).to(dtype)
    before = sums_of_bits(student)
    assert sums_of_bits(student) == before
    weight = student.model.layers[1].mlp.up_proj.weight.data
    weight[3, 4] = torch.nextafter(weight[3, 4], weight[3, 4] + 1)
    assert sums_of_bits(student) != before


def test_what_is_drawn_depends_on_the_seed_and_nothing_else_notices() -> None:
    before, device = torch.get_rng_state(), torch.device("cpu")
    draws = []
    for seed in (1, 1, 2**32 - 1):
        with seeded(seed, device):
            draws.append(float(torch.rand(())))
    assert draws[0] == draws[1] != draws[2]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_vllm": True, "on_policy_share": 0.0}, "use_vllm .on_policy_share is 0.0"),
        ({"vllm_mode": "server"}, "vllm_mode .use_vllm is off"),
        ({"vllm_gpu_memory_utilization": 0.5}, "vllm_gpu_memory_utilization .use_vllm is off"),
        ({"use_vllm": True, "vllm_mode": "serve"}, "vllm_mode must be colocate or server"),
        ({"use_vllm": True, "vllm_server_port": 80}, "vllm_server_port .vllm_mode is colocate"),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_tensor_parallel_size": 2},
            "vllm_tensor_parallel_size .vllm_mode is server",
        ),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_port": 80, "vllm_server_base_url": "http://a"},
            "vllm_server_base_url is the whole address",
        ),
        ({"use_vllm": True, "vllm_gpu_memory_utilization": 1.5}, "vllm_gpu_memory_utilization is a share"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OnPolicyOptions(**{"on_policy_share": 1.0} | options)


def test_vllm_that_is_not_installed_is_refused_before_data_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "find_spec", lambda name: None)
    args = make_config(tmp_path / "out", on_policy_share=1.0, use_vllm=True)
    with pytest.raises(ValueError, match=r"pip install 'trl\[vllm\]'.*Or leave it out"):
        DistillationTrainer(tiny_llama(1), tiny_llama(2), args, train_dataset=None)


@pytest.fixture(scope="module")
def student(saved: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(saved / "student")


def write(student: Any, tokenizer: PreTrainedTokenizerBase, **options: Any) -> VLLMWriter:
    chosen = OnPolicyOptions(on_policy_share=1.0, use_vllm=True, **options)
    return VLLMWriter(student, tokenizer, Sampling(), Accelerator(cpu=True), chosen)


def test_what_vllm_cannot_write_for_is_refused(
    student: PreTrainedModel, saved: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match="needs CUDA, and the student is on cpu: set vllm_mode=colocate"):
        write(student, tokenizer, vllm_mode="server")
    with pytest.raises(ValueError, match="vllm_tensor_parallel_size=2 must divide the 1 ranks"):
        write(student, tokenizer, vllm_tensor_parallel_size=2)
    with pytest.raises(ValueError, match="'that is nowhere' has no model: save the student"):
        write(tiny_llama(1), tokenizer)
    cut = copy.deepcopy(student)
    cut.model.layers, cut.config.num_hidden_layers = cut.model.layers[:1], 1
    with pytest.raises(ValueError, match="has another shape: save the student"):
        write(cut, tokenizer)
    tied = get_peft_model(tiny_llama(1, tie_word_embeddings=True), LoraConfig(target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="adapters untie them"):
        write(tied, tokenizer)
    packed = AutoModelForCausalLM.from_pretrained(saved / "student", quantization_config=bits_and_bytes(4))
    with pytest.raises(ValueError, match="quantised student: leave it out"):
        write(packed, tokenizer)
