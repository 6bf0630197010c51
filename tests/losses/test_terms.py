"""Each term against the formula of its paper, written down naively over whole texts, one at a time, in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from peft import LoraConfig
from runs import fill_cache, logged, make_trainer
from tiny import tiny_llama
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llm_distill import CachedTeacher, DistillationTrainer, EnsembleTeacher, LiveTeacher
from llm_distill.cache.methods import Hidden
from llm_distill.heads import LMHead
from llm_distill.losses import layers
from llm_distill.losses.attention import attention_maps
from llm_distill.losses.objective import make_term
from llm_distill.models import kept_of
from llm_distill.rows import View
from llm_distill.signals import HiddenSignal
from llm_distill.students.cut import cut_layers
from llm_distill.students.smaller import save_smaller

PAIRS = {1: 2, 2: 3}
IGNORED = -100


def student_and_teacher(**student: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Of other widths, depths, heads and groups of heads."""
    wider = {"num_hidden_layers": 3, "num_attention_heads": 8, "num_key_value_heads": 4}
    return (tiny_llama(1, hidden=16, **student).double(), tiny_llama(2, hidden=64, **wider).double())


def make_texts() -> list[tuple[Tensor, Tensor]]:
    """Ids and labels of three texts; the first has a prompt."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1, 300, (length,), generator=generator) for length in (9, 6, 4)]
    labels = [text.clone() for text in ids]
    labels[0][:4] = IGNORED
    return list(zip(ids, labels, strict=True))


def padded(texts: list[tuple[Tensor, Tensor]], side: str) -> dict[str, Tensor]:
    longest = max(len(ids) for ids, _ in texts)

    def pad(text: Tensor, value: int) -> Tensor:
        missing = longest - len(text)
        return functional.pad(text, (missing, 0) if side == "left" else (0, missing), value=value)

    return {
        "input_ids": torch.stack([pad(ids, 0) for ids, _ in texts]),
        "attention_mask": torch.stack([pad(torch.ones_like(ids), 0) for ids, _ in texts]),
        "labels": torch.stack([pad(labels, IGNORED) for _, labels in without_first(texts)]),
    }


def without_first(texts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Nothing stands before the first token of a text that tells it."""
    return [(ids, torch.cat([torch.full_like(labels[:1], IGNORED), labels[1:]])) for ids, labels in texts]


def packed(texts: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat([ids for ids, _ in texts])[None],
        "position_ids": torch.cat([torch.arange(len(ids)) for ids, _ in texts])[None],
        "labels": torch.cat([labels for _, labels in without_first(texts)])[None],
    }


BATCHES: dict[str, Callable[[list[tuple[Tensor, Tensor]]], dict[str, Tensor]]] = {
    "padded": lambda texts: padded(texts, "right"),
    "padded on the left": lambda texts: padded(texts, "left"),
    "packed": packed,
}


class Whole:
    """What transformers itself says of one text: hidden states, attention maps, projections."""

    def __init__(self, model: PreTrainedModel, ids: Tensor, labels: Tensor, layer: int) -> None:
        attention = model.model.layers[layer - 1].self_attn
        self.projected: dict[str, Tensor] = {}
        hooks = [
            getattr(attention, f"{kind[0]}_proj").register_forward_hook(
                lambda module, inputs, output, kind=kind: self.projected.__setitem__(kind, output[0])
            )
            for kind in ("query", "key", "value")
        ]
        implementation = model.config._attn_implementation
        model.set_attn_implementation("eager")
        outputs = model.model(ids[None], output_hidden_states=True, output_attentions=True)
        model.set_attn_implementation(implementation)
        for hook in hooks:
            hook.remove()
        self.rows = (labels[1:] != IGNORED).nonzero()[:, 0]
        taken = {}
        hook = model.model.layers[layer - 1].register_forward_hook(lambda m, i, o: taken.update(states=o))
        model.model(ids[None])
        hook.remove()
        self.hidden = taken["states"][0][self.rows]
        self.maps = outputs.attentions[layer - 1][0]  # [heads, tokens, tokens]
        self.config = model.config


def attention_kl(ours: Whole, theirs: Whole) -> Tensor:
    values = []
    for row in ours.rows.tolist():
        q, p = (side.maps[:, row, : row + 1].mean(0) for side in (ours, theirs))
        values.append((p * (p / q).log()).sum())
    return torch.stack(values)


def attention_mse(ours: Whole, theirs: Whole) -> Tensor:
    return ((ours.maps.mean(0) - theirs.maps.mean(0)) ** 2)[ours.rows].sum(-1)


def value_relations(ours: Whole, theirs: Whole) -> Tensor:
    """In two heads, over the tokens up to the last that counts."""
    tokens, values = int(ours.rows[-1]) + 1, []
    for head in range(2):
        log = []
        for side in (ours, theirs):
            vectors = side.projected["value"][:tokens].chunk(2, dim=-1)[head]
            log.append((vectors @ vectors.T / vectors.shape[-1] ** 0.5).log_softmax(-1)[ours.rows])
        values.append((log[1].exp() * (log[1] - log[0])).sum(-1))
    return (values[0] + values[1]) / 2


def selectivity(ours: Whole, theirs: Whole) -> Tensor:
    """MMD² with the kernel (a · b)², by its definition over pairs of neurons."""
    neurons = [functional.normalize(side.hidden, dim=0).T for side in (ours, theirs)]

    def mean_kernel(first: Tensor, second: Tensor) -> Tensor:
        return ((first @ second.T) ** 2).mean()

    value = mean_kernel(*neurons[:1] * 2) + mean_kernel(*neurons[1:] * 2) - 2 * mean_kernel(*neurons)
    return value.expand(len(ours.rows))


def rkd(ours: Whole, theirs: Whole) -> Tensor:
    def distances(states: Tensor) -> Tensor:
        n = len(states)
        found = torch.stack([(states[i] - states[j]).norm() for i in range(n) for j in range(n) if i != j])
        return found / found.mean()

    def angles(states: Tensor) -> Tensor:
        n = len(states)
        triples = [(i, j, k) for i in range(n) for j in range(n) for k in range(n) if len({i, j, k}) == 3]
        return torch.stack(
            [functional.cosine_similarity(states[i] - states[j], states[k] - states[j], dim=0) for i, j, k in triples]
        )

    value = functional.huber_loss(distances(ours.hidden), distances(theirs.hidden))
    value = value + 2 * functional.huber_loss(angles(ours.hidden), angles(theirs.hidden))
    return value.expand(len(ours.rows))


TERMS = {
    "attention-kl": ({"name": "attention"}, attention_kl),
    "attention-mse": ({"name": "attention", "distance": "mse"}, attention_mse),
    "relations": ({"name": "relations", "of": "value"}, value_relations),
    "selectivity": ({"name": "selectivity"}, selectivity),
    "rkd": ({"name": "rkd"}, rkd),
}


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("term", TERMS)
def test_value_and_gradient_equal_the_formula_text_by_text(
    term: str, batch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "CHUNK_NUMBERS", 60)  # so that texts are cut
    parameters, formula = TERMS[term]
    (student, teacher), texts = student_and_teacher(), make_texts()
    built = make_term(**parameters, layers=PAIRS).fit(student.config, teacher.config)
    view = View.of(BATCHES[batch](texts))
    with torch.no_grad():
        signal = HiddenSignal(*kept_of(teacher, LMHead.of(teacher), view, built.teacher_needs))
    values = built(kept_of(student, LMHead.of(student), view, built.student_needs), signal, view.positions, None)
    gradient = torch.autograd.grad(values.sum(), list(student.model.layers.parameters()), allow_unused=True)

    expected = [
        torch.stack(
            [
                formula(Whole(student, *text, layer=ours), Whole(teacher, *text, layer=its))
                for ours, its in PAIRS.items()
            ]
        ).mean(0)
        for text in texts
    ]
    wanted = torch.autograd.grad(torch.cat(expected).sum(), list(student.model.layers.parameters()), allow_unused=True)
    torch.testing.assert_close(values, torch.cat(expected), rtol=1e-5, atol=1e-7)  # norms of a family are in float32
    for ours, theirs in zip(gradient, wanted, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_queries_keys_and_values_are_kept_whatever_computes_attention(implementation: str) -> None:
    student, _ = student_and_teacher()
    student.set_attn_implementation(implementation)
    view = View.of(padded(make_texts(), "right"))
    needs = {"query": (2,), "key": (1, 2), "value": (2,)}
    kept = kept_of(student, LMHead.of(student), view, needs).layers
    assert {kind: tuple(states) for kind, states in kept.items()} == needs
    assert kept["query"][2].shape == (3, 9, 4, 4)
    assert kept["value"][2].shape == (3, 9, 2, 4)


@pytest.mark.parametrize(
    "family", ["gpt2", "gpt_neox", "phi3", "qwen3", "granite", "gemma3_text", "deepseek_v3", "mixtral"]
)
def test_the_maps_are_those_of_the_family_itself(family: str) -> None:
    """With fused projections, norms of queries and keys, scales of their own, latent attention."""
    model = tiny_model(family)
    model.set_attn_implementation("eager")
    view = View.of({"input_ids": (ids := torch.randint(5, 90, (2, 7))), "labels": ids})
    with torch.no_grad():
        kept = kept_of(model, LMHead.of(model), view, {"query": (1,), "key": (1,)}).layers
        expected = model(ids, output_attentions=True, use_cache=False).attentions[0]
    for sample in range(2):
        maps = attention_maps(kept["query"][1][sample], kept["key"][1][sample], torch.arange(7))
        torch.testing.assert_close(maps, expected[sample], rtol=1e-4, atol=1e-5)


def test_a_layer_without_attention_is_refused_by_its_number() -> None:
    model = tiny_model("jamba")
    view = View.of({"input_ids": (ids := torch.randint(5, 90, (2, 7))), "labels": ids})
    with pytest.raises(ValueError, match=r"layer 1 of a JambaForCausalLM has no attention of transformers' own kind"):
        kept_of(model, LMHead.of(model), view, {"key": (1,)})


def test_terms_hold_a_student_with_adapters_to_its_own_base(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        student_and_teacher()[0],
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        teacher_adapters_off=True,
        losses={"hidden": 1.0, "attention": 1.0},
    )
    trainer.train()
    assert min(logged(trainer, "hidden") + logged(trainer, "attention")) > 0


def test_an_ensemble_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    student, teacher = student_and_teacher()
    two = EnsembleTeacher([LiveTeacher(teacher, tokenizer), LiveTeacher(tiny_llama(3).double(), tokenizer)])
    with pytest.raises(ValueError, match=r"'relations', which needs the teacher's key and query and value states"):
        make_trainer(tmp_path, tokenizer, student, two, losses={"relations": 1.0})


def test_stored_hidden_states_serve_what_is_compared_before_the_head(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    losses = [{"name": name, "layers": "head"} for name in ("hidden", "selectivity", "rkd")]

    def trainer(folder: str, teacher: Any) -> DistillationTrainer:
        return make_trainer(tmp_path / folder, tokenizer, student_and_teacher()[0], teacher, losses=losses)

    live = trainer("live", LiveTeacher(student_and_teacher()[1], tokenizer))
    fill_cache(live, tmp_path / "cache", Hidden("float32"))
    cached = trainer("cached", CachedTeacher(tmp_path / "cache"))
    for run in (live, cached):
        run.train()
    for name in ("hidden", "selectivity", "rkd", "loss"):
        assert logged(cached, name) == pytest.approx(logged(live, name), rel=1e-4), name
    with pytest.raises(ValueError, match=r"needs the teacher's hidden states, .* serves layers=head"):
        make_trainer(
            tmp_path, tokenizer, student_and_teacher()[0], CachedTeacher(tmp_path / "cache"), losses={"hidden": 1}
        )
    with pytest.raises(ValueError, match="layers=head has hidden states alone, no query and key"):
        make_term("attention", layers="head").fit(*(model.config for model in student_and_teacher()))


def test_matched_heads_need_as_many_on_both_sides(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    student, teacher = student_and_teacher()
    losses = [{"name": "attention", "heads": "matched"}]
    with pytest.raises(
        ValueError, match=r"as many heads on both sides, and layer 1 of the student has 4, layer 2 .* 8"
    ):
        make_trainer(tmp_path, tokenizer, student, LiveTeacher(teacher, tokenizer), losses=losses)


def test_heads_of_relations_must_divide_the_widths(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    student, teacher = student_and_teacher()
    losses = [{"name": "relations", "heads": 3}]
    with pytest.raises(ValueError, match=r"heads=3 does not divide the widths 16 \(student's\) and 64"):
        make_trainer(tmp_path, tokenizer, student, LiveTeacher(teacher, tokenizer), losses=losses)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_term_is_learned_and_logged(
    checkpointing: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    student, teacher = student_and_teacher()
    weights = {"hidden": 1, "attention": 30, "relations": 1, "selectivity": 1, "rkd": 1}
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        student,
        LiveTeacher(teacher, tokenizer),
        losses=json.dumps(weights),
        kd_weight=0.0,
        gradient_checkpointing=checkpointing,
        per_device_train_batch_size=8,
        max_steps=18,
    )
    trainer.train()
    for name in weights:
        values = logged(trainer, name)
        assert sum(values[-3:]) < 0.95 * sum(values[:3]), name  # of three steps a pass over the data
    total = [
        sum(weights[name] * entry[name] for name in weights) for entry in trainer.state.log_history if "hidden" in entry
    ]
    assert logged(trainer, "loss") == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(
    ("rule", "pairs"),
    [("even", {1: 2, 2: 4, 3: 6}), ("last", {3: 6}), ([["1", 1], [3, 5]], {1: 1, 3: 5}), ({"2": 3}, {2: 3})],
)
def test_layers_are_chosen_by_rule_or_by_hand(rule: Any, pairs: dict[int, int]) -> None:
    student, teacher = (tiny_llama(0, num_hidden_layers=count).config for count in (3, 6))
    assert make_term("hidden", layers=rule).fit(student, teacher).layers == pairs


def test_layers_that_were_cut_are_those_of_the_record(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = tiny_llama(0, num_hidden_layers=6)
    cut, keep = make_term("hidden", layers="cut"), [1, 3, 6]
    with pytest.raises(ValueError, match=r"layers=cut needs a student from `llm-distill prune`"):
        cut.fit(tiny_llama(0, num_hidden_layers=3).config, teacher.config)
    save_smaller(cut_layers(teacher, keep), tokenizer, tmp_path, {"layers": keep})
    student = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert cut.fit(student.config, teacher.config).layers == {1: 1, 2: 3, 3: 6}


def test_a_term_twice_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    student, teacher = student_and_teacher()
    with pytest.raises(ValueError, match="losses has 'rkd' twice"):
        make_trainer(
            tmp_path, tokenizer, student, LiveTeacher(teacher, tokenizer), losses=[{"name": "rkd"}, {"name": "rkd"}]
        )


def test_reentrant_checkpointing_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    student, teacher = student_and_teacher()
    with pytest.raises(ValueError, match="use_reentrant=True nothing is learned from layers"):
        make_trainer(
            tmp_path,
            tokenizer,
            student,
            LiveTeacher(teacher, tokenizer),
            losses=[{"name": "rkd"}],
            gradient_checkpointing_kwargs={"use_reentrant": True},
        )
