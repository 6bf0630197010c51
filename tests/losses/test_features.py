"""Hidden states beside the teacher's: their value, their gradient, and what becomes of the projections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from golden import Sparse
from peft import LoraConfig
from runs import fill_cache, first_batch, logged, make_trainer, without_labels
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from llm_distill import CachedTeacher, DistillationTrainer, LiveTeacher
from llm_distill.cache.methods import Hidden
from llm_distill.losses.objective import make_term
from llm_distill.rows import View
from llm_distill.students.modules import FILE, MODULES

LAYERS = {1: 2, 2: 1}
LOSSES = [{"name": "hidden", "layers": LAYERS, "weight": 0.3}]


def trainer_with_term(
    folder: Path, tokenizer: PreTrainedTokenizerBase, width: int = 16, **options: Any
) -> DistillationTrainer:
    student, teacher = tiny_llama(1, hidden=width).double(), LiveTeacher(tiny_llama(2).double(), tokenizer)
    return make_trainer(folder, tokenizer, student, teacher, **({"losses": LOSSES} | options))


@pytest.mark.parametrize("width", [16, 32], ids=["projected", "of the teacher's width"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_value_and_gradient_equal_autograd_on_all_hidden_states(
    width: int, checkpointing: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    losses = [{"name": "hidden", "layers": {1: 1}, "weight": 0.3}]
    trainer = trainer_with_term(tmp_path, tokenizer, width, losses=losses, gradient_checkpointing=checkpointing)
    assert hasattr(trainer.model, MODULES) == (width == 16)
    if checkpointing:
        trainer.model.gradient_checkpointing_enable()
    batch = first_batch(trainer)
    trainer.model.train()
    with_term = gradients(trainer, batch)
    trainer.objective = type(trainer.objective)(trainer.objective.head)
    without = gradients(trainer, batch)

    positions, inputs = View.of(batch).positions, without_labels(batch)
    student = trainer.model.model(**inputs, output_hidden_states=True).hidden_states[1]
    with torch.no_grad():
        teacher = trainer.teacher.model.model(**inputs, output_hidden_states=True).hidden_states[1]
    ours, theirs = (states[positions.sample, positions.position] for states in (student, teacher))
    if width == 16:
        ours = getattr(trainer.model, MODULES)["hidden"]["1"](ours)
    (0.3 * (ours - theirs).square().mean(-1).mean()).backward()
    for name, parameter in trainer.model.named_parameters():  # the family's norm is in float32, forward and backward
        expected = without.get(name, 0) + (0 if parameter.grad is None else parameter.grad)
        torch.testing.assert_close(with_term[name], expected, rtol=1e-5, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def gradients(trainer: DistillationTrainer, batch: Any) -> dict[str, Tensor]:
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    found = {name: p.grad for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    return found


def test_a_projection_learns_is_saved_beside_the_student_and_is_no_part_of_it(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = trainer_with_term(tmp_path, tokenizer, save_strategy="steps", save_steps=2, max_steps=4)
    before = getattr(trainer.model, MODULES)["hidden"]["1"].weight.clone()
    trainer.train()
    trainer.save_model()
    assert len(logged(trainer, "hidden")) == 4
    assert not torch.equal(getattr(trainer.model, MODULES)["hidden"]["1"].weight, before)
    out = Path(trainer.args.output_dir)
    for folder in (out, out / "checkpoint-2"):
        assert not any(MODULES in name for name in load_file(folder / "model.safetensors"))
        assert load_file(folder / FILE).keys() == {"hidden.1.weight", "hidden.2.weight"}
    student = AutoModelForCausalLM.from_pretrained(out)
    assert not hasattr(student, MODULES)
    assert trainer.run.record["student.parameters"] == student.num_parameters()


def test_adapters_learn_from_hidden_states_too(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lora = LoraConfig(r=4, target_modules="all-linear")
    trainer = trainer_with_term(tmp_path, tokenizer, peft_config=lora, kd_weight=0.0, ce_weight=0.1, max_steps=12)
    trainer.train()
    hidden = logged(trainer, "hidden")
    assert sum(hidden[-3:]) < sum(hidden[:3])
    trainer.save_model()
    assert not any(MODULES in name for name in load_file(Path(trainer.args.output_dir, "adapter_model.safetensors")))


def test_equal_models_have_no_error(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = LiveTeacher(tiny_llama(1).double(), tokenizer)
    losses = [{"name": "hidden", "layers": {1: 1, 2: 2}}]
    trainer = make_trainer(tmp_path, tokenizer, tiny_llama(1).double(), teacher, losses=losses)
    trainer.train()
    assert logged(trainer, "hidden")[0] == 0


def test_a_teacher_that_has_no_layers_is_refused_when_the_trainer_is_built(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    sparse = Sparse(LiveTeacher(tiny_llama(2), tokenizer))
    with pytest.raises(ValueError, match=r"'hidden', which needs the teacher's hidden states, and a Sparse gives none"):
        make_trainer(tmp_path, tokenizer, tiny_llama(1, hidden=16), sparse, losses=LOSSES)


BY_GRADIENT = {"name": "hidden", "layers": "head", "dimensions": "by_gradient", "weight": 0.3}


@pytest.mark.parametrize("is_cached", [False, True])
def test_dimensions_by_gradient_are_those_that_the_teachers_loss_depends_on_most(
    is_cached: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = trainer_with_term(tmp_path, tokenizer, losses=[BY_GRADIENT], save_strategy="steps", save_steps=1)
    chosen = getattr(trainer.model, MODULES)["hidden"].chosen
    teacher, importance = trainer.teacher.model, torch.zeros(32, dtype=torch.float64)
    for row in trainer.train_dataset:
        inputs = trainer.collate([row])
        positions = View.of(inputs).positions
        hidden = teacher.model(**without_labels(inputs)).last_hidden_state.detach().requires_grad_()
        rows = teacher.lm_head(hidden)[positions.sample, positions.position]
        torch.nn.functional.cross_entropy(rows, positions.targets, reduction="sum").backward()
        importance += (hidden * hidden.grad)[positions.sample, positions.position].abs().sum(0)
    assert chosen.tolist() == sorted(importance.argsort(descending=True)[:16].tolist()) != list(range(16))
    if is_cached:
        fill_cache(trainer, tmp_path / "cache", Hidden("float32"))
        cached = CachedTeacher(tmp_path / "cache")
        other = make_trainer(tmp_path, tokenizer, tiny_llama(1, hidden=16).double(), cached, losses=[BY_GRADIENT])
        assert torch.equal(getattr(other.model, MODULES)["hidden"].chosen, chosen)
        return
    batch, before = first_batch(trainer), trainer.objective
    inputs, positions = without_labels(batch), View.of(batch).positions
    with_term = gradients(trainer, batch)
    trainer.objective = type(before)(before.head)
    without, trainer.objective = gradients(trainer, batch), before
    ours, theirs = (model(**inputs).last_hidden_state for model in (trainer.model.model, teacher.model))
    ours, theirs = (states[positions.sample, positions.position] for states in (ours, theirs))
    (0.3 * (ours - theirs[:, chosen].detach()).square().mean(-1).mean()).backward()
    for name, parameter in trainer.model.named_parameters():
        expected = without.get(name, 0) + (0 if parameter.grad is None else parameter.grad)
        torch.testing.assert_close(with_term[name], expected, rtol=1e-5, atol=1e-8)
    trainer.model.zero_grad()
    trainer.train()
    stored = load_file(Path(trainer.args.output_dir, "checkpoint-1", FILE))
    assert torch.equal(stored["hidden.chosen"], chosen)


def test_dimensions_of_a_student_as_wide_as_its_teacher_are_not_chosen(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=r"chooses among the teacher's 32, and the student has 32: leave it out"):
        trainer_with_term(tmp_path, tokenizer, 32, losses=[BY_GRADIENT])


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ({"name": "logits"}, "there is no term 'logits', only hidden, attention, relations, selectivity, rkd"),
        ({"weight": 1}, "there is no term None, only hidden"),
        ({"name": ["hidden"]}, "there is no term \\['hidden'\\], only"),
        ({"name": "hidden", "layer": {1: 1}}, "hidden has no 'layer', only layers, weight, distance, dimensions"),
        ({"name": "hidden", "layers": {}}, "needs pairs of layers counted from 1"),
        ({"name": "hidden", "layers": "middle"}, r"layers is even, last, cut or head, or pairs like \{4: 8\}"),
        ({"name": "hidden", "layers": [[1, 1], [1, 2]]}, "a layer of the student is named twice"),
        ({"name": "hidden", "layers": [[1.5, 1]]}, "layers is even, last, cut or head"),
        ({"name": "hidden", "weight": "much"}, "weight must be positive and finite, got 'much'"),
        ({"name": "hidden", "distance": "l1"}, "distance must be mse or cosine, got 'l1'"),
        ({"name": "hidden", "dimensions": "best"}, "dimensions must be projected or by_gradient, got 'best'"),
        ({"name": "hidden", "dimensions": "by_gradient"}, "are of what goes into the head: give it layers=head"),
        ({"name": "attention", "heads": "first"}, "heads must be mean or matched, got 'first'"),
        ({"name": "relations", "of": ["output"]}, "of must be some of query, key, value"),
        ({"name": "relations", "heads": 0}, "heads must be a number from 1"),
        ({"name": "rkd", "rows": 2}, "rows must be a number from 3"),
        ({"name": "rkd", "distances": 0, "angles": 0}, "distances and angles are weights, one of them positive"),
        ({"name": "hidden", "layers": {0: 1}}, "needs pairs of layers counted from 1"),
        ({"name": "hidden", "layers": [1, 2]}, r"layers is even, last, cut or head, or pairs like \{4: 8\}"),
        ({"name": "hidden", "layers": {1: 1}, "weight": 0}, "weight must be positive"),
    ],
)
def test_a_term_that_cannot_be_is_refused(term: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_term(**term)


def test_a_layer_that_there_is_not_is_refused_by_its_number(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    losses = [{"name": "hidden", "layers": {1: 9}}]
    with pytest.raises(ValueError, match=r"there is no layer 9: the teacher has layers 1 to 2"):
        trainer_with_term(tmp_path, tokenizer, losses=losses)
