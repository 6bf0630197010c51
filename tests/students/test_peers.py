"""Students that teach each other: what they learn, that they do it in step, and how they are resumed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peers_worker
import pytest
import torch
from launch import Run, run_ranks
from runs import first_batch, logits_at, make_trainer
from tiny import tiny_llama
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_distill import DistillationTrainer, EnsembleTeacher, LiveTeacher
from llm_distill.data.corpus import train_tokenizer
from llm_distill.rows import View
from llm_distill.signals import MixtureSignal
from llm_distill.students.peers import Peers

STEP = {"ce_weight": 0.5, "divergence": "forward_kl", "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
DROPOUT = {"attention_dropout": 0.3}


def student(seed: int, hidden: int = 16, **config: Any) -> PreTrainedModel:
    return tiny_llama(seed, hidden=hidden, **config).double()


def train_peers(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    students: Sequence[PreTrainedModel],
    teacher: LiveTeacher | None = None,
    resume: bool = False,
    **options: Any,
) -> list[DistillationTrainer]:
    """The trainers, trained; the folder of each is named by the student's place."""
    peers = Peers(len(students), teacher)
    trainers = [
        make_trainer(folder / str(place), tokenizer, model, peer, **({"ce_weight": 0.5} | options))
        for place, (model, peer) in enumerate(zip(students, peers, strict=True))
    ]
    peers.train(trainers, resume_from_checkpoint=resume)
    return trainers


def assert_equal(model: nn.Module, other: nn.Module) -> None:
    for name, weight in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name


@pytest.mark.parametrize("taught", [False, True], ids=["alone", "beside a teacher"])
def test_a_step_is_that_of_each_ones_ce_and_divergence_to_the_others(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, taught: bool
) -> None:
    seeds = (1, 3, 4)
    teacher = LiveTeacher(tiny_llama(2).double(), tokenizer) if taught else None
    trainers = train_peers(tmp_path, tokenizer, [student(seed, 8 * seed) for seed in seeds], teacher, **STEP)
    view = View.of(first_batch(trainers[0]))
    models = [student(seed, 8 * seed) for seed in seeds]
    before = [logits_at(model, view).softmax(-1) for model in models]
    for place, (model, trainer) in enumerate(zip(models, trainers, strict=True)):
        others = torch.stack([p for other, p in enumerate(before) if other != place]).mean(0)
        if teacher is not None:
            others = (others + logits_at(teacher.model, view).softmax(-1)) / 2
        logits = model(**view.inputs).logits[view.positions.sample, view.positions.position]
        log_q = logits.log_softmax(-1)
        kl = (others * (others.log() - log_q)).sum(-1).mean()
        (kl + 0.5 * nn.functional.nll_loss(log_q, view.positions.targets)).backward()
        for name, weight in model.named_parameters():
            expected = weight.detach() - 1e-2 * weight.grad
            torch.testing.assert_close(trainer.model.get_parameter(name).detach(), expected, msg=f"{place}: {name}")
        assert trainer.state.log_history[0]["kd"] == pytest.approx(float(kl.detach()))


def test_teachers_that_are_weighed_by_row_have_their_share_beside_the_others(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    teachers = [LiveTeacher(tiny_llama(seed).double(), tokenizer) for seed in (2, 5)]
    peers = Peers(2, EnsembleTeacher(teachers, mixture="best"), teacher_weight=0.25)
    students = [student(1), student(3)]
    trainers = [make_trainer(tmp_path / str(i), tokenizer, students[i], peers[i], ce_weight=0.5) for i in (0, 1)]
    view = View.of(first_batch(trainers[0]))
    first, second, other = (logits_at(m, view).log_softmax(-1) for m in (*(t.model for t in teachers), students[1]))
    targets, samples = view.positions.targets, view.positions.sample
    gains = (first - second).gather(1, targets[:, None])[:, 0]
    by_text = gains.new_zeros(int(samples.max()) + 1).index_add(0, samples, gains)
    best = torch.where(by_text[samples, None] > 0, first, second)
    signal = peers[0].score(view)
    assert isinstance(signal, MixtureSignal)
    mixed, _ = signal.mix([first, second, other], slice(None))
    torch.testing.assert_close(mixed.exp(), 0.25 * best.exp() + 0.75 * other.exp())


def test_one_peer_beside_a_teacher_is_the_trainer_bit_for_bit(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher = LiveTeacher(tiny_llama(2).double(), tokenizer)
    (peer,) = train_peers(tmp_path, tokenizer, [student(1, **DROPOUT)], teacher, max_steps=3)
    alone = make_trainer(tmp_path / "alone", tokenizer, student(1, **DROPOUT), teacher, ce_weight=0.5, max_steps=3)
    alone.train()
    assert_equal(peer.model, alone.model)
    assert peer.evaluate(peer.train_dataset)["eval_kl"] == alone.evaluate(alone.train_dataset)["eval_kl"]


def test_equal_peers_stay_equal_each_with_its_own_random_numbers(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    first, second = train_peers(
        tmp_path, tokenizer, [student(1, **DROPOUT), student(1, **DROPOUT)], max_steps=3, gradient_accumulation_steps=2
    )
    assert_equal(first.model, second.model)
    assert first.state.log_history[-2]["kd"] == pytest.approx(0, abs=1e-12)


def test_the_order_of_peers_does_not_matter(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    def make() -> list[PreTrainedModel]:
        return [student(1, **DROPOUT), student(5, hidden=24)]

    options = {"max_steps": 3, "eval_strategy": "no"}
    first = train_peers(tmp_path / "a", tokenizer, make(), **options)
    second = train_peers(tmp_path / "b", tokenizer, make()[::-1], **options)
    for trainer, other in zip(first, second[::-1], strict=True):
        assert_equal(trainer.model, other.model)
        assert trainer.evaluate(trainer.train_dataset)["eval_kl"] == other.evaluate(other.train_dataset)["eval_kl"]


def test_all_are_resumed_from_the_last_step_that_all_have_saved(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    options = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}

    def make() -> list[PreTrainedModel]:
        return [student(1, **DROPOUT), student(5, **DROPOUT)]

    whole = train_peers(tmp_path / "whole", tokenizer, make(), max_steps=6, **options)
    train_peers(tmp_path / "killed", tokenizer, make(), max_steps=4, **options)
    shutil.rmtree(tmp_path / "killed" / "1" / "out" / "checkpoint-4")  # killed between two that are saved
    resumed = train_peers(tmp_path / "killed", tokenizer, make(), max_steps=6, resume=True, **options)
    for trainer, other in zip(whole, resumed, strict=True):
        assert_equal(trainer.model, other.model)


def test_each_reads_each_batch_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    students = [student(1), student(5)]
    reads = [0, 0]
    peers = Peers(2)
    trainers = [
        make_trainer(tmp_path / str(i), tokenizer, model, peer, ce_weight=1.0, max_steps=3)
        for i, (model, peer) in enumerate(zip(students, peers, strict=True))
    ]

    for place, trainer in enumerate(trainers):

        def count(*_: Any, place: int = place) -> None:
            reads[place] += 1

        trainer.model.model.register_forward_hook(count)
    peers.train(trainers)
    assert reads == [3, 3]


def test_two_ranks_and_one_rank_take_the_same_steps(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    runs = {}
    for ranks in (1, 2):
        (tmp_path / str(ranks)).mkdir()
        run_ranks(Path(peers_worker.__file__), str(tmp_path / str(ranks)), str(4 // ranks), ranks=ranks)
        runs[ranks] = Run(tmp_path / str(ranks))
    for name, expected in runs[1].weights().items():
        assert torch.equal(runs[2].weights(0)[name], runs[2].weights(1)[name]), f"{name} drifted apart"
        torch.testing.assert_close(runs[2].weights()[name], expected, rtol=1e-9, atol=1e-12)


def test_peers_with_other_tokenizers_are_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, texts: Any
) -> None:
    peers = Peers(2)
    make_trainer(tmp_path / "a", tokenizer, student(1), peers[0], ce_weight=1.0)
    other = train_tokenizer(texts.select(range(200, 400)), 320)
    with pytest.raises(ValueError, match=r"peers share a tokenizer.*different ids"):
        make_trainer(tmp_path / "b", other, student(5), peers[1], ce_weight=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 3}, "max_steps is 2 for one and 3"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps"),
        ({"train_sampling_strategy": "random", "seed": 1}, "these are at different ones"),
        ({"on_policy_share": 0.5, "max_completion_length": 4}, "would read its own"),
        ({"kd_weight": 0.0}, "learns nothing from the others"),
    ],
)
def test_what_is_not_in_step_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], message: str
) -> None:
    peers = Peers(2)
    trainers = [
        make_trainer(tmp_path / str(i), tokenizer, student(i + 1), peers[i], **({"ce_weight": 0.5} | changed))
        for i, changed in enumerate(({"train_sampling_strategy": "random"} if "seed" in options else {}, options))
    ]
    before = [{name: value.clone() for name, value in trainer.model.state_dict().items()} for trainer in trainers]
    with pytest.raises(ValueError, match=message):
        peers.train(trainers)
    for trainer, weights in zip(trainers, before, strict=True):
        assert all(torch.equal(weights[name], value) for name, value in trainer.model.state_dict().items())


def test_what_cannot_be_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="two at least"):
        Peers(1)
    with pytest.raises(ValueError, match="between 0 and 1"):
        Peers(2, LiveTeacher(tiny_llama(2), tokenizer), teacher_weight=1.0)
    with pytest.raises(ValueError, match="a geometric mean is none"):
        Peers(2, EnsembleTeacher([LiveTeacher(tiny_llama(2), tokenizer)] * 2, mixture="geometric"))
    peers = Peers(2)
    trainer = make_trainer(tmp_path, tokenizer, student(1), peers[0], ce_weight=1.0)
    with pytest.raises(ValueError, match="make all trainers before"):
        trainer.evaluate(trainer.train_dataset)
    with pytest.raises(ValueError, match=r"peers\.train\(trainers\)"):
        trainer.train()
    with pytest.raises(ValueError, match="takes their trainers in order"):
        peers.train([trainer])
