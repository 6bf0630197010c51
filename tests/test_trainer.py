"""`DistillationTrainer` end to end: kinds of data, what it logs, what it evaluates, what the student learns."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from kinds_of_data import CHAT_TEMPLATE, DATA, QUESTIONS
from tiny import VOCAB, tiny_llama
from torch import Tensor
from transformers import EvalPrediction, PreTrainedTokenizerBase
from trl import SFTTrainer

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.rows import counted_rows
from llm_distill.signals import HiddenSignal


@pytest.fixture
def build(
    config: Callable[..., DistillationConfig], tokenizer: PreTrainedTokenizerBase
) -> Callable[..., DistillationTrainer]:
    """A trainer of two tiny Llamas of the same vocabulary."""

    def build_trainer(data: Any, *, teacher: Any = None, student: Any = None, **options: Any) -> DistillationTrainer:
        extra = {name: options.pop(name) for name in ("eval_dataset", "compute_metrics") if name in options}
        of_chats = copy.deepcopy(tokenizer)
        of_chats.chat_template = CHAT_TEMPLATE
        return DistillationTrainer(
            model=student or tiny_llama(1, hidden=16),
            teacher=teacher or LiveTeacher(tiny_llama(2), of_chats),
            args=config(**options),
            train_dataset=data,
            processing_class=of_chats,
            **extra,
        )

    return build_trainer


def naive(trainer: DistillationTrainer, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Cross-entropy and forward KL from the full logits of both models, summed over the tokens that count."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    assert isinstance(trainer.teacher, LiveTeacher)
    with torch.no_grad():
        log_q, log_p = (
            m(**inputs, use_cache=False).logits.log_softmax(-1)[:, :-1] for m in (trainer.model, trainer.teacher.model)
        )
    targets = batch["labels"][:, 1:]
    counts = targets != -100
    ce = -log_q.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    return {"ce": ce[counts].sum(), "kl": kl[counts].sum(), "rows": counts.sum()}


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("text", {}),
        ("text", {"packing": True}),
        ("text", {"packing": True, "packing_strategy": "wrapped"}),
        ("prompt and completion", {}),
        ("prompt and completion", {"packing": True}),
        ("prompt and completion", {"completion_only_loss": False}),
        ("chat", {"assistant_only_loss": True}),
        ("chat", {}),
    ],
)
def test_the_loss_is_the_naive_one_for_every_kind_of_data(
    build: Callable[..., DistillationTrainer], kind: str, options: dict[str, Any]
) -> None:
    trainer = build(DATA[kind], max_length=48, per_device_train_batch_size=4, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    expected = naive(trainer, batch)
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, expected["kl"] / expected["rows"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("kind", "options"), [("prompt and completion", {}), ("chat", {"assistant_only_loss": True})])
@pytest.mark.parametrize("packing", [False, True])
def test_what_counts_is_the_completion_and_its_end(
    build: Callable[..., DistillationTrainer],
    tokenizer: PreTrainedTokenizerBase,
    kind: str,
    options: dict[str, Any],
    packing: bool,
) -> None:
    data = DATA[kind].select(range(1))
    trainer = build(data, per_device_train_batch_size=1, packing=packing, **options)
    rows = counted_rows(next(iter(trainer.get_train_dataloader()))["labels"])
    assert tokenizer.decode(rows.targets) == QUESTIONS[0][1] + tokenizer.eos_token


def test_a_model_teaches_itself_nothing(build: Callable[..., DistillationTrainer]) -> None:
    trainer = build(DATA["text"], student=tiny_llama(1), teacher=LiveTeacher(tiny_llama(1)), optim="sgd")
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    first = trainer.state.log_history[0]
    assert abs(first["kd"]) < 1e-6
    assert first["top1_agreement"] == 1
    assert first["acceptance"] == pytest.approx(1, abs=1e-5)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


def test_a_student_comes_to_agree_with_its_teacher(build: Callable[..., DistillationTrainer]) -> None:
    trainer = build(DATA["text"], max_steps=60, per_device_train_batch_size=8, learning_rate=1e-2)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "kd" in entry]
    assert steps[-1]["kl"] < 0.2 * steps[0]["kl"]
    assert steps[-1]["acceptance"] > steps[0]["acceptance"]
    assert all(0 < step["teacher_share"] < 1 and step["tokens_per_second"] > 0 for step in steps)


def test_evaluation_is_a_mean_over_tokens_whatever_the_batches(build: Callable[..., DistillationTrainer]) -> None:
    ragged = Dataset.from_dict({"text": ["a = 1", "b = 2\n" * 9, "c", "for x in y:\n    pass", "d = e"]})
    found = []
    for batch_size in (2, 5):
        evaluation = {"a": ragged, "b": ragged.select(range(3))}
        options = {"per_device_eval_batch_size": batch_size, "ce_weight": 0.5, "kd_weight": 2.0}
        trainer = build(DATA["text"], eval_dataset=evaluation, **options)
        metrics = trainer.evaluate()
        sums = [naive(trainer, batch) for batch in trainer.get_eval_dataloader("a")]
        rows = sum(s["rows"] for s in sums)
        for name in ("ce", "kl"):
            assert metrics[f"eval_a_{name}"] == pytest.approx(float(sum(s[name] for s in sums) / rows), rel=1e-5)
        assert metrics["eval_a_perplexity"] == pytest.approx(math.exp(metrics["eval_a_ce"]))
        assert metrics["eval_a_loss"] == pytest.approx(2 * metrics["eval_a_kd"] + 0.5 * metrics["eval_a_ce"])
        assert metrics["eval_b_ce"] != metrics["eval_a_ce"]
        found.append(metrics["eval_a_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_without_weight_the_teacher_is_asked_in_evaluation_only(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    class Counting(LiveTeacher):
        calls = 0

        def score(self, *args: Any) -> HiddenSignal:
            self.calls += 1
            return super().score(*args)

    teacher = Counting(tiny_llama(2), tokenizer)
    trainer = build(DATA["text"], teacher=teacher, eval_dataset=DATA["text"], kd_weight=0.0, ce_weight=1.0)
    trainer.train()
    assert teacher.calls == 0
    assert {"kl", "kd", "teacher_ce"}.isdisjoint(trainer.state.log_history[0])
    assert trainer.evaluate()["eval_kl"] > 0
    assert teacher.calls == 1


def test_text_alone_needs_no_teacher(
    config: Callable[..., DistillationConfig], tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = DistillationTrainer(
        model=tiny_llama(1),
        args=config(kd_weight=0.0, ce_weight=1.0),
        train_dataset=DATA["text"],
        eval_dataset=DATA["text"],
        processing_class=tokenizer,
    )
    trainer.train()
    assert "eval_kl" not in trainer.evaluate()


def test_a_stream_trains(build: Callable[..., DistillationTrainer]) -> None:
    stream = DATA["text"].to_iterable_dataset()
    assert isinstance(stream, IterableDataset)
    trainer = build(stream, max_steps=3)
    assert trainer.train().global_step == 3


def test_somebody_who_asks_for_logits_gets_them(build: Callable[..., DistillationTrainer]) -> None:
    def shapes(prediction: EvalPrediction) -> dict[str, float]:
        return {"width": prediction.predictions.shape[-1]}

    trainer = build(DATA["text"], eval_dataset=DATA["text"], compute_metrics=shapes)
    metrics = trainer.evaluate()
    assert metrics["eval_width"] == VOCAB
    assert metrics["eval_kl"] > 0


def test_compiled_and_eager_students_take_the_same_steps(build: Callable[..., DistillationTrainer]) -> None:
    losses = []
    for compiled in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        trainer = build(DATA["text"], max_steps=3, ce_weight=0.5, **compiled)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_evaluation_between_two_logs_neither_hides_nor_mixes_what_training_logs(
    build: Callable[..., DistillationTrainer],
) -> None:
    options = {"max_steps": -1, "num_train_epochs": 2, "logging_strategy": "epoch", "per_device_train_batch_size": 4}
    plain = build(DATA["text"], **options)
    plain.train()
    watched = build(DATA["text"], eval_dataset=DATA["text"], eval_strategy="steps", eval_steps=1, **options)
    watched.train()
    logs = [[e for e in trainer.state.log_history if "loss" in e] for trainer in (plain, watched)]
    assert len(logs[0]) == len(logs[1]) == 2
    for expected, found in zip(*logs, strict=True):
        for name in ("loss", "kd", "ce", "kl", "entropy"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5)
        assert found["teacher_share"] > 0


def test_a_second_call_of_train_starts_its_own_count(build: Callable[..., DistillationTrainer]) -> None:
    trainer = build(DATA["text"], max_steps=3, logging_steps=2, learning_rate=0.0)
    logs = []
    for _ in range(2):
        trainer.train()
        logs.append(next(entry["ce"] for entry in trainer.state.log_history if "ce" in entry))
    assert logs[0] == pytest.approx(logs[1], rel=1e-6)


def test_with_pad_equal_to_eos_the_student_learns_to_stop(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    assert tokenizer.pad_token == tokenizer.eos_token
    options = {"max_steps": 80, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    data = DATA["prompt and completion"]
    taught = build(data, student=tiny_llama(2), kd_weight=0.0, ce_weight=1.0, **options)
    taught.train()
    trainer = build(data, student=tiny_llama(1), teacher=LiveTeacher(taught.model, tokenizer), **options)
    trainer.train()
    for prompt, completion in QUESTIONS[:4]:
        ids = tokenizer(prompt, return_tensors="pt")
        written = trainer.model.generate(**ids, max_new_tokens=40, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        assert tokenizer.decode(written[0]) == prompt + completion + tokenizer.eos_token


def test_what_was_tallied_since_the_last_log_is_logged_when_training_ends(
    build: Callable[..., DistillationTrainer],
) -> None:
    trainer = build(DATA["text"], max_steps=3, logging_steps=10)
    trainer.train()
    (entry,) = trainer.state.log_history
    assert {"train_loss", "kd", "ce", "kl", "tokens_per_second"} <= entry.keys()


def test_the_metrics_that_users_of_trl_plot_are_those_of_its_trainer(
    build: Callable[..., DistillationTrainer],
    config: Callable[..., DistillationConfig],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    options = {
        "max_steps": 3,
        "learning_rate": 1e-3,
        "ce_weight": 1.0,
        "kd_weight": 0.0,
        "per_device_train_batch_size": 4,
    }
    ours = build(DATA["text"], eval_dataset=DATA["text"], **options)
    theirs = SFTTrainer(
        model=tiny_llama(1, hidden=16),
        args=config(**options),
        train_dataset=DATA["text"],
        eval_dataset=DATA["text"],
        processing_class=copy.deepcopy(tokenizer),
    )
    for trainer in (ours, theirs):
        trainer.train()
    for step, expected in zip(ours.state.log_history[:3], theirs.state.log_history[:3], strict=True):
        for name in ("mean_token_accuracy", "num_tokens", "entropy", "loss"):
            assert step[name] == pytest.approx(expected[name], rel=1e-4), name
    accuracy = [trainer.evaluate()["eval_mean_token_accuracy"] for trainer in (ours, theirs)]
    assert accuracy[0] == pytest.approx(accuracy[1], abs=0.02)  # a mean over tokens, and there one over batches
