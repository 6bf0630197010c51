"""Whether the ids of teacher and student mean the same: in the vocabulary, and in texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from runs import save
from tiny import VOCAB, make_config, tiny_llama
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Lowercase
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelProcessor
from tokenizers.processors import Sequence, TemplateProcessing
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.generation.prompts import make_prompt, prompt_ids
from llm_distill.loading import tokenizer_in
from llm_distill.models import require_same_ids, unshared_tokens, vocabulary_size

TEMPLATE = "{% for m in messages %}<|turn|>{{ m.content }}{{ eos_token }}{% endfor %}"


def make_trainer(
    folder: Path, tokenizer: Any, student: str | PreTrainedModel, teacher: LiveTeacher, texts: list[Any], **options: Any
) -> DistillationTrainer:
    column = "text" if isinstance(texts[0], str) else "messages"
    return DistillationTrainer(
        student,
        teacher,
        make_config(folder / "out", **options),
        train_dataset=Dataset.from_dict({column: texts}),
        processing_class=tokenizer,
    )


@pytest.fixture
def copy(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[[], Any]:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return lambda: AutoTokenizer.from_pretrained(tmp_path / "tokenizer")


def in_lower_case(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.normalizer = Lowercase()


def with_other_merges(tokenizer: Any) -> None:
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"] = content["model"]["merges"][:5]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("change", [in_lower_case, with_other_merges])
def test_the_same_vocabulary_that_cuts_texts_otherwise_is_refused(
    change: Callable[[Any], None], copy: Callable[[], Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    other = copy()
    require_same_ids(other, tokenizer)
    change(other)
    assert other.get_vocab() == tokenizer.get_vocab()
    with pytest.raises(ValueError, match="different ids for the text 'The import of"):
        require_same_ids(other, tokenizer)


def test_a_space_in_front_of_a_text_is_a_habit(copy: Callable[[], Any], tokenizer: PreTrainedTokenizerBase) -> None:
    other = copy()
    other.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    assert other("def").input_ids != tokenizer("def").input_ids
    require_same_ids(other, tokenizer)


def test_texts_of_the_dataset_are_compared_too(
    copy: Callable[[], Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    other = copy()
    other.backend_tokenizer.normalizer = None
    content = json.loads(other.backend_tokenizer.to_str())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "zebra"}, "content": "horse"}
    other._tokenizer = Tokenizer.from_str(json.dumps(content))
    require_same_ids(other, tokenizer)
    teacher, student = LiveTeacher(tiny_llama(2), other), tiny_llama(1, hidden=16)
    make_trainer(tmp_path, tokenizer, student, teacher, texts=["x = y"] * 4)
    with pytest.raises(ValueError, match="different ids for the text 'a zebra'"):
        make_trainer(tmp_path, tokenizer, student, teacher, texts=["x = y", "a zebra"] * 2)


def test_a_special_token_of_another_name_is_a_warning_where_no_text_has_it(
    copy: Callable[[], Any], tmp_path: Path
) -> None:
    of_student, of_teacher = copy(), copy()
    of_student.add_special_tokens({"additional_special_tokens": ["<|reserved|>"]})
    of_teacher.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    assert unshared_tokens(of_teacher, of_student) == {"<|reserved|>": VOCAB}
    student, rows = tiny_llama(1, hidden=16, vocab_size=VOCAB + 1), tiny_llama(2, vocab_size=VOCAB + 1)
    with pytest.warns(UserWarning, match=r"no <\|reserved\|> where the student has it"):
        make_trainer(tmp_path, of_student, student, LiveTeacher(rows, of_teacher), texts=["x = y"] * 4).train()
    with (
        pytest.warns(UserWarning, match="reserved"),
        pytest.raises(ValueError, match=r"'<\|reserved\|>', which row 1 of train has"),
    ):
        make_trainer(
            tmp_path, of_student, student, LiveTeacher(rows, of_teacher), texts=["x = y", "a <|reserved|>"] * 2
        )


@pytest.mark.parametrize("rows", [VOCAB, 400], ids=["as many rows as tokens", "padded"])
def test_a_teachers_chat_template_is_taken_with_a_vocabulary_of_any_size(
    rows: int, copy: Callable[[], Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    of_teacher = copy()
    of_teacher.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    of_teacher.chat_template = TEMPLATE
    teacher = save(tiny_llama(2, vocab_size=VOCAB + 1), tmp_path / "teacher", of_teacher)
    trainer = make_trainer(
        tmp_path,
        copy(),
        tiny_llama(1, hidden=16, vocab_size=rows),
        LiveTeacher.load(str(teacher)),
        texts=[[{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]] * 4,
        chat_template_path=str(teacher),
    )
    assert len(trainer.processing_class) == 384
    assert vocabulary_size(trainer.processing_class) == VOCAB + 1
    trainer.train()
    assert trainer.check().is_red is False


def ended_by_flag(tokenizer: Any) -> None:
    tokenizer.add_eos_token = True


def ended_by_template(tokenizer: Any) -> None:
    eos = tokenizer.eos_token
    tokens = [(eos, tokenizer.eos_token_id)]
    template = TemplateProcessing(single=f"{eos} $A {eos}", pair=f"$A {eos} $B {eos}", special_tokens=tokens)
    tokenizer.backend_tokenizer.post_processor = Sequence([ByteLevelProcessor(trim_offsets=True), template])


@pytest.mark.parametrize("change", [ended_by_flag, ended_by_template])
@pytest.mark.parametrize("is_loaded", [True, False], ids=["loaded", "given"])
def test_a_tokenizer_that_ends_texts_by_itself_ends_no_prompt_and_a_text_once(
    change: Callable[[Any], None], is_loaded: bool, copy: Callable[[], Any], tmp_path: Path
) -> None:
    tokenizer = copy()
    change(tokenizer)
    plain, eos = tokenizer("x = y", add_special_tokens=False).input_ids, tokenizer.eos_token_id
    assert tokenizer("x = y").input_ids[-1] == eos
    start = tokenizer("x = y").input_ids[: -len(plain) - 1]
    for name, seed in (("student", 1), ("teacher", 2)):
        save(tiny_llama(seed), tmp_path / name, tokenizer)
    teacher = LiveTeacher.load(str(tmp_path / "teacher"))
    assert prompt_ids(make_prompt("x = y", {}), teacher.tokenizer) == start + plain
    given = None if is_loaded else tokenizer
    trainer = make_trainer(tmp_path, given, str(tmp_path / "student"), teacher, texts=["x = y"] * 4)
    assert trainer.train_dataset[0]["input_ids"] == [*start, *plain, eos]
    trainer.save_model(str(tmp_path / "saved"))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved")("x = y").input_ids == start + plain


def test_a_word_that_is_unknown_is_no_end_that_a_tokenizer_puts() -> None:
    """Where the end of text stands for what the vocabulary lacks, or where nothing does."""
    for unknown in ({"unk_token": "<end>"}, {}):
        words = Tokenizer(WordLevel({"<end>": 0, "1": 1}, **unknown))
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")
        assert tokenizer_in(tokenizer, "processing_class") is tokenizer
        require_same_ids(tokenizer, tokenizer)


def test_pictures_are_refused_in_words(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = Dataset.from_dict({"text": ["x = y"] * 4, "image": [None] * 4})
    with pytest.raises(ValueError, match="columns text, image: pictures are not distilled"):
        DistillationTrainer(
            tiny_llama(1, hidden=16),
            LiveTeacher(tiny_llama(2), tokenizer),
            make_config(tmp_path / "out"),
            train_dataset=rows,
            processing_class=tokenizer,
        )
