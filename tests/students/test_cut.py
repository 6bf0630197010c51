"""Students of some of their teacher's layers: nothing but what was cut is another than before."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from peft import LoraConfig, get_peft_model
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm_distill.models import decoder_layers
from llm_distill.students.choose import block_influence, choose_layers, even_layers, least_missed_layers, mean_loss
from llm_distill.students.cut import config_of_layers, cut_layers

WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {"layer_types": ["linear_attention", "full_attention"] * 2}
PATTERNS: dict[str, dict[str, Any]] = {
    "afmoe": {"num_dense_layers": 2},
    "cohere2": WINDOWS,
    "deepseek_v2": {"first_k_dense_replace": 2},
    "deepseek_v3": {"first_k_dense_replace": 2},
    "dots1": {"first_k_dense_replace": 2},
    "exaone4": WINDOWS,
    "gemma2": WINDOWS,
    "gemma3_text": WINDOWS,
    "gemma3n_text": {"num_kv_shared_layers": 2, **WINDOWS},
    "gemma4_text": WINDOWS,
    "glm4_moe": {"first_k_dense_replace": 2},
    "gpt_oss": WINDOWS,
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"no_rope_layers": [1, 0, 1, 0], "moe_layers": [1, 2]},
    "minimax": LINEAR,
    "qwen2": {"use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe": {"mlp_only_layers": [1]},
    "qwen3_5_text": LINEAR,
    "qwen3_moe": {"decoder_sparse_step": 2},
    "qwen3_next": LINEAR,
    "smollm3": {"no_rope_layers": [1, 0, 1, 0]},
}
"""What of a family's configuration differs from layer to layer."""
FAMILIES = [
    *PATTERNS,
    *("apertus", "arcee", "bloom", "cohere", "ernie4_5", "falcon", "gemma", "glm", "glm4", "gpt2", "gpt_neox", "gptj"),
    *("granite", "granitemoe", "helium", "llama", "mamba", "mistral", "mixtral", "nemotron", "olmo2", "olmoe", "opt"),
    *("phi", "phi3", "qwen3", "seed_oss", "stablelm", "starcoder2"),
]


def four_layers(family: str) -> PreTrainedModel:
    return tiny_model(family, **({"num_hidden_layers": 4} | PATTERNS.get(family, {})))


@pytest.mark.parametrize("family", FAMILIES)
def test_all_layers_are_the_model_itself(family: str) -> None:
    model = four_layers(family)
    student = cut_layers(model, [1, 2, 3, 4])
    assert student.config.to_dict() == model.config.to_dict()
    weights, ours = model.state_dict(), student.state_dict()
    assert list(ours) == list(weights)
    assert all(torch.equal(ours[name], weights[name]) for name in weights)
    assert not {weight.data_ptr() for weight in weights.values()} & {weight.data_ptr() for weight in ours.values()}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_cut_student_is_loaded_by_anybody_and_writes_with_a_cache_what_it_writes_without(
    tmp_path: Path, family: str
) -> None:
    model = four_layers(family)
    cut_layers(model, [1, 2, 4]).save_pretrained(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert len(decoder_layers(student)) == 3
    ids = torch.randint(4, 96, (1, 20), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        student.generate(ids, use_cache=True, **options), student.generate(ids, use_cache=False, **options)
    )


def test_a_cut_llama_is_its_blocks_one_after_the_other() -> None:
    model = tiny_llama(1, num_hidden_layers=4)
    ids = torch.arange(20)[None]
    hidden, positions = model.model.embed_tokens(ids), torch.arange(20)[None]
    mask = torch.full((20, 20), -torch.inf).triu(1)[None, None]
    for number in (1, 3):
        hidden = model.model.layers[number - 1](
            hidden, attention_mask=mask, position_embeddings=model.model.rotary_emb(hidden, positions)
        )
    expected = model.lm_head(model.model.norm(hidden))
    torch.testing.assert_close(cut_layers(model, [1, 3])(ids).logits, expected)


def test_what_the_configuration_says_of_each_layer_goes_along() -> None:
    config = four_layers("qwen3_moe").config  # dense, experts, dense, experts
    assert config_of_layers(config, [1, 2, 4]).mlp_only_layers == [0]
    config = four_layers("gemma3n_text").config
    assert config_of_layers(config, [1, 2, 4]).num_kv_shared_layers == 1
    assert config_of_layers(config, [1, 2, 4]).layer_types == ["sliding_attention", "full_attention", "full_attention"]
    config = four_layers("qwen2").config
    assert config_of_layers(config, [2, 3, 4]).max_window_layers == 1


@pytest.mark.parametrize(
    ("family", "keep", "why"),
    [
        ("diffllama", [2, 3], "lambda_init"),  # grows with the number of the layer
        ("modernbert-decoder", [2, 3], "Identity"),  # the first layer has no norm
        ("gemma3n_text", [3, 4], "layers 3, 4 of a Gemma3nForCausalLM"),  # the layers whose keys are shared are gone
    ],
)
def test_layers_that_the_family_cannot_be_told_of_are_refused(family: str, keep: list[int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        cut_layers(four_layers(family), keep)


@pytest.mark.parametrize(
    ("keep", "why"),
    [
        ([], "no layer is kept"),
        ([1, 5], "there is no layer 5: the model has layers 1 to 4"),
        ([0, 1], "there is no layer 0"),
        ([1, 2, 2], "layer 2 is named twice"),
        ([2, 1], "give 1 2"),
    ],
)
def test_layers_that_cannot_be_kept_are_refused(keep: list[int], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        cut_layers(tiny_llama(1, num_hidden_layers=4), keep)


def test_models_with_adapters_or_packed_weights_are_refused() -> None:
    model = tiny_llama(1)
    with pytest.raises(ValueError, match="merge them first"):
        cut_layers(get_peft_model(tiny_llama(1), LoraConfig(target_modules=["q_proj"])), [1])
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(ValueError, match="quantised"):
        cut_layers(model, [1])


@pytest.fixture
def blocks() -> list[torch.Tensor]:
    return list(torch.randint(320, (5, 17), generator=torch.Generator().manual_seed(1)).split(3))


def test_influence_is_that_of_a_naive_reference(blocks: list[torch.Tensor]) -> None:
    model = tiny_llama(1, num_hidden_layers=4).eval()
    ids = torch.cat(blocks)
    states: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0]))
    with torch.no_grad():
        states = [*model(ids, output_hidden_states=True).hidden_states[:-1], states[0]]
    angles = [torch.cosine_similarity(a.double(), b.double(), dim=-1) for a, b in pairwise(states)]
    assert block_influence(model, blocks) == pytest.approx([1 - float(angle.mean()) for angle in angles], rel=1e-4)
    influence = block_influence(model, blocks)
    kept = choose_layers(model, 2, "influence", blocks)
    assert kept == sorted(sorted(range(1, 5), key=lambda number: -influence[number - 1])[:2])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_greedy_leaves_out_what_trying_all_models_leaves_out(family: str) -> None:
    model = four_layers(family)
    blocks = list(torch.randint(4, 96, (4, 17), generator=torch.Generator().manual_seed(1)).split(2))
    left, expected = [1, 2, 3, 4], []
    for _ in range(2):
        losses = {}
        for number in left:
            student = cut_layers(model, [other for other in left if other != number])
            with torch.no_grad():
                losses[number] = sum(float(student(ids, labels=ids).loss) for ids in blocks) / 2
        least = min(losses, key=lambda number: losses[number])
        left.remove(least)
        expected.append((least, pytest.approx(losses[least], rel=1e-4)))
    assert least_missed_layers(model, 2, blocks) == expected
    assert mean_loss(cut_layers(model, left), blocks) == expected[-1][1]


def test_even_layers_are_those_of_distilbert() -> None:
    assert even_layers(12, 6) == [1, 3, 5, 8, 10, 12]
    assert even_layers(4, 4) == [1, 2, 3, 4]
    assert even_layers(4, 1) == [1]


def test_more_layers_than_there_are_cannot_be_chosen(blocks: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match=r"5 layers cannot be kept: the model has 4\."):
        choose_layers(tiny_llama(1, num_hidden_layers=4), 5, "influence", blocks)
