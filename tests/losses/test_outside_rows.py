"""Rows of the student's output matrix past the vocabulary: their mass m is in the loss as −log (1 − m), and goes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from head_cases import (
    PADDED,
    ROWS,
    STUDENT,
    VOCAB,
    both_backends,
    hidden_states,
    make_head,
    make_signal,
)
from textbook import CASES
from tiny import make_config, tiny_llama
from torch import nn

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.data.corpus import train_tokenizer
from llm_distill.divergences import make_divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused import fused_head_loss
from llm_distill.signals import HiddenSignal

pytestmark = pytest.mark.usefixtures("several_chunks")
KINDS = ["hidden", "mixture", "top 5", "sampled", "none"]
TARGETS = torch.arange(ROWS) % VOCAB


@both_backends
def test_the_divergence_is_over_the_vocabulary_however_large_the_mass_past_it(backend: str) -> None:
    signal, _ = make_signal("hidden")
    loud, alone = make_head(STUDENT, 0), make_head(STUDENT, 0, rows=VOCAB)
    with torch.no_grad():
        loud.module.weight[VOCAB:] = 1e3  # takes all the mass
        alone.module.weight.copy_(loud.module.weight[:VOCAB])
        alone.module.bias.copy_(loud.module.bias[:VOCAB])
    metrics = []
    for head in (loud, alone):
        options = {"temperature": 2.0, "targets": TARGETS}
        loss, values = fused_head_loss(hidden_states(STUDENT, 5), head, signal, make_divergence("jsd"), **options)
        loss.backward()
        assert loss.isfinite()
        assert head.module.weight.grad.isfinite().all()
        metrics.append(values)
    assert metrics[0].keys() - metrics[1].keys() == {"outside_mass", "outside_loss"}
    for name in metrics[1].keys() - {"ce"}:
        torch.testing.assert_close(metrics[0][name], metrics[1][name])


@both_backends
@pytest.mark.parametrize("kind", KINDS)
def test_the_metrics_say_how_much_mass_is_past_the_vocabulary(backend: str, kind: str) -> None:
    signal, _ = make_signal(kind)
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5)
    _, metrics = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"), targets=TARGETS)
    q = head.module(hidden).softmax(-1)
    mass = q[:, VOCAB:].sum(-1)
    assert mass.max() > 0.5
    torch.testing.assert_close(metrics["outside_mass"], mass)
    torch.testing.assert_close(metrics["outside_loss"], -torch.log1p(-mass))
    torch.testing.assert_close(metrics["ce"], -q.gather(-1, TARGETS[:, None])[:, 0].log())


@both_backends
def test_forward_kl_is_then_that_over_all_rows_with_a_teacher_who_has_none(backend: str) -> None:
    signal, p = make_signal("hidden")
    head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5)
    loss, _ = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"))
    log_q = head.module(hidden).log_softmax(-1)[:, :VOCAB]
    torch.testing.assert_close(loss, (p * (p.log() - log_q)).sum(-1).mean())


@both_backends
@pytest.mark.parametrize("kind", KINDS)
def test_a_tied_matrix_gets_both_gradients(backend: str, kind: str) -> None:
    signal, _ = make_signal(kind)
    embedded = torch.randint(PADDED, (ROWS,), generator=torch.Generator().manual_seed(0))

    def gradient(is_fused: bool) -> torch.Tensor:
        head = make_head(STUDENT, 0, bias=False)
        hidden = 4 * head.module.weight[embedded]
        if is_fused:
            options = {"targets": TARGETS, "kd_weight": 0.0, "ce_weight": 1.0}
            loss, _ = fused_head_loss(hidden, head, signal, make_divergence("forward_kl"), **options)
        else:
            loss = nn.functional.cross_entropy(head.module(hidden), TARGETS)
        return torch.autograd.grad(loss, head.module.weight)[0]

    torch.testing.assert_close(gradient(True), gradient(False))


@both_backends
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_learn_of_them_where_the_head_is_frozen(backend: str, kind: str) -> None:
    signal, _ = make_signal(kind)
    gradients = []
    for frozen in (False, True):
        head, hidden = make_head(STUDENT, 0), hidden_states(STUDENT, 5).requires_grad_()
        head.module.requires_grad_(not frozen)
        options = {"targets": TARGETS, "ce_weight": 0.5}
        fused_head_loss(hidden, head, signal, make_divergence("forward_kl"), **options)[0].backward()
        gradients.append(hidden.grad)
        assert (head.module.weight.grad is None) == frozen
    assert torch.equal(*gradients)


def test_a_head_in_4_bits_has_them_too() -> None:
    from bitsandbytes.nn import Linear4bit

    exact = nn.Linear(64, 96, bias=False)
    packed = Linear4bit(64, 96, bias=False, quant_type="nf4")
    packed.load_state_dict(exact.state_dict())
    packed.to("cpu")  # packs it
    head, hidden = LMHead(packed, 80), torch.randn(ROWS, 64)
    with head.weights(past_vocabulary=True) as (weight, _):
        assert weight.shape == (96, 64)
    _, metrics = fused_head_loss(hidden, head, None, make_divergence("forward_kl"), targets=TARGETS, ce_weight=1.0)
    mass = (hidden @ weight.T).softmax(-1)[:, 80:].sum(-1)
    torch.testing.assert_close(metrics["outside_mass"], mass)


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "parameters"), CASES)
def test_of_identical_models_nothing_else_is_left(
    backend: str, name: str, parameters: dict[str, float], dtype: torch.dtype
) -> None:
    head = make_head(STUDENT, 0)
    head.module.to(dtype)
    hidden = hidden_states(STUDENT, 5).to(dtype)
    signal, divergence = HiddenSignal(hidden, head), make_divergence(name, **parameters)
    loss, metrics = fused_head_loss(hidden, head, signal, divergence, temperature=2.0)
    torch.testing.assert_close(loss, metrics["outside_loss"].mean(), rtol=0, atol=1e-6)


@both_backends
def test_however_many_they_are_they_are_looked_at_in_blocks(backend: str) -> None:
    head, hidden = LMHead(nn.Linear(STUDENT, 40 * VOCAB).double(), VOCAB), hidden_states(STUDENT, 5).requires_grad_()
    loss, _ = fused_head_loss(hidden, head, None, make_divergence("tvd"), targets=TARGETS, ce_weight=1.0)
    expected = nn.functional.cross_entropy(head.module(hidden), TARGETS)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(value, head.module.weight)[0] for value in (loss, expected)))


def test_rows_that_the_family_drops_itself_are_none() -> None:
    head = LMHead(nn.Linear(STUDENT, PADDED).double(), 20, num_logits=VOCAB)
    hidden = hidden_states(STUDENT, 5)
    loss, _ = fused_head_loss(hidden, head, None, make_divergence("tvd"), targets=TARGETS % 20, ce_weight=1.0)
    torch.testing.assert_close(loss, nn.functional.cross_entropy(head.module(hidden)[:, :VOCAB], TARGETS % 20))
    loss.backward()
    assert head.module.weight.grad[20:VOCAB].abs().min() > 0
    assert head.module.weight.grad[VOCAB:].abs().max() == 0


@pytest.mark.parametrize(("kd_weight", "divergence"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_a_student_from_scratch_learns_to_say_no_token_that_does_not_exist(
    kd_weight: float, divergence: str, texts: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    tokenizer, student = train_tokenizer(texts, 400), tiny_llama(1, vocab_size=512, initializer_range=0.02)
    trainer = DistillationTrainer(
        model=student,
        teacher=LiveTeacher(tiny_llama(2, vocab_size=512), tokenizer) if kd_weight else None,
        args=make_config(
            tmp_path / "out",
            kd_weight=kd_weight,
            ce_weight=1 - kd_weight,
            divergence=divergence,
            max_steps=150,
            learning_rate=3e-3,
            per_device_train_batch_size=8,
            logging_steps=50,
        ),
        train_dataset=texts,
        processing_class=tokenizer,
    )

    def mass() -> float:
        ids = torch.tensor([tokenizer(texts[0]["text"])["input_ids"][:64]])
        with torch.no_grad():
            return student(ids).logits.softmax(-1)[..., 400:].sum(-1).mean().item()

    assert mass() > 0.2
    trainer.train()
    assert mass() < 0.03
