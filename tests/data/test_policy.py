"""A policy's text is what is learned from, and its rows are those that the loss is divided by."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs import copied_state, logged, make_trainer
from tiny import tiny_llama
from transformers import PreTrainedTokenizerBase

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.data.policy import Policy
from llm_distill.rows import IGNORED


class OnlyLongPositions(Policy):
    def __call__(self, coming: Iterator[list[dict[str, Any]]], step: int) -> list[dict[str, Any]]:
        batches = super().__call__(coming, step)
        for batch in batches:
            batch["labels"][:, :8] = IGNORED
        return batches


class Notes(Policy):
    """Writes down how many micro-batches there are in each step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int]] = []

    def __call__(self, coming: Iterator[list[dict[str, Any]]], step: int) -> list[dict[str, Any]]:
        batches = super().__call__(coming, step)
        self.seen.append((step, len(batches)))
        return batches


def trained(folder: Path, tokenizer: PreTrainedTokenizerBase, policy: Policy | None = None) -> DistillationTrainer:
    options = {"gradient_accumulation_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "ce_weight": 0.5}
    student, teacher = tiny_llama(1, hidden=16).double(), LiveTeacher(tiny_llama(2).double(), tokenizer)
    trainer = make_trainer(folder, tokenizer, student, teacher, **options)
    if policy is None:  # the same rows, masked beforehand
        labels = [[IGNORED] * 8 + row["labels"][8:] for row in trainer.train_dataset]
        columns = trainer.train_dataset.remove_columns("labels")
        trainer.train_dataset = columns.add_column("labels", labels)
    else:
        trainer.policy = policy
    trainer.train()
    return trainer


def test_a_policy_acts_before_rows_are_counted(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    by_policy, beforehand = trained(tmp_path, tokenizer, OnlyLongPositions()), trained(tmp_path, tokenizer)
    assert logged(by_policy, "loss") == pytest.approx(logged(beforehand, "loss"), rel=1e-9)
    expected = copied_state(beforehand.model)
    for name, weight in copied_state(by_policy.model).items():
        assert float((weight - expected[name]).abs().max()) < 1e-9, name


def test_a_policy_sees_all_micro_batches_of_a_step(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    notes = Notes()
    trained(tmp_path, tokenizer, notes)
    assert notes.seen == [(0, 2), (1, 2)]
