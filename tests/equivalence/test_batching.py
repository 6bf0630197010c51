"""The same step, however its rows are arranged: micro-batches, padding, packing, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import make_config, tiny_llama
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from worker import make_rows, train

from llm_distill import DistillationTrainer, LiveTeacher

MASKED = [1, 2, 9]
WEIGHTS = {"ce_weight": 0.5, "divergence": "jsd", "loss_temperature": 2.0}


def weights_after(folder: Path, tokenizer: PreTrainedTokenizerBase, **config: Any) -> dict[str, Tensor]:
    trainer = train(folder, {"masked": MASKED, "config": WEIGHTS | config}, tokenizer)
    return dict(trainer.model.state_dict())


@pytest.fixture
def expected(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """Three steps of four padded sequences each."""
    return weights_after(tmp_path, tokenizer, per_device_train_batch_size=4)


@pytest.mark.parametrize(
    "arrangement",
    [
        pytest.param({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, id="2 × 2"),
        pytest.param({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}, id="1 × 4, some empty"),
        pytest.param({"per_device_train_batch_size": 4, "padding_free": True}, id="padding-free"),
        pytest.param({"per_device_train_batch_size": 4, "pad_to_multiple_of": 16}, id="more padding"),
        pytest.param({"per_device_train_batch_size": 4, "activation_checkpointing": True}, id="checkpointing"),
    ],
)
def test_an_arrangement_of_the_rows_does_not_change_the_step(
    expected: dict[str, Tensor], tmp_path: Path, tokenizer: PreTrainedTokenizerBase, arrangement: dict[str, Any]
) -> None:
    for name, weight in weights_after(tmp_path, tokenizer, **arrangement).items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


TERMS = {"hidden": 1.0, "attention": 10.0, "relations": 1.0, "selectivity": 1.0, "rkd": 0.1}


def test_accumulation_and_packing_do_not_change_the_step_of_terms_on_layers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = weights_after(tmp_path / "4", tokenizer, per_device_train_batch_size=4, losses=TERMS)
    for name, arrangement in {
        "1 x 4": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        "packed": {"per_device_train_batch_size": 4, "padding_free": True},
    }.items():
        for weight, value in weights_after(tmp_path / name, tokenizer, losses=TERMS, **arrangement).items():
            torch.testing.assert_close(value, whole[weight], rtol=1e-6, atol=1e-8, msg=lambda m, n=weight: f"{n}: {m}")


def one_step(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: Dataset, **config: Any) -> dict[str, Tensor]:
    defaults = {"max_steps": 1, "optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0}
    trainer = DistillationTrainer(
        model=tiny_llama(1, hidden=16).double(),
        teacher=LiveTeacher(tiny_llama(2).double(), tokenizer),
        args=make_config(folder / "out", **(defaults | config)),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    trainer.train()
    return dict(trainer.model.state_dict())


def test_packed_and_padded_sequences_give_the_same_step(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = make_rows([]).select(range(5))
    padded = one_step(tmp_path, tokenizer, rows, per_device_train_batch_size=5, max_length=128)
    packed = one_step(tmp_path, tokenizer, rows, per_device_train_batch_size=1, max_length=128, packing=True)
    for name, weight in packed.items():
        torch.testing.assert_close(weight, padded[name], rtol=1e-9, atol=1e-12)


def test_adapters_that_do_nothing_yet_change_neither_loss_nor_metrics(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    histories = []
    for peft_config in (None, LoraConfig(r=4, target_modules="all-linear")):
        trainer = DistillationTrainer(
            model=tiny_llama(1, hidden=16).double(),
            teacher=LiveTeacher(tiny_llama(2).double(), tokenizer),
            args=make_config(tmp_path / "out", max_steps=1, dataset_kwargs={"skip_prepare_dataset": True}),
            train_dataset=make_rows(MASKED),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
        trainer.train()
        histories.append(trainer.state.log_history[0])
    for key in ("loss", "kd", "ce", "kl", "entropy", "acceptance"):
        assert histories[0][key] == pytest.approx(histories[1][key], rel=1e-9)
