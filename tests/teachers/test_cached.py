"""Training from a cache is training from the teacher; what does not fit is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from runs import copied_state, fill_cache, first_batch, logged, make_trainer
from tiny import VOCAB, make_config, tiny_llama
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from worker import make_rows

from llm_distill import CachedTeacher, DistillationTrainer, LiveTeacher, TeacherCache
from llm_distill.cache import Hidden, Hybrid, Sampled, TopK
from llm_distill.cache.methods import Method
from llm_distill.files import locked
from llm_distill.rows import SIGNAL, View
from llm_distill.signals import HiddenSignal, SparseSignal

EXACT = TopK(VOCAB, step=2**-17)


@pytest.fixture
def student(saved: Path) -> str:
    return str(saved / "student")


@pytest.fixture
def captured(tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase) -> Callable[..., Path]:
    """The folder of a cache of `make_trainer`'s rows."""

    def fill(method: Method, name: str = "cache", **options: Any) -> Path:
        options = {"teacher_model_name_or_path": str(saved / "teacher")} | options
        fill_cache(make_trainer(tmp_path, tokenizer, student, **options), tmp_path / name, method)
        return tmp_path / name

    return fill


def train(folder: Path, tokenizer: PreTrainedTokenizerBase, student: str, **options: Any) -> DistillationTrainer:
    trainer = make_trainer(folder, tokenizer, student, **({"max_steps": 4} | options))
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("method", "options", "tolerance"),
    [
        (EXACT, {"divergence": "forward_kl", "ce_weight": 0.3}, 2e-3),
        (EXACT, {"divergence": "jsd", "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, 2e-3),
        (EXACT, {"divergence": "reverse_kl", "train_sampling_strategy": "random", "num_train_epochs": 2}, 2e-3),
        (Hidden("float32"), {"divergence": "jsd", "loss_temperature": 2.0}, 1e-5),
        (Hidden("float32"), {"divergence": "skew_kl", "dataloader_num_workers": 2}, 1e-5),
    ],
    ids=["top_k", "accumulation", "shuffled", "hidden", "workers"],
)
def test_cached_is_live_step_for_step(
    tmp_path: Path,
    saved: Path,
    student: str,
    tokenizer: PreTrainedTokenizerBase,
    captured: Callable[..., Path],
    method: Method,
    options: dict[str, Any],
    tolerance: float,
) -> None:
    cache = captured(method)
    live = train(tmp_path / "a", tokenizer, student, teacher_model_name_or_path=str(saved / "teacher"), **options)
    cached = train(tmp_path / "b", tokenizer, student, teacher_cache=str(cache), **options)
    assert logged(cached, "loss") == pytest.approx(logged(live, "loss"), rel=tolerance)
    assert logged(cached, "kd") == pytest.approx(logged(live, "kd"), rel=tolerance)
    weights = copied_state(live.model)
    for name, weight in copied_state(cached.model).items():
        assert torch.allclose(weight, weights[name], atol=10 * tolerance), name


def test_hidden_states_of_a_bfloat16_teacher_are_the_teacher(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, captured: Callable[..., Path]
) -> None:
    options = {"teacher_model_name_or_path": str(saved / "teacher"), "teacher_model_init_kwargs": {"dtype": "bfloat16"}}
    cache = captured(Hidden("bfloat16"), **options)
    live = train(tmp_path / "a", tokenizer, student, **options)
    cached = train(tmp_path / "b", tokenizer, student, teacher_cache=str(cache))
    assert logged(cached, "loss") == pytest.approx(logged(live, "loss"), rel=1e-2)  # batches of another length
    signal = cached.teacher.score(View.of(first_batch(cached)))
    assert isinstance(signal, HiddenSignal)
    assert signal.hidden.dtype == signal.head.module.weight.dtype == torch.bfloat16


def test_packed_training_reads_what_was_captured_unpacked(
    tmp_path: Path, saved: Path, tokenizer: PreTrainedTokenizerBase, texts: Dataset, student: str
) -> None:
    def trainer(**options: Any) -> DistillationTrainer:
        return DistillationTrainer(
            model=student,
            args=make_config(tmp_path / "out", max_length=128, per_device_train_batch_size=4, **options),
            train_dataset=texts.select(range(40)),
            processing_class=tokenizer,
        )

    fill_cache(trainer(teacher_model_name_or_path=str(saved / "teacher")), tmp_path / "cache", EXACT)
    packed = {"packing": True, "packing_strategy": "bfd", "max_steps": 3}
    live = trainer(teacher_model_name_or_path=str(saved / "teacher"), **packed)
    cached = trainer(teacher_cache=str(tmp_path / "cache"), **packed)
    for each in (live, cached):
        each.train()
    assert logged(cached, "kd") == pytest.approx(logged(live, "kd"), rel=5e-3)


@pytest.mark.parametrize("method", [Hybrid(0.05), Sampled(30)], ids=str)
def test_samples_tell_the_kl(
    tmp_path: Path,
    saved: Path,
    student: str,
    tokenizer: PreTrainedTokenizerBase,
    captured: Callable[..., Path],
    method: Method,
) -> None:
    cache = captured(method)
    live = train(tmp_path / "a", tokenizer, student, teacher_model_name_or_path=str(saved / "teacher"), max_steps=1)
    cached = train(tmp_path / "b", tokenizer, student, teacher_cache=str(cache), max_steps=1)
    assert logged(cached, "kl")[0] == pytest.approx(logged(live, "kl")[0], rel=0.25)
    assert logged(cached, "kd")[0] > logged(cached, "kl")[0]


def test_evaluation_and_streams_read_it_too(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, captured: Callable[..., Path]
) -> None:
    cache = captured(EXACT)
    figures = []
    for options in ({"teacher_model_name_or_path": str(saved / "teacher")}, {"teacher_cache": str(cache)}):
        trainer = DistillationTrainer(
            model=student,
            args=make_config(
                tmp_path / "out", dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, **options
            ),
            train_dataset=make_rows([]).to_iterable_dataset(),
            eval_dataset=make_rows([]),
            processing_class=tokenizer,
        )
        trainer.train()
        figures.append([*logged(trainer, "loss"), trainer.evaluate()["eval_kd"]])
    assert figures[1] == pytest.approx(figures[0], rel=2e-3)


@pytest.fixture
def half(tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A cache of the first half of the rows."""
    trainer = make_trainer(tmp_path, tokenizer, student, teacher_model_name_or_path=str(saved / "teacher"))
    trainer.train_dataset = make_rows([]).select(range(12))
    fill_cache(trainer, tmp_path / "half", EXACT)
    return str(tmp_path / "half")


def test_a_missing_text_is_an_error_that_says_which(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, half: str
) -> None:
    collate = make_trainer(tmp_path, tokenizer, student, LiveTeacher(tiny_llama(2), tokenizer)).data_collator
    read, rows = CachedTeacher(half).reader, list(make_rows([]))
    assert SIGNAL in read(collate(rows[10:12]))
    missing = re.escape(str(rows[12]["input_ids"][:8]))
    with pytest.raises(ValueError, match=f"2 of the 2 texts of a batch are .*half.* ids {missing}.*live or skip"):
        read(collate(rows[12:14]))


@pytest.mark.parametrize("name", ["train", "eval", "second"])
def test_missing_texts_of_any_dataset_are_found_when_the_trainer_is_built(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, half: str, name: str
) -> None:
    data = {each: make_rows([]).select(range(12)) for each in ("train", "eval", "second")} | {name: make_rows([])}

    prepared = {"dataset_kwargs": {"skip_prepare_dataset": True}, "max_length": None}
    with pytest.raises(ValueError, match=f"the {name} dataset: 6 of the 12 texts of a batch are not in"):
        DistillationTrainer(
            student,
            args=make_config(tmp_path / "out", teacher_cache=half, **prepared),
            train_dataset=data.pop("train"),
            eval_dataset=data,
            processing_class=tokenizer,
        )


def test_missing_texts_can_be_skipped(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, half: str
) -> None:
    """Six steps of what is there, then steps in which nothing counts."""
    options = {"teacher_cache": half, "on_miss": "skip", "max_steps": 12, "optim": "sgd"}
    trainer = train(tmp_path, tokenizer, student, **options)
    losses = logged(trainer, "loss")
    assert all(loss > 0 for loss in losses[:6])
    assert losses[6:] == [0.0] * 6
    assert logged(trainer, "skipped_share") == [0.0] * 6 + [1.0] * 6


def test_a_cache_of_other_texts_cannot_be_skipped_through(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, half: str
) -> None:
    options = {"teacher_cache": half, "on_miss": "skip", "dataset_kwargs": {"skip_prepare_dataset": True}}
    config = make_config(tmp_path / "out", max_length=None, **options)
    missing = make_rows([]).select(range(12, 24))
    with pytest.raises(ValueError, match=r"none of its 12 texts is in the teacher_cache.*on_miss=skip.*capture"):
        DistillationTrainer(student, args=config, train_dataset=missing, processing_class=tokenizer)
    stream = missing.to_iterable_dataset()
    trainer = DistillationTrainer(student, args=config, train_dataset=stream, processing_class=tokenizer)
    with pytest.raises(ValueError, match="nothing was learned in 2 steps"):
        trainer.train()


def test_the_share_of_rows_that_are_skipped_is_logged(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, half: str
) -> None:
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "dataloader_num_workers": 2}
    trainer = train(tmp_path, tokenizer, student, teacher_cache=half, on_miss="skip", max_steps=3, **options)
    counts = [sum(label != -100 for label in row["labels"][1:]) for row in make_rows([])]
    expected = [0.0, sum(counts[12:16]) / sum(counts[8:16]), 1.0]
    assert logged(trainer, "skipped_share") == pytest.approx(expected)
    assert trainer.evaluate(make_rows([]))["eval_skipped_share"] == pytest.approx(sum(counts[12:]) / sum(counts))


def test_missing_texts_can_be_asked_for_and_are_kept(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, half: str
) -> None:
    teacher = {"teacher_model_name_or_path": str(saved / "teacher")}
    live = train(tmp_path / "a", tokenizer, student, max_steps=12, **teacher)
    grown = train(tmp_path / "b", tokenizer, student, max_steps=9, teacher_cache=half, on_miss="live", **teacher)
    assert len(TeacherCache(half)) == 18
    grown.eval_dataset = make_rows([])
    grown.evaluate()  # what only evaluation asks for is kept too
    again = train(tmp_path / "c", tokenizer, student, max_steps=12, teacher_cache=half)
    assert logged(grown, "loss") == pytest.approx(logged(live, "loss")[:9], rel=2e-3)
    assert logged(again, "loss") == pytest.approx(logged(live, "loss"), rel=2e-3)
    with locked(Path(half), "another test"):  # the lock is free again
        pass
    assert len(TeacherCache(half)) == 24
    assert TeacherCache(half).verify() == []


def test_what_a_signal_cannot_serve_is_refused_when_the_trainer_is_built(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, captured: Callable[..., Path]
) -> None:
    sampled, top = str(captured(Sampled(20))), str(captured(TopK(8), name="top"))
    with pytest.raises(ValueError, match="unbiased gradient for forward_kl only, not for ReverseKL"):
        make_trainer(tmp_path, tokenizer, student, teacher_cache=sampled, divergence="reverse_kl")
    with pytest.raises(ValueError, match=r"temperature 1.0 and cannot serve loss_temperature=2.0"):
        make_trainer(tmp_path, tokenizer, student, teacher_cache=top, loss_temperature=2.0)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"teacher_model_name_or_path": "student"}, r"teacher.model: the cache has 'teacher', asked for is 'student'"),
        ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, r"teacher.dtype: the cache has 'float32', .*'bfloat16'"),
        ({"teacher_load_in_4bit": True}, r"teacher.bits: the cache has None, asked for is 4"),
    ],
)
def test_another_teacher_is_refused_with_field_and_values(
    tmp_path: Path,
    saved: Path,
    student: str,
    tokenizer: PreTrainedTokenizerBase,
    captured: Callable[..., Path],
    change: dict[str, Any],
    field: str,
) -> None:
    cache = captured(TopK(8))
    options = {"teacher_model_name_or_path": "teacher"} | change
    options["teacher_model_name_or_path"] = str(saved / options["teacher_model_name_or_path"])
    with pytest.raises(ValueError, match=field) as error:
        make_trainer(tmp_path, tokenizer, student, teacher_cache=str(cache), **options)
    assert "llm-distill capture" in str(error.value)
    assert "--drop_stale" in str(error.value)


def test_a_teacher_that_was_trained_on_is_another_teacher(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, captured: Callable[..., Path]
) -> None:
    cache = captured(TopK(8))
    changed = tiny_llama(3, hidden=32)
    changed.save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    options = {"teacher_cache": str(cache), "teacher_model_name_or_path": str(tmp_path / "teacher")}
    with pytest.raises(ValueError, match=r"teacher\.files: the cache has"):
        make_trainer(tmp_path, tokenizer, student, **options)
    with pytest.raises(ValueError, match=r"teacher\.weights: the cache has"):
        make_trainer(tmp_path, tokenizer, student, on_miss="live", **options)


def test_another_tokenizer_or_chat_template_is_refused(
    tmp_path: Path, saved: Path, student: str, captured: Callable[..., Path]
) -> None:
    cache = str(captured(TopK(8)))
    other = AutoTokenizer.from_pretrained(saved / "student")
    other.chat_template = "{{ messages }}"
    with pytest.raises(ValueError, match=r"tokenizer\.chat_template: the cache has None, asked for is"):
        make_trainer(tmp_path, other, student, teacher_cache=cache)
    other.chat_template = None
    other.add_tokens(["<new>"])
    with pytest.raises(ValueError, match=r"tokenizer.vocabulary: .*; vocab_size: the cache has 320, asked for is 321"):
        make_trainer(tmp_path, other, student, teacher_cache=cache)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_miss": "skip"}, "on_miss .there is no teacher_cache."),
        ({"teacher_cache": "x", "kd_weight": 0.0, "ce_weight": 1.0}, "teacher_cache .kd_weight is 0."),
        ({"teacher_cache": "x", "on_miss": "maybe"}, "on_miss must be error, skip or live, got 'maybe'"),
        ({"teacher_cache": "x", "teacher_adapters_off": True}, "teacher_adapters_off .teacher_cache has the answers."),
    ],
)
def test_options_without_effect_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_who_is_asked_must_be_clear(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, captured: Callable[..., Path]
) -> None:
    cache = captured(TopK(8))
    with pytest.raises(ValueError, match="there is no teacher: pass teacher="):
        make_trainer(tmp_path, tokenizer, student, teacher_cache=str(cache), on_miss="live")
    with pytest.raises(ValueError, match="the teacher would not be asked"):
        make_trainer(tmp_path, tokenizer, student, LiveTeacher(tiny_llama(2), tokenizer), teacher_cache=str(cache))
    with pytest.raises(ValueError, match="needs the live teacher"):
        CachedTeacher(str(cache), "live")


def test_a_damaged_head_is_found(tmp_path: Path, captured: Callable[..., Path]) -> None:
    cache = captured(Hidden("int8"))
    head = cache / "head.safetensors"
    content = bytearray(head.read_bytes())
    content[-5] ^= 1
    head.write_bytes(content)
    with pytest.raises(ValueError, match=r"head.safetensors is damaged: run"):
        CachedTeacher(str(cache))


def test_it_describes_the_teacher_that_it_stands_for(captured: Callable[..., Path]) -> None:
    described = CachedTeacher(str(captured(TopK(8)))).describe()
    assert described["model"] == "teacher"
    assert described["cache"] == {"name": "top_k", "k": 8, "mass": 1.0, "threshold": 0.0, "step": 1 / 128}
    assert str(Path.home()) not in json.dumps(described)


def test_scores_without_a_loader(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase, captured: Callable[..., Path]
) -> None:
    trainer = make_trainer(tmp_path, tokenizer, student, teacher_cache=str(captured(TopK(8))))
    batch = trainer.data_collator.collate([trainer.train_dataset[index] for index in range(2)])
    signal = CachedTeacher(str(tmp_path / "cache")).score(View.of(batch))
    assert isinstance(signal, SparseSignal)
    assert torch.equal(signal.ids, trainer.teacher.score(View.of(first_batch(trainer))).ids)


def test_the_students_own_base_can_be_asked_for_what_is_missing(
    tmp_path: Path, student: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    lora = {"peft_config": LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)}
    first = make_trainer(tmp_path, tokenizer, student, teacher_adapters_off=True, **lora)
    first.train_dataset = make_rows([]).select(range(12))
    fill_cache(first, tmp_path / "cache", EXACT)
    options = {
        "teacher_adapters_off": True,
        "teacher_cache": str(tmp_path / "cache"),
        "on_miss": "live",
        "max_steps": 12,
    }
    trainer = make_trainer(tmp_path, tokenizer, student, seed=7, **options, **lora)
    trainer.train()
    assert len(TeacherCache(tmp_path / "cache")) == 24


def test_a_folder_that_moved_is_the_same_teacher(
    tmp_path: Path, saved: Path, student: str, tokenizer: PreTrainedTokenizerBase, captured: Callable[..., Path]
) -> None:
    cache = str(captured(TopK(8)))
    shutil.copytree(saved / "teacher", tmp_path / "moved")
    (tmp_path / "moved" / "training_args.bin").write_bytes(b"of a trainer")
    make_trainer(tmp_path, tokenizer, student, teacher_cache=cache, teacher_model_name_or_path=str(tmp_path / "moved"))
