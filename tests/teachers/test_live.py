"""Teachers: mixtures of experts, quantised, the student's own base, ensembles, and one's own subclass."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from families import tiny_model
from peft import LoraConfig, PeftConfig, PromptTuningConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from runs import copied_state, counted_logits, first_batch, logged, logits_at, make_trainer, save, without_labels
from tiny import VOCAB, tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_distill import DistillationTrainer, EnsembleTeacher, LiveTeacher, Teacher
from llm_distill.divergences import Divergence
from llm_distill.heads import LMHead
from llm_distill.models import HEAD, Needs
from llm_distill.rows import View
from llm_distill.signals import MixtureSignal, SparseSignal

LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)  # adapters that do something at once


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A tiny Llama in bfloat16 with its tokenizer, saved."""
    return save(tiny_llama(2, hidden=64).bfloat16(), tmp_path_factory.mktemp("hub") / "tiny-teacher", tokenizer)


def kl(p_logits: Tensor, q_logits: Tensor) -> float:
    log_p, log_q = p_logits.log_softmax(-1), q_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_a_mixture_of_experts_teaches_a_dense_student_and_stays_as_it_was(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = tiny_model(family, vocab_size=VOCAB).train()
    model.config.output_router_logits = True  # as in a checkpoint saved in the middle of its training
    before = copied_state(model)
    trainer = make_trainer(tmp_path, tokenizer, tiny_llama(1, hidden=16), LiveTeacher(model, tokenizer))
    trainer.train()
    assert len(logged(trainer, "kl")) == 2
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(weight.requires_grad or weight.grad is not None for weight in model.parameters())

    batch = first_batch(trainer)
    assert model.config.output_router_logits is False
    assert getattr(model(**without_labels(batch)), "router_logits", None) is None
    signal = trainer.teacher.score(View.of(batch))
    torch.testing.assert_close(signal.head(signal.hidden), counted_logits(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("bits", "layer"), [(4, bnb.nn.Linear4bit), (8, bnb.nn.Linear8bitLt)], ids=["4 bits", "8 bits"]
)
def test_a_quantised_teacher_is_quantised_and_close_to_itself(
    bits: int, layer: type, checkpoint: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    options = {f"teacher_load_in_{bits}bit": True, "teacher_model_init_kwargs": {"dtype": "float32"}}
    trainer = make_trainer(
        tmp_path, tokenizer, tiny_llama(1, hidden=16), teacher_model_name_or_path=str(checkpoint), **options
    )
    trainer.train()
    model = trainer.teacher.model
    assert getattr(model, f"is_loaded_in_{bits}bit")
    assert type(model.model.layers[0].self_attn.q_proj) is layer

    description = trainer.teacher.describe()
    plain = LiveTeacher.load(str(checkpoint), dtype="float32")
    assert description["bits"] == bits
    assert description["quantization"] == "bitsandbytes"
    assert description["model"] == checkpoint.name
    assert description["parameters"] == plain.describe()["parameters"]
    assert str(checkpoint.parent) not in json.dumps(description)

    batch = first_batch(trainer)
    signal = trainer.teacher.score(View.of(batch))
    torch.testing.assert_close(signal.head(signal.hidden), counted_logits(model, batch), rtol=1e-4, atol=1e-4)
    assert 0 < kl(counted_logits(plain.model, batch), signal.head(signal.hidden)) < 0.2


def test_a_quantisation_can_be_spelt_out_but_not_twice(checkpoint: Path) -> None:
    spelt_out = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    teacher = LiveTeacher.load(str(checkpoint), quantization_config=spelt_out)
    assert teacher.describe()["bits"] == 4
    assert teacher.model.model.layers[0].self_attn.q_proj.weight.quant_state.nested
    with pytest.raises(ValueError, match="choose one"):
        LiveTeacher.load(str(checkpoint), load_in_4bit=True, quantization_config=spelt_out)


def test_a_head_in_4_bits_gives_the_models_logits(checkpoint: Path) -> None:
    quantization = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantization, dtype=torch.float32)
    assert isinstance(model.lm_head, bnb.nn.Linear4bit)
    ids = torch.arange(24).reshape(2, 12)
    batch = {"input_ids": ids, "labels": ids}
    counted_logits(model, batch)  # on some CPUs, bitsandbytes now rearranges the weights
    signal = LiveTeacher(model).score(View.of(batch))
    torch.testing.assert_close(signal.head(signal.hidden), counted_logits(model, batch), rtol=1e-4, atol=1e-4)


def test_a_head_in_8_bits_is_refused(checkpoint: Path) -> None:
    quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=[])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, quantization_config=quantization, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"is a Linear8bitLt.*llm_int8_skip_modules"):
        LMHead.of(model)


@pytest.mark.parametrize(
    ("init_kwargs", "dtype"),
    [
        (None, torch.bfloat16),
        ({"dtype": "float32"}, torch.float32),
        ('{"dtype": "float32", "attn_implementation": "eager"}', torch.float32),
    ],
    ids=["the checkpoint's own", "a mapping", "JSON"],
)
def test_a_teachers_dtype_is_the_checkpoints_own_unless_said_otherwise(
    init_kwargs: Any, dtype: torch.dtype, checkpoint: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        tiny_llama(1, hidden=16),
        teacher_model_name_or_path=str(checkpoint),
        teacher_model_init_kwargs=init_kwargs,
    )
    model = trainer.teacher.model
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    assert trainer.teacher.describe()["dtype"] == str(dtype).removeprefix("torch.")
    assert (model.config._attn_implementation == "eager") == ("eager" in str(init_kwargs))


@pytest.mark.filterwarnings("ignore:the teacher came without a tokenizer")
def test_a_teachers_revision_chooses_among_those_of_its_repository(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    repository = tmp_path / "cache" / "models--someone--teacher"
    models = {f"{seed:040x}": tiny_llama(seed) for seed in (2, 3)}
    for (commit, model), branch in zip(models.items(), ("main", "better"), strict=True):
        save(model, repository / "snapshots" / commit, tokenizer if branch == "better" else None)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    for branch, (commit, model) in zip((None, "better"), models.items(), strict=True):
        trainer = make_trainer(
            tmp_path,
            tokenizer,
            tiny_llama(1, hidden=16),
            teacher_model_name_or_path="someone/teacher",
            teacher_model_revision=branch,
            teacher_model_init_kwargs={"cache_dir": str(tmp_path / "cache")},
        )
        assert torch.equal(trainer.teacher.model.lm_head.weight, model.lm_head.weight)
        assert (trainer.teacher.tokenizer is not None) == (branch == "better")
        assert trainer.teacher.describe().items() >= {"model": "someone/teacher", "revision": commit}.items()


@pytest.mark.parametrize(
    "adapters", [LORA, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)], ids=["lora", "prompt"]
)
def test_with_its_adapters_off_the_student_is_its_base_model(
    adapters: PeftConfig, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        tiny_llama(1).double(),
        peft_config=adapters,
        teacher_adapters_off=True,
        ce_weight=1.0,
    )
    before, batch = copied_state(trainer.model), first_batch(trainer)
    expected = LiveTeacher(tiny_llama(1).double(), tokenizer).score(View.of(batch))
    for training in (True, False):
        trainer.model.train(training)
        signal = trainer.teacher.score(View.of(batch))
        torch.testing.assert_close(signal.hidden, expected.hidden, rtol=0, atol=0)
        torch.testing.assert_close(signal.head(signal.hidden), expected.head(expected.hidden), rtol=0, atol=0)
        assert {module.training for module in trainer.model.modules()} == {training}

    trainer.train()
    assert logged(trainer, "kl")[0] > 1e-3
    layers = [module for module in trainer.model.modules() if isinstance(module, BaseTunerLayer)]
    assert not any(layer.disable_adapters for layer in layers)
    after = trainer.model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    trained = {name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert changed == trained
    assert all("lora_" in name or "prompt_encoder" in name for name in changed)


def test_an_adapter_that_was_frozen_stays_frozen_when_adapters_come_on_again(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    student = get_peft_model(tiny_llama(1), LORA)
    frozen = {name for name, weight in student.named_parameters() if "lora_A" in name}
    for name in frozen:
        student.get_parameter(name).requires_grad_(False)
    before = copied_state(student)
    trainer = make_trainer(tmp_path, tokenizer, student, teacher_adapters_off=True, ce_weight=1.0)
    trainer.train()
    trained = {name for name, weight in student.named_parameters() if weight.requires_grad}
    assert trained == {name.replace("lora_A", "lora_B") for name in frozen}
    assert all(torch.equal(before[name], student.state_dict()[name]) for name in frozen)


def test_a_head_that_is_trained_beside_the_adapters_teaches_as_it_was(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        tiny_llama(1).double(),
        peft_config=lora,
        teacher_adapters_off=True,
        ce_weight=1.0,
        divergence="reverse_kl",
    )
    wrapper = trainer.model.get_output_embeddings()
    trainer.train()
    batch, original = first_batch(trainer), tiny_llama(1).double()
    signal, student = trainer.teacher.score(View.of(batch)), LMHead.of(trainer.model)
    assert signal.head.module is wrapper.original_module
    assert student.module is wrapper.modules_to_save["default"]
    assert torch.equal(signal.head.module.weight, original.lm_head.weight)
    assert not torch.equal(student.module.weight, original.lm_head.weight)
    assert student.module.weight.requires_grad
    torch.testing.assert_close(signal.head(signal.hidden), counted_logits(original, batch))


def test_without_adapters_a_student_cannot_teach_itself(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="needs a student with adapters"):
        make_trainer(tmp_path, tokenizer, tiny_llama(1), teacher_adapters_off=True, ce_weight=1.0)


def live(seed: int, tokenizer: PreTrainedTokenizerBase, **config: Any) -> LiveTeacher:
    return LiveTeacher(tiny_llama(seed, **config).double(), tokenizer)


def test_an_ensemble_is_the_mixture_of_its_members(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    members = [live(2, tokenizer), live(3, tokenizer, hidden=48)]
    ensemble = EnsembleTeacher(members, weights=[1, 3])
    assert ensemble.weights == (0.25, 0.75)
    student = tiny_llama(1, hidden=16).double()
    trainer = make_trainer(tmp_path, tokenizer, student, ensemble, loss_temperature=2.0, divergence="reverse_kl")
    batch = first_batch(trainer)
    assert isinstance(ensemble.score(View.of(batch)), MixtureSignal)
    logits = [counted_logits(member.model, batch) for member in members]
    student_logits = counted_logits(student, batch)

    def mixture(temperature: float) -> Tensor:
        return 0.25 * (logits[0] / temperature).softmax(-1) + 0.75 * (logits[1] / temperature).softmax(-1)

    expected_kd = 4 * kl(student_logits / 2, mixture(2.0).log())
    expected_kl = kl(mixture(1.0).log(), student_logits)
    trainer.train()
    assert logged(trainer, "kd")[0] == pytest.approx(expected_kd, rel=1e-9)
    assert logged(trainer, "kl")[0] == pytest.approx(expected_kl, rel=1e-9)
    described = [member.describe() for member in members]
    assert ensemble.describe() == {"ensemble": described, "weights": [0.25, 0.75], "mixture": "mean"}


@pytest.mark.parametrize(
    "weights", [[1.0], [1.0, 2.0, 3.0], [1.0, -1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, float("inf")]]
)
def test_an_ensembles_weights_are_as_many_as_its_members_and_positive(
    weights: list[float], tokenizer: PreTrainedTokenizerBase
) -> None:
    members = [live(2, tokenizer), live(3, tokenizer)]
    with pytest.raises(ValueError, match="2 teachers need as many positive, finite weights"):
        EnsembleTeacher(members, weights)


def test_an_ensemble_of_nobody_is_refused() -> None:
    with pytest.raises(ValueError, match="0 teachers"):
        EnsembleTeacher([])


class TopK(Teacher):
    """Gives the k likeliest tokens and the mass outside them: what a served or a cached teacher knows."""

    def __init__(self, model: PreTrainedModel, k: int) -> None:
        self.model, self.k = model.eval(), k

    def score(self, view: View, needs: Needs = HEAD) -> SparseSignal:
        log_p, ids = logits_at(self.model, view).log_softmax(-1).sort(descending=True)
        log_tail = log_p[:, self.k :].logsumexp(-1)  # of nothing: −inf
        return SparseSignal(ids[:, : self.k], log_p[:, : self.k], log_tail, log_p.shape[-1])

    def describe(self) -> dict[str, Any]:
        return {"model": "top k", "k": self.k}


class Sampled(TopK):
    """Gives one token drawn from each row."""

    def score(self, view: View, needs: Needs = HEAD) -> SparseSignal:
        ids = logits_at(self.model, view).softmax(-1).multinomial(1)
        return SparseSignal(ids, torch.zeros(ids.shape, dtype=torch.float64), None, VOCAB)

    def check(self, divergence: Divergence, temperature: float) -> None:
        tokens = torch.ones(1, 2, dtype=torch.long)
        self.score(View.of({"input_ids": tokens, "labels": tokens})).check(divergence, temperature)


def losses_with(
    teacher: Teacher, folder: Path, tokenizer: PreTrainedTokenizerBase, **options: Any
) -> DistillationTrainer:
    trainer = make_trainer(folder, tokenizer, tiny_llama(1, hidden=16).double(), teacher, **options)
    trainer.train()
    return trainer


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize(
    "make_other",
    [
        pytest.param(lambda tokenizer: TopK(tiny_llama(2).double(), VOCAB), id="one's own with every token"),
        pytest.param(lambda tokenizer: EnsembleTeacher([live(2, tokenizer)]), id="an ensemble of one"),
    ],
)
def test_the_same_distributions_in_another_form_give_the_same_losses(
    make_other: Callable[[PreTrainedTokenizerBase], Teacher],
    divergence: str,
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    one = losses_with(live(2, tokenizer), tmp_path, tokenizer, divergence=divergence, max_steps=3)
    other = losses_with(make_other(tokenizer), tmp_path, tokenizer, divergence=divergence, max_steps=3)
    for name in ("loss", "kd", "grad_norm", "top1_agreement"):
        assert logged(other, name) == pytest.approx(logged(one, name), rel=1e-6)
    assert len(set(logged(one, "loss"))) == 3


def test_a_few_tokens_and_their_tail_are_a_lower_bound(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    whole, few = (losses_with(TopK(tiny_llama(2).double(), k), tmp_path, tokenizer) for k in (VOCAB, 8))
    assert 0 < logged(few, "kd")[0] < logged(whole, "kd")[0]


def test_a_teacher_that_cannot_serve_the_objective_is_refused_before_anything_is_written(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match="forward_kl only"):
        make_trainer(tmp_path, tokenizer, tiny_llama(1), Sampled(tiny_llama(2), 1), divergence="reverse_kl")
    assert not (tmp_path / "out").exists()


def test_a_metric_that_a_sparse_teacher_cannot_give_is_absent(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = losses_with(TopK(tiny_llama(2).double(), 5), tmp_path, tokenizer)
    metrics = trainer.evaluate(trainer.train_dataset)
    assert metrics["eval_kd"] > 0
    assert 0 <= metrics["eval_top1_agreement"] <= 1
    assert {"eval_kl", "eval_acceptance", "eval_teacher_ce"}.isdisjoint(metrics)


def test_one_teacher_serves_several_students(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = live(2, tokenizer)
    losses = [logged(losses_with(teacher, tmp_path / name, tokenizer), "loss") for name in ("first", "second")]
    assert losses[0] == losses[1]
