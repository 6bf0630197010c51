"""Conversations for a teacher with another tokenizer: each side's own chat template, and the answers in common."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from kinds_of_data import CHAT_TEMPLATE
from runs import copied_state, logged
from tiny import VOCAB, make_config, tiny_llama
from torch.testing import assert_close
from transformers import PreTrainedTokenizerBase

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.alignment import NO_GROUP, TokenBytes
from llm_distill.data.corpus import train_tokenizer

OTHER_TEMPLATE = (
    "{% for message in messages %}<|start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}<|stop|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|stop|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ANSWERS = [f"return {i}{'0' * i} + größe" for i in range(8)]
SIZE = 400


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


PAIRS = [{"prompt": turns(f"x = {i}"), "completion": turns("", answer)[1:]} for i, answer in enumerate(ANSWERS)]
TEXTS = [
    {"prompt": f"x = {i}:\n", "completion": answer, "teacher_prompt": f"Code is short.\nx = {i}:\n"}
    for i, answer in enumerate(ANSWERS)
]
CHATS = [{"messages": turns(f"x = {i}", answer, "and?", f"{i} more")} for i, answer in enumerate(ANSWERS)]


@pytest.fixture(scope="module")
def others(texts: Dataset) -> PreTrainedTokenizerBase:
    """The teacher's tokenizer."""
    tokenizer = train_tokenizer(texts, SIZE)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|stop|>"]})
    tokenizer.chat_template = OTHER_TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def own(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The student's."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


Build = Callable[..., DistillationTrainer]


@pytest.fixture
def build(tmp_path: Path, own: PreTrainedTokenizerBase, others: PreTrainedTokenizerBase) -> Build:
    """A trainer of two tiny Llamas, one step of SGD at learning rate 1."""

    def build_trainer(rows: Any = PAIRS, teacher: Any = None, **options: Any) -> DistillationTrainer:
        plain = {"optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "learning_rate": 1.0}
        plain |= {"max_steps": 1, "per_device_train_batch_size": 8}
        return DistillationTrainer(
            model=tiny_llama(1, hidden=16).double(),
            teacher=teacher or live(others, SIZE + 2),
            args=make_config(tmp_path / "out", **(plain | options)),
            train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
            processing_class=own,
        )

    return build_trainer


def live(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> LiveTeacher:
    return LiveTeacher(tiny_llama(2, vocab_size=vocab_size).double(), tokenizer)


def spelt(ids: list[int], groups: list[int], tokens: TokenBytes) -> list[bytes]:
    """The bytes of each group; those of a special token are its name."""
    found: dict[int, bytes] = {}
    for i, group in zip(ids, groups, strict=True):
        if group != NO_GROUP:
            data = tokens.special[i].encode() if i in tokens.special else tokens.of[i]
            found[group] = found.get(group, b"") + data
    assert sorted(found) == [*range(len(found))]
    return [found[group] for group in sorted(found)]


@pytest.mark.parametrize("rows", [PAIRS, CHATS], ids=["prompt and completion", "messages"])
def test_groups_are_those_of_the_answers_and_of_the_ends_of_turns(build: Build, rows: Any) -> None:
    trainer = build(rows, assistant_only_loss=rows is CHATS)
    alignment = trainer.teacher.alignment
    for row, given in zip(trainer.train_dataset, rows, strict=True):
        text = trainer.collate.read(row)
        ours = spelt(row["input_ids"], text.student_groups, alignment.student)
        theirs = spelt(text.ids, text.groups, alignment.teacher)
        messages = given["messages"] if rows is CHATS else given["prompt"] + given["completion"]
        answers = [turn["content"].encode() for turn in messages if turn["role"] == "assistant"]
        assert b"".join(ours) == b"".join(answer + b"<|endoftext|>" for answer in answers)
        assert b"".join(theirs) == b"".join(answer + b"<|stop|>" for answer in answers)
        named = zip(ours, theirs, strict=True)
        assert all(a == b or (a, b) == (b"<|endoftext|>", b"<|stop|>") for a, b in named)
        rendered = trainer.teacher.tokenizer.apply_chat_template(messages, tokenize=False)
        assert trainer.teacher.tokenizer.decode(text.ids) == rendered


def test_texts_may_have_another_prompt_for_the_teacher(build: Build) -> None:
    trainer = build(TEXTS)
    alignment = trainer.teacher.alignment
    for row, answer in zip(trainer.train_dataset, ANSWERS, strict=True):
        text = trainer.collate.read(row)
        assert b"".join(spelt(text.ids, text.groups, alignment.teacher)) == answer.encode() + b"<|endoftext|>"
        assert trainer.teacher.tokenizer.decode(text.ids).startswith("Code is short.")
    trainer.train()
    assert logged(trainer, "kd")[0] > 0


def test_the_step_does_not_depend_on_how_rows_are_arranged_and_learns(build: Build) -> None:
    states, losses = [], []
    for options in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        trainer = build(**options)
        assert trainer.is_aligned
        trainer.train()
        states.append(copied_state(trainer.model))
        losses.append(logged(trainer, "kd")[0])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, weight in states[0].items():
        assert_close(weight, states[1][name], rtol=1e-9, atol=1e-12)
    trainer = build(max_steps=20, optim="adamw_torch", learning_rate=1e-2)
    trainer.train()
    kd = logged(trainer, "kd")
    assert kd[-1] < 0.7 * kd[0]
    findings = {finding.what: finding for finding in trainer.check().findings}
    assert "100% of 8 texts align as a whole" in findings["alignment"].text
    assert "<|endoftext|> → <|stop|>" in findings["tokenizers"].text


def test_equal_tokenizers_and_templates_give_the_plain_loss(build: Build, own: PreTrainedTokenizerBase) -> None:
    losses = []
    for options in ({}, {"teacher_alignment": "prefix"}):
        trainer = build(CHATS, teacher=live(own, VOCAB), assistant_only_loss=True, **options)
        assert trainer.is_aligned == bool(options)
        trainer.train()
        losses.append({name: logged(trainer, name)[0] for name in ("loss", "kd", "entropy")})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_space_that_is_the_templates_is_not_compared(build: Build) -> None:
    spaced = OTHER_TEMPLATE.replace("{{ message.content }}<|stop|>{% endg", " {{ message.content }}\n<|stop|>{% endg")
    trainer = build(teacher_chat_template=spaced)
    row = trainer.train_dataset[3]
    text = trainer.collate.read(row)
    ours = b"".join(spelt(row["input_ids"], text.student_groups, trainer.teacher.alignment.student))
    theirs = b"".join(spelt(text.ids, text.groups, trainer.teacher.alignment.teacher))
    assert ours == theirs
    assert ANSWERS[3].endswith(ours.decode())
    assert b" + gr" in ours


def test_a_cut_answer_is_aligned_as_far_as_it_goes(build: Build) -> None:
    trainer = build(max_length=20)
    row = trainer.train_dataset[7]
    text = trainer.collate.read(row)
    ours = b"".join(spelt(row["input_ids"], text.student_groups, trainer.teacher.alignment.student))
    assert len(row["input_ids"]) == 20
    assert ours
    assert ANSWERS[7].startswith(ours.decode())


def test_what_cannot_be_is_refused_with_the_way_out(build: Build, others: PreTrainedTokenizerBase) -> None:
    end = "<|stop|>{% endg"
    shouting = OTHER_TEMPLATE.replace("{{ message.content }}" + end, "{{ message.content|upper }}" + end)
    with pytest.raises(ValueError, match=r"row 0: .*learns the answer 'return 0.*would read 'RETURN 0.*chat_template"):
        build(teacher_chat_template=shouting)
    unmarked = OTHER_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(ValueError, match=r"as the teacher reads it.*generation"):
        build(CHATS, assistant_only_loss=True, teacher_chat_template=unmarked)
    with pytest.raises(ValueError, match="the prompt is to be learned too"):
        build(CHATS)
    bare = copy.deepcopy(others)
    bare.chat_template = None
    with pytest.raises(ValueError, match="no chat template: give one as teacher_chat_template"):
        build(teacher=live(bare, SIZE + 2))
    long = [*PAIRS, {"prompt": turns("y" * 45), "completion": turns("", "no")[1:]}]
    with pytest.raises(ValueError, match=r"train dataset, row 8: the teacher would read \d+ tokens of its own, and 60"):
        build(long, teacher_max_length=60)
