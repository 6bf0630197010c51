"""Narrower students: what is left says what it says in the teacher, and it is what is most active there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from tiny import tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from llm_distill.students.options import WIDTHS
from llm_distill.students.prune import measure_importances, most_important, prune_widths, width_of
from llm_distill.students.speed import Latency, measure_speed, parameters_read
from llm_distill.students.target import (
    count_parameters,
    multiple_of,
    narrower,
    parse_amount,
    propose_shapes,
    search_shapes,
)

SIZES = {"intermediate_size": 40, "hidden_size": 24, "num_attention_heads": 2, "num_experts": 3}
DENSE, EXPERTS = WIDTHS[:3], WIDTHS[1:]
FAMILIES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("apertus", "arcee", "cohere", "cohere2", "exaone4", "gemma", "gemma2", "gemma3_text"), DENSE),
    **dict.fromkeys(("glm", "glm4", "granite", "llama", "ministral", "mistral", "olmo"), DENSE),
    **dict.fromkeys(("qwen2", "qwen3", "seed_oss", "smollm3", "starcoder2"), DENSE),
    **dict.fromkeys(("granitemoe", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"), EXPERTS),
    "deepseek_v3": ("intermediate_size", *EXPERTS),
    **dict.fromkeys(("olmo2", "phi3"), WIDTHS[:2]),
    **dict.fromkeys(("gpt_neox", "helium", "stablelm"), WIDTHS[:1]),
    "olmoe": ("num_experts",),
}
"""What can be pruned in them."""


@pytest.fixture
def blocks() -> list[Tensor]:
    return list(torch.randint(4, 96, (5, 17), generator=torch.Generator().manual_seed(1)).split(3))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_narrower_student_is_loaded_by_anybody_and_writes_with_a_cache_what_it_writes_without(
    tmp_path: Path, family: str, blocks: list[Tensor]
) -> None:
    sizes = {option: SIZES[option] for option in FAMILIES[family]}
    model = tiny_model(family)
    student, _ = prune_widths(model, sizes, blocks)
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert loaded.num_parameters() == count_parameters(model, 2, sizes) < model.num_parameters()
    ids = torch.randint(4, 96, (1, 20), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        loaded.generate(ids, use_cache=True, **options), loaded.generate(ids, use_cache=False, **options)
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_narrower_llama_has_the_rows_and_columns_of_what_is_kept(blocks: list[Tensor], tied: bool) -> None:
    model = tiny_llama(1, tie_word_embeddings=tied)
    widths = {option: width_of(model, option) for option in DENSE}
    importances = measure_importances(model, list(widths.values()), blocks)
    channels = most_important(importances["hidden_size"], 24)[0]
    student = prune_widths(model, {option: SIZES[option] for option in DENSE}, blocks).student
    assert torch.equal(student.lm_head.weight, model.lm_head.weight[:, channels])
    assert torch.equal(student.model.embed_tokens.weight, model.model.embed_tokens.weight[:, channels])
    assert (student.lm_head.weight is student.model.embed_tokens.weight) == tied
    for number, (ours, theirs) in enumerate(zip(student.model.layers, model.model.layers, strict=True)):
        neurons = most_important(importances["intermediate_size"], 40)[number]
        group = int(most_important(importances["num_attention_heads"], 1)[number])
        heads, key = slice(group * 16, group * 16 + 16), slice(group * 8, group * 8 + 8)
        for name, rows in (("q_proj", heads), ("k_proj", key), ("v_proj", key)):
            weight = getattr(theirs.self_attn, name).weight
            assert torch.equal(getattr(ours.self_attn, name).weight, weight[rows][:, channels])
        assert torch.equal(ours.self_attn.o_proj.weight, theirs.self_attn.o_proj.weight[channels][:, heads])
        for name in ("gate_proj", "up_proj"):
            weight = getattr(theirs.mlp, name).weight
            assert torch.equal(getattr(ours.mlp, name).weight, weight[neurons][:, channels])
        assert torch.equal(ours.mlp.down_proj.weight, theirs.mlp.down_proj.weight[channels][:, neurons])


@pytest.mark.parametrize("family", ["llama", "glm", "deepseek_v3", "gemma2", "starcoder2"])
@pytest.mark.parametrize("option", ["intermediate_size", "num_attention_heads"])
def test_what_is_left_says_what_it_says_where_the_others_are_silent(
    blocks: list[Tensor], family: str, option: str
) -> None:
    model = tiny_model(family)
    width = width_of(model, option)
    keep = most_important(measure_importances(model, [width], blocks)[option], SIZES[option] // width.heads_per_unit)
    student = prune_widths(model, {option: SIZES[option]}, blocks).student
    rows = iter(keep)
    with torch.no_grad():
        for module in width.readers.values():
            per_unit = module.in_features // width.units
            mask = torch.zeros(width.units).index_fill(0, next(rows), 1).repeat_interleave(per_unit)
            module.weight.mul_(mask)
        torch.testing.assert_close(student(blocks[0]).logits, model(blocks[0]).logits, rtol=1e-4, atol=1e-5)


def recorded(model: PreTrainedModel, module: nn.Module, blocks: list[Tensor], place: str) -> Tensor:
    """What goes into a module, or comes out of it, [tokens, width]."""
    kept: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, inputs, output: kept.append(inputs[0] if place == "in" else output))
    with torch.no_grad():
        for ids in blocks:
            model(ids)
    hook.remove()
    return torch.cat([states.flatten(0, -2) for states in kept]).double()


def test_importances_are_those_of_a_naive_reference(blocks: list[Tensor]) -> None:
    model = tiny_llama(1)
    measured = measure_importances(model, [width_of(model, option) for option in DENSE], blocks)
    channels = torch.zeros(32, dtype=torch.float64)
    for number, layer in enumerate(model.model.layers):
        inner = recorded(model, layer.mlp, blocks, "in").float()
        said = (nn.functional.silu(layer.mlp.gate_proj(inner)) * layer.mlp.up_proj(inner)).detach().double()
        torch.testing.assert_close(measured["intermediate_size"][number], said.abs().sum(0), rtol=1e-4, atol=1e-4)
        heads = recorded(model, layer.self_attn.o_proj, blocks, "in").view(-1, 2, 2, 8).norm(dim=-1)
        torch.testing.assert_close(measured["num_attention_heads"][number], heads.sum((0, 2)), rtol=1e-4, atol=1e-4)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            channels += recorded(model, norm, blocks, "out").abs().sum(0)
    torch.testing.assert_close(measured["hidden_size"][0], channels, rtol=1e-4, atol=1e-4)


def test_experts_are_kept_by_the_weight_with_which_they_are_chosen(blocks: list[Tensor]) -> None:
    model = tiny_model("qwen3_moe")
    measured = measure_importances(model, [width_of(model, "num_experts")], blocks)["num_experts"]
    student = prune_widths(model, {"num_experts": 3}, blocks).student
    for layer, ours, theirs in zip(range(2), student.model.layers, model.model.layers, strict=True):
        shares = (recorded(model, theirs.mlp, blocks, "in").float() @ theirs.mlp.gate.weight.T).softmax(-1)
        best = shares.topk(2)
        weights = best.values / best.values.sum(-1, keepdim=True) if model.config.norm_topk_prob else best.values
        expected = torch.zeros(4, dtype=torch.float64)
        expected.index_add_(0, best.indices.flatten(), weights.flatten().double().detach())
        torch.testing.assert_close(measured[layer], expected, rtol=1e-4, atol=1e-5)
        kept = expected.topk(3).indices.sort().values
        assert torch.equal(ours.mlp.gate.weight, theirs.mlp.gate.weight[kept])
        assert torch.equal(ours.mlp.experts.gate_up_proj, theirs.mlp.experts.gate_up_proj[kept])
        assert torch.equal(ours.mlp.experts.down_proj, theirs.mlp.experts.down_proj[kept])


@pytest.mark.parametrize(
    ("family", "sizes", "why"),
    [
        ("llama", {"intermediate_size": 64}, "intermediate_size=64 is no smaller width, there are 64"),
        ("llama", {"num_attention_heads": 3}, "2 heads share a key: take a multiple of 2"),
        ("llama", {"num_experts": 2}, "has no num_experts"),
        ("qwen3_moe", {"num_experts": 1}, "each token goes to 2"),
        ("qwen3_moe", {"intermediate_size": 32}, "none of its weights has intermediate_size"),
        ("mixtral", {"intermediate_size": 32}, "not read by one linear module of a layer"),
        ("phi3", {"num_attention_heads": 2}, "a Phi3ForCausalLM cannot be pruned to num_attention_heads"),
        ("olmo2", {"num_attention_heads": 2}, "says something else"),  # it norms all heads together
        ("helium", {"hidden_size": 24}, "mat1 and mat2"),  # what reads its heads is as wide as the hidden states
        ("gpt2", {"hidden_size": 16}, "head_dim of"),
        ("rembert", {"hidden_size": 16}, "attention_head_size of"),
    ],
)
def test_what_cannot_be_narrower_is_refused_by_name(
    blocks: list[Tensor], family: str, sizes: dict[str, int], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        prune_widths(tiny_model(family), sizes, blocks)


def test_shapes_for_a_size_are_the_largest_that_fit() -> None:
    model = tiny_llama(1, num_hidden_layers=4)
    target = int(0.7 * model.num_parameters())
    shapes = propose_shapes(model, target)
    assert [shape.name for shape in shapes] == ["fewer layers", "narrower", "both"]
    assert all(count_parameters(model, shape.layers, shape.sizes) == shape.parameters <= target for shape in shapes)
    assert count_parameters(model, shapes[0].layers + 1, {}) > target
    assert shapes[1].layers == 4
    assert shapes[0].layers < shapes[2].layers < 4
    assert multiple_of(1536) == 64
    assert multiple_of(576) == 32


def test_speed_is_measured_whatever_ends_a_text_and_each_shape_once() -> None:
    model = tiny_llama(1, num_hidden_layers=4)
    model.generation_config = own = GenerationConfig(eos_token_id=list(range(320)), do_sample=True)
    assert min(measure_speed(model)) > 0
    assert model.generation_config is own
    latency = Latency()
    assert latency(model, 1, {"intermediate_size": 8}) == latency(model, 1, {"intermediate_size": 8}) > 0
    untied = model.num_parameters() - 320 * 32
    assert parameters_read(model) == untied
    assert parameters_read(tiny_llama(1, num_hidden_layers=4, tie_word_embeddings=True)) == untied


def test_a_search_draws_different_shapes_of_about_the_same_size() -> None:
    model = tiny_llama(1, num_hidden_layers=6)
    target = int(0.6 * model.num_parameters())
    shapes = search_shapes(model, target, 6)
    assert len(shapes) == len({(shape.layers, *sorted(shape.sizes.items())) for shape in shapes}) == 6
    assert all(shape.parameters <= target for shape in shapes)
    assert all(shape.parameters >= 0.9 * target for shape in shapes[3:])
    assert len({shape.layers for shape in shapes}) > 2
    assert search_shapes(model, target, 2) == propose_shapes(model, target)[:2]
    heads = narrower(tiny_llama(1, hidden=128, num_key_value_heads=4), [("num_attention_heads", 1 / 2)])
    assert [*heads] == [{}, {"num_attention_heads": 2}]  # 3 of the family do not divide 128


@pytest.mark.parametrize(
    ("name", "text", "amount"),
    [
        ("target", "0.5x", (0.5, "x")),
        ("params", "80M", (80e6, "")),
        ("params", "1.5B", (1.5e9, "")),
        ("bytes", "150MB", (150e6, "b")),
        ("latency", "20 ms", (20, "ms")),
        ("latency", "0.5x", (0.5, "x")),
    ],
)
def test_amounts_are_read_as_people_write_them(name: str, text: str, amount: tuple[float, str]) -> None:
    assert parse_amount(name, text) == amount
