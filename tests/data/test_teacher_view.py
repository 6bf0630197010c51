"""The teacher reads another prompt than the student, and speaks about the same tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from kinds_of_data import CHAT_TEMPLATE
from peft import LoraConfig
from runs import copied_state, fill_cache
from tiny import VOCAB, make_config, tiny_llama
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_distill import DistillationTrainer, EnsembleTeacher, LiveTeacher
from llm_distill.cache import Hidden
from llm_distill.data.teacher_view import IDS, LABELS, NUMBER
from llm_distill.rows import IGNORED, TEACHER, View
from llm_distill.teachers import CachedTeacher

QUESTIONS = [(f"def f{i}(x", f"): return {i}{'0' * i} + x", f"# adds {i}\n" * (i + 1)) for i in range(8)]
TEXTS = [{"prompt": a, "completion": b, "teacher_prompt": more + a} for a, b, more in QUESTIONS]


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """A conversation that a user begins."""
    first = [{"role": "system", "content": system}] if system else []
    return first + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


@pytest.fixture
def build(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., DistillationTrainer]:
    """A trainer of two tiny Llamas, one step of SGD at learning rate 1."""

    def build_trainer(
        rows: Any, student: Any = None, teacher: Any = None, evaluation: Any = None, peft: Any = None, **options: Any
    ) -> DistillationTrainer:
        plain = {"optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential", "learning_rate": 1.0}
        plain |= {"max_steps": 1, "per_device_train_batch_size": 8, "max_length": 128}
        tokenizer_of_chats = copy.deepcopy(tokenizer)
        tokenizer_of_chats.chat_template = CHAT_TEMPLATE
        return DistillationTrainer(
            model=student or tiny_llama(1, hidden=16, max_position_embeddings=256).double(),
            teacher=teacher or (None if "teacher_adapters_off" in options else live(tokenizer)),
            args=make_config(tmp_path / "out", **(plain | options)),
            train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
            eval_dataset=evaluation,
            processing_class=tokenizer_of_chats,
            peft_config=peft,
        )

    return build_trainer


def live(tokenizer: PreTrainedTokenizerBase, seed: int = 2) -> LiveTeacher:
    return LiveTeacher(tiny_llama(seed, max_position_embeddings=256).double(), tokenizer)


def naive_loss(student: PreTrainedModel, teacher: PreTrainedModel, pairs: list[tuple[list[int], ...]]) -> Tensor:
    """Mean of KL(teacher || student) over the tokens of the completions, one forward a text, without padding.

    Args:
        pairs: of each row the student's prompt, the teacher's prompt and the completion.
    """
    values = []
    for asked, read, answer in pairs:
        q = student(torch.tensor([asked + answer])).logits[0, len(asked) - 1 : -1].log_softmax(-1)
        with torch.no_grad():
            p = teacher(torch.tensor([read + answer])).logits[0, len(read) - 1 : -1].log_softmax(-1)
        values.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(values).mean()


def pairs_of(rows: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[tuple[list[int], ...]]:
    end = tokenizer.eos_token
    texts = [(row["prompt"], row["teacher_prompt"], row["completion"] + end) for row in rows]
    return [tuple(tokenizer(text)["input_ids"] for text in row) for row in texts]


def test_the_step_is_that_of_both_texts_built_by_hand(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    student = tiny_llama(1, hidden=16, max_position_embeddings=256).double()
    teacher = live(tokenizer)
    loss = naive_loss(student, teacher.model, pairs_of(TEXTS, tokenizer))
    loss.backward()
    expected = {name: weight.detach() - weight.grad for name, weight in student.named_parameters()}
    for options in (
        {},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"pad_to_multiple_of": 32},
    ):
        trainer = build(TEXTS, teacher=teacher, **options)
        trainer.train()
        assert trainer.state.log_history[0]["kd"] == pytest.approx(loss.item(), rel=1e-6)
        for name, weight in trainer.model.named_parameters():
            torch.testing.assert_close(weight, expected[name], rtol=1e-9, atol=1e-12)


def test_tokens_given_by_hand_are_what_text_becomes(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [
        {
            "input_ids": asked + answer,
            "labels": [IGNORED] * len(asked) + answer,
            IDS: read + answer,
            LABELS: [IGNORED] * len(read) + answer,
        }
        for asked, read, answer in pairs_of(TEXTS, tokenizer)
    ]
    by_hand, by_text = build(rows).train_dataset, build(TEXTS).train_dataset
    columns = ["input_ids", "labels", IDS, LABELS, NUMBER]
    assert by_hand.select_columns(columns)[:] == by_text.select_columns(columns)[:]


CONVERSATIONS = {
    "a teacher's prompt": [{"messages": turns(a, b), "teacher_prompt": turns(more + a)} for a, b, more in QUESTIONS],
    "a teacher's conversation": [
        {"messages": turns(a, b, "and?", "no"), "teacher_messages": turns(more + a, b, "really?", "no")}
        for a, b, more in QUESTIONS
    ],
    "pairs of turns": [
        {"prompt": turns(a), "completion": turns(a, b)[1:], "teacher_prompt": turns(a, system=more)}
        for a, b, more in QUESTIONS
    ],
    "pairs, a whole conversation": [
        {"prompt": turns(a), "completion": turns(a, b)[1:], "teacher_messages": turns(more + a, b)}
        for a, b, more in QUESTIONS
    ],
}


@pytest.mark.parametrize("kind", CONVERSATIONS)
def test_a_conversation_has_the_same_answers_after_other_turns(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase, kind: str
) -> None:
    rows = CONVERSATIONS[kind]
    trainer = build(rows, assistant_only_loss="completion" not in rows[0])
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert not torch.equal(batch["input_ids"][0, :8], batch[TEACHER]["input_ids"][0, :8])
    own, read = View.of(batch), View.of_teacher(batch)
    assert torch.equal(own.positions.targets, read.positions.targets)
    for ids, (_, _, more) in zip(batch[TEACHER]["input_ids"], QUESTIONS, strict=True):
        assert ("really?" if len(rows[0].get("messages", ())) > 2 else more) in tokenizer.decode(ids)
    trainer.train()


def test_a_system_turn_and_a_template_are_the_teachers_alone(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"messages": turns(a, b, system=more if i % 2 else None)} for i, (a, b, more) in enumerate(QUESTIONS)]
    (tmp_path / "loud.jinja").write_text("!!" + CHAT_TEMPLATE)
    options = {"teacher_system_prompt": "Be brief.", "teacher_chat_template": str(tmp_path / "loud.jinja")}
    trainer = build(rows, assistant_only_loss=True, **options)
    for (a, b, more), row in zip(QUESTIONS, trainer.train_dataset, strict=True):
        answer = f"A:{b}{tokenizer.eos_token}"
        assert tokenizer.decode(row[IDS]) == f"!!U:Be brief.\nU:{a}\n{answer}"
        own = f"U:{more}\n" if f"U:{more}\n" in tokenizer.decode(row["input_ids"]) else ""
        assert tokenizer.decode(row["input_ids"]) == f"{own}U:{a}\n{answer}"
    assert trainer.processing_class.chat_template == CHAT_TEMPLATE


def test_a_row_without_a_prompt_for_the_teacher_is_read_by_both(build: Callable[..., DistillationTrainer]) -> None:
    rows = [row | ({"teacher_prompt": None} if i % 2 else {}) for i, row in enumerate(TEXTS)]
    same = [row[IDS] == row["input_ids"] for row in build(rows).train_dataset]
    assert same == [bool(i % 2) for i in range(8)]


def test_the_same_prompt_for_teacher_and_student_teaches_nothing_of_itself(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = [row | {"teacher_prompt": row["prompt"]} for row in TEXTS]
    itself = LiveTeacher(tiny_llama(1, hidden=16, max_position_embeddings=256).double(), tokenizer)
    trainer = build(rows, teacher=itself)
    trainer.train()
    assert trainer.state.log_history[0]["kd"] == pytest.approx(0, abs=1e-12)
    trainer = build(TEXTS, teacher=itself)
    trainer.train()
    assert trainer.state.log_history[0]["kd"] > 1e-3


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
def test_what_max_length_cuts_of_the_student_the_teacher_does_not_speak_about(
    build: Callable[..., DistillationTrainer], mode: str
) -> None:
    with pytest.warns(FutureWarning) if mode == "keep_end" else nullcontext():
        trainer = build(TEXTS, max_length=16, truncation_mode=mode)
    assert any(len(row[IDS]) > 16 for row in trainer.train_dataset)
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert batch["input_ids"].shape[1] == 16
    assert torch.equal(View.of(batch).positions.targets, View.of_teacher(batch).positions.targets)


def test_each_kind_of_teacher_reads_its_own_text(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    teacher, evaluation = live(tokenizer), Dataset.from_list(TEXTS[:3])
    expected = build(TEXTS, teacher=teacher, evaluation=evaluation)
    cache = fill_cache(expected, tmp_path / "cache", Hidden("float32"))
    assert len(cache.index) == 8, "one text a row, which evaluation shares"
    figures = expected.evaluate()
    loss = naive_loss(expected.model, teacher.model, pairs_of(TEXTS[:3], tokenizer))
    assert figures["eval_kd"] == pytest.approx(loss.item(), rel=1e-6)
    expected.train()
    for other in (CachedTeacher(cache), EnsembleTeacher([teacher, teacher])):
        trainer = build(TEXTS, teacher=other)
        trainer.train()
        for name, weight in copied_state(trainer.model).items():
            torch.testing.assert_close(weight, copied_state(expected.model)[name], rtol=1e-4, atol=1e-6)
    plain = [{"prompt": row["prompt"], "completion": row["completion"]} for row in TEXTS]
    with pytest.raises(ValueError, match="with another prompt for the teacher"):
        build(plain, teacher=CachedTeacher(cache))
    half = fill_cache(build(TEXTS[:4]), tmp_path / "half", Hidden("float32"))
    trainer = build(TEXTS, teacher=CachedTeacher(half, on_miss="skip"), logging_steps=1)
    trainer.train()
    assert 0 < trainer.state.log_history[0]["skipped_share"] < 1


def test_check_knows_what_the_teacher_reads(build: Callable[..., DistillationTrainer]) -> None:
    trainer = build(TEXTS, teacher_max_length=120)
    report = trainer.check()
    longest = max(map(len, trainer.train_dataset[IDS]))
    (finding,) = [finding for finding in report.findings if finding.what == "teacher's text"]
    students = max(map(len, trainer.train_dataset["input_ids"]))
    assert finding.text == f"it reads up to {longest} tokens, the student up to {students} tokens; 120 at most"
    assert not [finding for finding in report.findings if finding.what == "data"], "what it measures is measured"


def test_the_gap_report_is_about_what_each_reads(build: Callable[..., DistillationTrainer]) -> None:
    trainer = build(TEXTS, evaluation=Dataset.from_list(TEXTS))
    report = trainer.report(max_texts=None)
    assert trainer.evaluate()["eval_kl"] == pytest.approx(report.domains["eval"]["likeness"]["kl"]["value"], rel=1e-4)


def test_adapters_off_with_the_answer_in_view_is_self_distillation(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = build(TEXTS, peft=LoraConfig(r=4, target_modules="all-linear"), teacher_adapters_off=True)
    base = tiny_llama(1, hidden=16, max_position_embeddings=256).double()
    expected = naive_loss(base, base, pairs_of(TEXTS, tokenizer))
    trainer.train()
    assert trainer.state.log_history[0]["kd"] == pytest.approx(expected.item(), rel=1e-6)


def test_the_student_writes_after_its_prompt_and_the_teacher_reads_its_own(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    writing = {"on_policy_share": 1.0, "max_completion_length": 5, "sampling_temperature": 0.0}
    teacher, rows = live(tokenizer), [{k: v for k, v in row.items() if k != "completion"} for row in TEXTS]
    trainer = build(rows, teacher=teacher, **writing)
    student, pairs = tiny_llama(1, hidden=16, max_position_embeddings=256).double(), []
    for asked, read, _ in pairs_of(TEXTS, tokenizer):
        ids = list(asked)
        while len(ids) < len(asked) + 5 and (len(ids) == len(asked) or ids[-1] not in (0, 2)):
            ids.append(int(student(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        pairs.append((asked, read, ids[len(asked) :]))
    loss = naive_loss(student, teacher.model, pairs)
    loss.backward()
    trainer.train()
    assert trainer.state.log_history[0]["kd"] == pytest.approx(loss.item(), rel=1e-6)
    for name, weight in trainer.model.named_parameters():
        expected = student.get_parameter(name)
        torch.testing.assert_close(weight, expected.detach() - expected.grad, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="row 4: with max_completion_length the teacher would read"):
        build(TEXTS, teacher_max_length=80, **writing | {"max_completion_length": 40})
    with pytest.raises(ValueError, match="speculative_top_k has the teacher read what the student reads"):
        build(TEXTS, speculative_top_k=5, **writing)


def test_a_stream_is_read_as_a_dataset(build: Callable[..., DistillationTrainer]) -> None:
    steps = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 0.1}
    trainers = [build(data, **steps) for data in (TEXTS, Dataset.from_list(TEXTS).to_iterable_dataset())]
    for trainer in trainers:
        trainer.train()
    expected = copied_state(trainers[0].model)
    for name, weight in copied_state(trainers[1].model).items():
        torch.testing.assert_close(weight, expected[name])
    stream = build(Dataset.from_list(TEXTS).to_iterable_dataset(), teacher_max_length=50, **steps)
    with pytest.raises(ValueError, match="row 3: the teacher would read"):
        stream.train()


REFUSED: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "a row too long": (TEXTS, {"teacher_max_length": 50}, r"train dataset, row \d: .*50 at most.* \d of its 8 rows"),
    "past the teacher's context": (
        [TEXTS[0], TEXTS[1] | {"teacher_prompt": "x = 1\n" * 200}],
        {},
        "row 1: the teacher would read .* and 256 at most",
    ),
    "other answers": (
        [{"messages": turns("a", "b"), "teacher_messages": turns("c", answer)} for answer in ("b", "d")],
        {"assistant_only_loss": True},
        "row 1: the teacher would speak about other tokens",
    ),
    "a template that changes them": (
        CONVERSATIONS["a teacher's prompt"],
        {
            "assistant_only_loss": True,
            "teacher_chat_template": CHAT_TEMPLATE.replace(
                "{{ message.content }}{{", "{{ message.content | upper }}{{"
            ),
        },
        "row 0: the teacher would speak about other tokens",
    ),
    "whole texts": ([{"text": "a", "teacher_prompt": "b"}], {}, "no part that both could read"),
    "every turn counts": (
        [{"messages": turns("a", "b"), "teacher_prompt": turns("c")}],
        {},
        "is not the same for both",
    ),
    "the prompt counts": (TEXTS, {"completion_only_loss": False}, "is not the same for both"),
    "packing": (TEXTS, {"packing": True}, "set packing and padding_free to False"),
    "no conversation": (
        [{"prompt": "a", "completion": "b"}],
        {"teacher_system_prompt": "c"},
        "texts without turns",
    ),
    "a text for messages": (
        [{"messages": turns("a", "b"), "teacher_prompt": "c"}],
        {"assistant_only_loss": True},
        "row 0: `teacher_prompt` is 'c', not a list of messages",
    ),
    "nothing that it reads": (
        [{"prompt": "a", "completion": "b"}],
        {"teacher_max_length": 9},
        "teacher_max_length .*reads something else",
    ),
    "a term on all tokens": (TEXTS, {"losses": [{"name": "relations", "layers": {2: 2}}]}, "leave that term out"),
    "tokens without labels": ([{"input_ids": [1, 2], IDS: [1, 2]}], {}, f"give `{IDS}` and `{LABELS}`"),
    "no template": ([], {"teacher_chat_template": "nowhere"}, "is no file, and no Jinja"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_teacher_cannot_read_is_refused(build: Callable[..., DistillationTrainer], case: str) -> None:
    rows, options, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        build(rows, **options)


def test_a_batch_with_other_targets_for_the_teacher_is_refused() -> None:
    ids = torch.arange(1, 7)[None] % VOCAB
    batch = {"input_ids": ids, "labels": ids, TEACHER: {"input_ids": ids + 1, "labels": ids + 1}}
    with pytest.raises(ValueError, match="mend the collator"):
        View.of_teacher(batch)
