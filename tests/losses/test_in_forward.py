"""Students: full, with adapters, quantised, mixtures of experts; and that they stay ordinary models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import POST_PROCESSED, tiny_model
from peft import LoraConfig, PromptTuningConfig
from runs import copied_state, counted_logits, first_batch, logged, make_trainer, save, without_labels
from tiny import VOCAB, tiny_llama
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.heads import LMHead
from llm_distill.models import kept_of
from llm_distill.rows import View, counted_rows

LORA = LoraConfig(r=4, target_modules="all-linear")
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tiny Llama with its tokenizer, saved."""
    return save(tiny_llama(1, hidden=64), tmp_path_factory.mktemp("hub") / "tiny-student", tokenizer)


def teacher(tokenizer: PreTrainedTokenizerBase) -> LiveTeacher:
    return LiveTeacher(tiny_llama(2).double(), tokenizer)


def gradients(trainer: DistillationTrainer) -> dict[str, Tensor]:
    """Those of the first batch's loss, per parameter that got one."""
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, first_batch(trainer)).backward()
    return {name: weight.grad for name, weight in trainer.model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("quantization", [None, NF4], ids=["lora", "qlora"])
def test_of_a_student_with_adapters_only_they_learn(
    quantization: BitsAndBytesConfig | None,
    checkpoint: Path,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        str(checkpoint),
        LiveTeacher(tiny_llama(2), tokenizer),
        peft_config=LORA,
        quantization_config=quantization,
        activation_checkpointing=True,
        per_device_train_batch_size=8,
        max_steps=18,  # six times over the same rows
    )
    assert getattr(trainer.model.get_base_model(), "is_loaded_in_4bit", False) == (quantization is not None)
    before = copied_state(trainer.model)
    assert all("lora_" in name for name in gradients(trainer))
    trainer.train()
    kd = logged(trainer, "kd")
    assert sum(kd[-3:]) < 0.8 * sum(kd[:3])
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "lora_" in name}


def test_evaluation_leaves_the_gradients_of_a_quantised_student_as_they_were(
    checkpoint: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        str(checkpoint),
        LiveTeacher(tiny_llama(2), tokenizer),
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
        quantization_config=NF4,
    )
    before = {name: gradient.clone() for name, gradient in gradients(trainer).items()}
    trainer.evaluate(trainer.train_dataset)
    for name, gradient in gradients(trainer).items():
        torch.testing.assert_close(gradient, before[name], rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_a_learned_prompt_in_front_shifts_nothing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trainer = make_trainer(tmp_path, tokenizer, tiny_llama(1).double(), teacher(tokenizer), peft_config=prompt)
    batch, before = first_batch(trainer), copied_state(trainer.model)
    expected, head = cross_entropy(trainer.model, batch), LMHead.of(trainer.model, VOCAB)
    with torch.no_grad():
        kept = kept_of(trainer.model, head, View.of(batch))
    torch.testing.assert_close(head(kept.hidden), counted_logits(trainer.model, batch))
    trainer.train()
    assert logged(trainer, "ce")[0] == pytest.approx(expected, rel=1e-9)
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"prompt_encoder.default.embedding.weight"}


def cross_entropy(model: nn.Module, batch: Any) -> float:
    return nn.functional.cross_entropy(counted_logits(model, batch), counted_rows(batch["labels"]).targets).item()


@pytest.mark.parametrize("family", ["gemma2", "cohere", "granite"])
def test_the_logged_cross_entropy_is_that_of_the_familys_own_logits(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    student = tiny_model(family, vocab_size=VOCAB, **POST_PROCESSED[family]).double()
    head = LMHead.of(student)
    assert head.scale != 1 or head.soft_cap is not None
    trainer = make_trainer(tmp_path, tokenizer, student, teacher(tokenizer))
    expected = cross_entropy(student.train(), first_batch(trainer))
    trainer.train()
    assert logged(trainer, "ce")[0] == pytest.approx(expected, rel=1e-6)  # a cap in float32, even for a float64 model
    assert min(logged(trainer, "grad_norm")) > 0


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_mixture_of_experts_learns_to_balance_its_experts(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    def fresh_student() -> PreTrainedModel:
        student = tiny_model(family, vocab_size=VOCAB).double().train()
        student.set_experts_implementation("eager")  # the others know no float64
        return student

    def run(coefficient: float) -> tuple[DistillationTrainer, dict[str, Tensor]]:
        options = {"router_aux_loss_coef": coefficient, "max_steps": 1}
        trainer = make_trainer(tmp_path, tokenizer, fresh_student(), teacher(tokenizer), **options)
        routers = {name: gradient.clone() for name, gradient in gradients(trainer).items() if ".gate.weight" in name}
        trainer.train()
        return trainer, routers

    fresh, coefficient = fresh_student(), 5.0
    (without, plain), (balanced, pulled) = run(0.0), run(coefficient)
    aux = fresh(**without_labels(first_batch(balanced)), output_router_logits=True).aux_loss
    aux.backward()
    assert logged(balanced, "loss")[0] - logged(without, "loss")[0] == pytest.approx(coefficient * aux.item())
    assert len(plain) == fresh.config.num_hidden_layers
    for name, gradient in pulled.items():
        expected = plain[name] + coefficient * fresh.get_parameter(name).grad
        assert plain[name].abs().max() > 0
        assert not torch.allclose(gradient, plain[name])
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)  # some families route in float32


@TIED
def test_checkpointing_activations_changes_no_weight(
    tied: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    states = []
    for checkpointing in (False, True):
        student = tiny_llama(1, hidden=16, tie_word_embeddings=tied).double()
        trainer = make_trainer(
            tmp_path, tokenizer, student, teacher(tokenizer), activation_checkpointing=checkpointing, ce_weight=0.5
        )
        trainer.train()
        assert student.is_gradient_checkpointing == checkpointing
        states.append(student.state_dict())
    for name, expected in states[0].items():
        torch.testing.assert_close(states[1][name], expected, rtol=1e-12, atol=1e-14)


def assert_same_model(ours: nn.Module, theirs: PreTrainedModel, batch: Any) -> None:
    """The same logits, and the same continuation of the batch's first tokens."""
    ours.eval(), theirs.eval()
    torch.testing.assert_close(counted_logits(ours, batch), counted_logits(theirs, batch), rtol=0, atol=0)
    prompt = {"input_ids": batch["input_ids"][:, :4], "max_new_tokens": 8, "do_sample": False}
    continued = ours.generate(**prompt)
    assert continued.shape[1] > 4
    assert torch.equal(continued, theirs.generate(**prompt))


@TIED
def test_a_trained_student_is_saved_reloaded_and_generates_the_same(
    tied: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    student = tiny_llama(1, tie_word_embeddings=tied)
    trainer = make_trainer(tmp_path, tokenizer, student, LiveTeacher(tiny_llama(2), tokenizer))
    trainer.train()
    trainer.save_model()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (reloaded.lm_head.weight is reloaded.model.embed_tokens.weight) == tied
    assert_same_model(trainer.model, reloaded, first_batch(trainer))
    untrained = counted_logits(tiny_llama(1, tie_word_embeddings=tied), first_batch(trainer))
    assert not torch.allclose(counted_logits(reloaded, first_batch(trainer)), untrained)


def test_trained_adapters_are_saved_reloaded_and_generate_the_same(
    checkpoint: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = make_trainer(
        tmp_path, tokenizer, str(checkpoint), LiveTeacher(tiny_llama(2), tokenizer), peft_config=LORA
    )
    trainer.train()
    trainer.save_model()
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_model(trainer.model, reloaded, first_batch(trainer))


def test_without_a_lesson_a_student_is_an_ordinary_model_and_can_be_taught_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    student, untouched = tiny_llama(1).double(), tiny_llama(1).double()
    trainers = [make_trainer(tmp_path / name, tokenizer, student, teacher(tokenizer)) for name in ("once", "again")]
    batch = first_batch(trainers[0])
    ours, theirs = (model(**batch, use_cache=False) for model in (student, untouched))
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours.loss, theirs.loss)
    assert torch.equal(ours.logits, theirs.logits)
    ours.loss.backward()

    for trainer in trainers:
        expected = cross_entropy(student, batch)
        trainer.train()
        assert logged(trainer, "ce")[0] == pytest.approx(expected, rel=1e-9)
    assert logged(trainers[1], "kd")[0] < logged(trainers[0], "kd")[0]  # the second goes on from the first
    student.load_state_dict(untouched.state_dict())
    assert_same_model(student, untouched, batch)
