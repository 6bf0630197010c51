"""Student and teacher write together: between the student alone and the teacher alone, by K."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import copied_state, logged, make_trainer
from tiny import VOCAB, tiny_llama
from transformers import PreTrainedTokenizerBase

from llm_distill import DistillationTrainer, EnsembleTeacher, LiveTeacher, Teacher
from llm_distill.data.on_policy_rows import prompt_of, rows_of

ENDS = (0, 2)
LENGTH = 7


@pytest.fixture
def build(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., DistillationTrainer]:
    def build_trainer(teacher: Teacher | None = None, **options: Any) -> DistillationTrainer:
        teacher = teacher or LiveTeacher(tiny_llama(2).double(), tokenizer)
        defaults = {"on_policy_share": 1.0, "max_completion_length": LENGTH, "speculative_tokens": 3, "max_steps": 1}
        return make_trainer(tmp_path, tokenizer, tiny_llama(1, hidden=16).double(), teacher, **{**defaults, **options})

    return build_trainer


def prompts_of(trainer: DistillationTrainer) -> list[list[int]]:
    batch = trainer.collate([trainer.train_dataset[index] for index in range(8)])
    return [prompt_of(row) for row in rows_of(batch)]


def texts_of(trainer: DistillationTrainer, seed: int = 0) -> list[list[int]]:
    return [completion.ids for completion in trainer.policy.writer.write(prompts_of(trainer), seed)]


def greedy(model: Any, prompt: list[int], ends: Collection[int] = ENDS) -> list[int]:
    """Token by token, without cache, padding or blocks."""
    ids = list(prompt)
    while len(ids) < len(prompt) + LENGTH and (len(ids) == len(prompt) or ids[-1] not in ends):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_with_one_token_allowed_the_teacher_writes_greedily(
    build: Callable[..., DistillationTrainer], temperature: float
) -> None:
    trainer = build(speculative_top_k=1, sampling_temperature=temperature)
    first, second, *_ = (greedy(trainer.teacher.model, prompt) for prompt in prompts_of(trainer))
    ends = trainer.policy.writer.ends
    ends |= {first[1], second[4]}
    expected = [greedy(trainer.teacher.model, prompt, ends) for prompt in prompts_of(trainer)]
    assert texts_of(trainer) == expected
    assert len({len(ids) for ids in expected}) > 1, "some end early"


def test_with_all_tokens_allowed_the_student_writes_alone(build: Callable[..., DistillationTrainer]) -> None:
    trainer = build(speculative_top_k=VOCAB, sampling_temperature=0.0)
    assert texts_of(trainer) == [greedy(trainer.model, prompt) for prompt in prompts_of(trainer)]
    one_block = build(speculative_top_k=VOCAB, speculative_tokens=LENGTH, sampling_temperature=1.0)
    alone = build(sampling_temperature=1.0, speculative_tokens=8)
    for seed in range(3):
        assert texts_of(one_block, seed) == texts_of(alone, seed), "bit for bit, where one block is a whole text"


@pytest.mark.parametrize("kind", ["live", "ensemble"])
def test_every_token_is_among_the_teachers_top_k_and_the_students_own_stay(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    teacher = LiveTeacher(tiny_llama(2).double(), tokenizer)
    ensemble = EnsembleTeacher([teacher, LiveTeacher(tiny_llama(3).double(), tokenizer)])
    trainer = build(teacher if kind == "live" else ensemble, speculative_top_k=40, sampling_temperature=0.0)
    for prompt, text in zip(prompts_of(trainer), texts_of(trainer), strict=True):
        for place in range(len(text)):
            ids = torch.tensor([prompt + text[:place]])
            with torch.no_grad():
                members = (teacher,) if kind == "live" else trainer.teacher.teachers
                p = torch.stack([member.model(ids).logits[0, -1].softmax(-1) for member in members]).mean(0)
                own = int(trainer.model(ids).logits[0, -1].argmax())
            top = p.topk(40).indices.tolist()
            assert text[place] == (own if own in top else top[0])


def test_a_replacement_is_drawn_as_the_teacher_would_from_its_top_k(
    build: Callable[..., DistillationTrainer],
) -> None:
    trainer = build(speculative_top_k=3, sampling_temperature=1.0, max_completion_length=1)
    prompt = prompts_of(trainer)[0]
    writer, drawn = trainer.policy.writer, Counter[int]()
    with torch.no_grad():
        p = trainer.teacher.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
        q = trainer.model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    top = p.topk(3)
    draws = 1280
    for seed in range(draws // 32):
        drawn.update(completion.ids[0] for completion in writer.write([prompt] * 32, 1000 * seed))
    assert {*drawn} == {*top.indices.tolist()}
    kept = q[top.indices]
    expected = kept + (1 - kept.sum()) * top.values / top.values.sum()
    for token, share in zip(top.indices.tolist(), expected.tolist(), strict=True):
        assert drawn[token] / draws == pytest.approx(share, abs=4 * (share * (1 - share) / draws) ** 0.5)


def test_it_trains_and_logs_how_much_was_replaced(build: Callable[..., DistillationTrainer]) -> None:
    shares, states = [], []
    for k in (60, VOCAB, 60):
        trainer = build(speculative_top_k=k, per_device_train_batch_size=8)
        trainer.train()
        shares.append(logged(trainer, "completion_replaced_share")[0])
        states.append(copied_state(trainer.model))
    assert 1 > shares[0] > shares[1] == 0
    assert all(torch.equal(weight, states[2][name]) for name, weight in states[0].items()), "the same run again"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"speculative_top_k": 0, "speculative_tokens": 3}, "speculative_tokens .speculative_top_k is 0"),
        ({"speculative_top_k": 5, "use_vllm": True}, "vLLM writes alone"),
        ({"speculative_top_k": -1}, "not be negative"),
    ],
)
def test_what_cannot_be_is_refused(
    build: Callable[..., DistillationTrainer], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_teacher_elsewhere_is_refused(build: Callable[..., DistillationTrainer], tokenizer: Any) -> None:
    class Elsewhere(LiveTeacher):
        k = 20

    with pytest.raises(ValueError, match="it must be one in memory"):
        build(Elsewhere(tiny_llama(2).double(), tokenizer), speculative_top_k=5)
