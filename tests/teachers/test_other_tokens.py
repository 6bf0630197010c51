"""Teachers with another tokenizer: they read the same text, and speak of the same groups of tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import copied_state, logged
from tiny import VOCAB, make_config, tiny_llama
from transformers import PreTrainedTokenizerBase

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.data.corpus import train_tokenizer
from llm_distill.teachers.other_tokens import OtherTokensTeacher

PAIRS = [{"prompt": f"def f{i}(x", "completion": f", y): return {i}{'0' * i} + x"} for i in range(8)]
LARGER = 400


@pytest.fixture(scope="module")
def others(texts: Dataset) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer."""
    return train_tokenizer(texts, LARGER)


Build = Callable[..., DistillationTrainer]


@pytest.fixture
def build(tmp_path: Path, tokenizer: PreTrainedTokenizerBase, others: PreTrainedTokenizerBase) -> Build:
    """A trainer of two tiny Llamas, one step of SGD at learning rate 1."""

    def build_trainer(
        rows: Any = PAIRS, teacher: Any = None, student: Any = None, **options: Any
    ) -> DistillationTrainer:
        plain = {"optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "learning_rate": 1.0}
        plain |= {"max_steps": 1, "per_device_train_batch_size": 8}
        data = Dataset.from_list(rows) if isinstance(rows, list) else rows
        return DistillationTrainer(
            model=student or tiny_llama(1, hidden=16).double(),
            teacher=teacher or live(others, LARGER),
            args=make_config(tmp_path / "out", **(plain | options)),
            train_dataset=data,
            eval_dataset=data,
            processing_class=tokenizer,
            peft_config=options.pop("peft", None),
        )

    return build_trainer


def live(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> LiveTeacher:
    return LiveTeacher(tiny_llama(2, vocab_size=vocab_size).double(), tokenizer)


def test_the_step_does_not_depend_on_how_rows_are_arranged(build: Build) -> None:
    states, losses = [], []
    for options in (
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"pad_to_multiple_of": 32},
    ):
        trainer = build(**options)
        assert isinstance(trainer.teacher, OtherTokensTeacher)
        trainer.train()
        states.append(copied_state(trainer.model))
        losses.append((logged(trainer, "loss")[0], logged(trainer, "kd")[0]))
    assert losses[0][1] > 0.1
    for state, loss in zip(states[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-6)
        for name, weight in state.items():
            torch.testing.assert_close(weight, states[0][name], rtol=1e-9, atol=1e-12)


def test_with_the_students_tokens_it_is_the_step_without_alignment(
    build: Build, tokenizer: PreTrainedTokenizerBase
) -> None:
    states, logs = [], []
    for options in ({}, {"teacher_alignment": "prefix"}):
        trainer = build(teacher=live(tokenizer, VOCAB), **options)
        assert trainer.is_aligned == bool(options)
        trainer.train()
        states.append(copied_state(trainer.model))
        logs.append({name: logged(trainer, name)[0] for name in ("kd", "ce", "entropy", "mean_token_accuracy")})
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)
    for name, weight in states[0].items():
        torch.testing.assert_close(weight, states[1][name], rtol=1e-6, atol=1e-9)


def test_what_is_logged_is_of_the_same_text(build: Build) -> None:
    trainer = build(ce_weight=0.1)
    figures = trainer.evaluate()
    assert figures["eval_loss"] == pytest.approx(figures["eval_kd"] + 0.1 * figures["eval_ce"])
    assert trainer.objective.describe()["alignment"] == "prefix"
    batch = trainer.data_collator([trainer.train_dataset[0]])
    assert batch["teacher"]["input_ids"].shape[1] < batch["input_ids"].shape[1]


@pytest.mark.parametrize("method", ["xtoken", "alm", "uld"])
def test_each_method_trains(build: Build, method: str) -> None:
    trainer = build(teacher_alignment=method, max_steps=4, learning_rate=0.1)
    trainer.train()
    kd = logged(trainer, "kd")
    assert kd[-1] < kd[0]


def test_a_teacher_learned_from_comes_nearer(build: Build) -> None:
    rows = Dataset.from_dict({"text": [row["prompt"] + row["completion"] for row in PAIRS]})
    trainer = build(rows, max_steps=30, optim="adamw_torch", learning_rate=1e-2)
    before = trainer.evaluate()["eval_kd"]
    trainer.train()
    assert trainer.evaluate()["eval_kd"] < 0.5 * before


def test_what_cannot_be_is_refused_with_the_way_out(build: Build, others: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"different ids for .*teacher_alignment"):
        build(teacher_alignment="none")
    with pytest.raises(ValueError, match="rows are packed: set packing"):
        build(packing=True)
    short = LiveTeacher(tiny_llama(2, vocab_size=LARGER, max_position_embeddings=12).double(), others)
    with pytest.raises(ValueError, match=r"train dataset, row 0: .* tokens of its own, and 12 at most.* 8 of its 8"):
        build(teacher=short)
    with pytest.raises(ValueError, match="has a measure of its own"):
        build(teacher_alignment="alm", divergence="jsd")
    with pytest.raises(ValueError, match="at temperature 1 alone"):
        build(loss_temperature=2.0)
    with pytest.raises(ValueError, match="losses has 'hidden', which compares states token by token"):
        build(losses={"hidden": 1.0})


def test_a_check_says_how_the_tokenizers_go_together(build: Build) -> None:
    findings = {finding.what: finding for finding in build().check().findings}
    assert not [finding for finding in findings.values() if finding.level == "red"]
    assert "% of the student's 320 tokens are among the teacher's 400" in findings["tokenizers"].text
    assert "<|endoftext|> → <|endoftext|>" in findings["tokenizers"].text
    assert "100% of 8 texts align as a whole" in findings["alignment"].text
    assert "of the groups one to one" in findings["alignment"].text
    assert "nats a token on 8 texts" in findings["loss"].text


def test_the_student_writes_in_its_own_tokens_and_the_teacher_reads_it_in_its_own(build: Build) -> None:
    trainer = build(on_policy_share=1.0, max_completion_length=8, max_steps=2, divergence="reverse_kl")
    scored = []
    score = trainer.teacher.score

    def remember(view: Any, *needs: Any) -> Any:
        scored.append(view)
        return score(view, *needs)

    trainer.teacher.score = remember
    trainer.train()
    assert len(logged(trainer, "kd")) == 2
    assert all(value > 0 for value in logged(trainer, "kd"))
    assert len({tuple(view.inputs["input_ids"].flatten().tolist()) for view in scored}) == 2
