"""Texts in the tokens of two tokenizers: groups of tokens that end at the same byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llm_distill.alignment import NO_GROUP, Alignment, TokenBytes
from llm_distill.rows import IGNORED

CORPUS = [
    "def add(first, second):\n    return first + second  # 12,345 plus 201\n",
    "The quick brown fox returns; the returned fox retries 1999 times.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 你好世界 🙂",
] * 5


def byte_level(vocab_size: int, digits: bool = False, prefix: bool = False) -> PreTrainedTokenizerBase:
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.pre_tokenizer = (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), cut]) if digits else cut
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<end>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def like_sentencepiece(vocab_size: int) -> PreTrainedTokenizerBase:
    """A space before each text, bytes for what it has no letters for, and a token that begins a text."""
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *tokens]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size + 259, special_tokens=special, limit_alphabet=60)
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.pre_tokenizer = None
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary tokens
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    tokenizer = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS: dict[str, Any] = {
    "bytes": byte_level(257),
    "small": byte_level(300),
    "large": byte_level(500),
    "digits": byte_level(450, digits=True),
    "prefixed": byte_level(400, prefix=True),
    "sentencepiece": like_sentencepiece(200),
}
ALIGNMENTS: dict[tuple[str, str], Alignment] = {}
PAIRS = st.tuples(st.sampled_from([*TOKENIZERS]), st.sampled_from([*TOKENIZERS]))


def alignment_of(student: str, teacher: str) -> Alignment:
    if (student, teacher) not in ALIGNMENTS:
        ALIGNMENTS[student, teacher] = Alignment(TOKENIZERS[student], TOKENIZERS[teacher])
    return ALIGNMENTS[student, teacher]


def spelt(ids: list[int], groups: list[int], tokens: TokenBytes) -> list[bytes]:
    """The bytes of each group, without a space that was put before a text."""
    found: dict[int, bytes] = {}
    of = [*tokens.of]
    first = next((place for place, i in enumerate(ids) if tokens.of[i]), None)
    if tokens.puts_space and first is not None:
        place = max(len(of), max(ids) + 1)
        of += [b""] * (place + 1 - len(of))
        of[place] = tokens.of[ids[first]].removeprefix(b" ")
        ids = [*ids[:first], place, *ids[first + 1 :]]
    for i, group in zip(ids, groups, strict=True):
        if group != NO_GROUP:
            found[group] = found.get(group, b"") + of[i]
    return [found[group] for group in sorted(found)]


@settings(max_examples=150, deadline=None)
@given(PAIRS, st.text(max_size=40) | st.sampled_from(CORPUS))
def test_groups_have_all_bytes_once_in_order_and_are_the_finest(pair: tuple[str, str], text: str) -> None:
    alignment = alignment_of(*pair)
    own = alignment.student.tokenizer
    ids = [own.eos_token_id, *own(text, add_special_tokens=False)["input_ids"], own.eos_token_id]
    written = b"".join(spelt(ids, [*range(len(ids))], alignment.student))
    aligned = alignment.align(ids, ids)
    ours = spelt(ids, aligned.student_groups, alignment.student)
    theirs = spelt(aligned.ids, aligned.groups, alignment.teacher)
    if b"\xe2\x96\x81" not in written and "\ufffd" not in written.decode(errors="replace"):
        assert b"".join(ours) == written
        assert aligned.ids[-1] == alignment.teacher.tokenizer.eos_token_id
        assert aligned.student_groups[-1] == aligned.groups[-1] != NO_GROUP
    assert theirs == ours
    for groups in (aligned.student_groups, aligned.groups):
        counted = [group for group in groups if group != NO_GROUP]
        assert counted == sorted(counted)
        assert {*counted} == {*range(len(ours))}
    for group, data in enumerate(ours):  # no end of both lies within a group
        ends = []
        for side, tokens, of in (
            (aligned.student_groups, ids, alignment.student.of),
            (aligned.groups, aligned.ids, alignment.teacher.of),
        ):
            lengths = [len(of[i]) for i, number in zip(tokens, side, strict=True) if number == group]
            ends.append({len(data) - sum(lengths[place:]) for place in range(1, len(lengths))})
        assert not (ends[0] & ends[1]) - {0, len(data)}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_equal_tokenizers_give_the_identity(name: str) -> None:
    alignment, own = alignment_of(name, name), TOKENIZERS[name]
    for text in CORPUS[:3]:
        ids = own(text)["input_ids"]
        aligned = alignment.align(ids, [IGNORED, *ids[1:]])
        assert aligned.ids == ids
        assert aligned.labels == [IGNORED, *ids[1:]]
        assert aligned.groups == aligned.student_groups == [NO_GROUP, *range(len(ids) - 1)]
    shared = alignment.shared_tokens
    assert (shared.student.cell == shared.teacher.cell).all()
    assert len(shared.student.cell.unique()) >= len({*alignment.student.of[: alignment.student.size]})


def test_a_group_across_the_end_of_the_prompt_does_not_count() -> None:
    alignment, own = alignment_of("bytes", "large"), TOKENIZERS["bytes"]
    ids = own("so return first")["input_ids"]
    labels = [IGNORED] * 6 + ids[6:]  # the prompt ends within " return"
    aligned = alignment.align(ids, labels)
    assert spelt(ids, aligned.student_groups, alignment.student) == [b" first"]
    assert [label for label in aligned.labels if label != IGNORED] == aligned.ids[-1:]


def test_letters_that_are_cut_off_are_left_out() -> None:
    alignment, own = alignment_of("bytes", "large"), TOKENIZERS["bytes"]
    ids = own("a first 你")["input_ids"][:-1]
    aligned = alignment.align(ids, ids)
    assert b"".join(spelt(ids, aligned.student_groups, alignment.student)) == b" first "


def test_special_tokens_go_by_their_role() -> None:
    alignment = alignment_of("large", "sentencepiece")
    own, others = alignment.student.tokenizer, alignment.teacher.tokenizer
    ids = [*own("a first")["input_ids"], own.eos_token_id]
    aligned = alignment.align(ids, ids)
    assert aligned.ids[0] == others.bos_token_id
    assert aligned.ids[-1] == others.eos_token_id
    assert aligned.labels[-1] == others.eos_token_id
    back = alignment_of("sentencepiece", "large").align(aligned.ids, aligned.ids)
    assert back.ids == ids  # the token that begins a text is no token of the other


def test_the_name_of_a_special_token_in_a_text_is_text() -> None:
    alignment, own = alignment_of("bytes", "large"), TOKENIZERS["bytes"]
    ids = own("a <end> b", split_special_tokens=True)["input_ids"]
    aligned = alignment.align(ids, ids)
    assert alignment.teacher.tokenizer.eos_token_id not in aligned.ids
    assert b"".join(spelt(ids, aligned.student_groups, alignment.student)) == b" <end> b"


def test_a_normaliser_that_changes_text_is_refused_with_the_example() -> None:
    lower = byte_level(300)
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ValueError, match=r"teacher's tokenizer .* changes a plain text .*'the import of the caf"):
        Alignment(TOKENIZERS["small"], lower)
    words = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="<end>"))
    with pytest.raises(ValueError, match=r"student's tokenizer .* is neither byte-level nor like SentencePiece"):
        Alignment(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>"), TOKENIZERS["small"])


@pytest.mark.parametrize(("student", "teacher"), [("digits", "large"), ("large", "digits"), ("small", "large")])
def test_each_token_is_in_the_cell_of_what_it_begins_with(student: str, teacher: str) -> None:
    alignment = alignment_of(student, teacher)
    shared = alignment.shared_tokens
    of_cell = {int(shared.teacher.cell[j]): alignment.teacher.of[j] for j in alignment.shared.values()}
    for side, tokens in ((shared.student, alignment.student), (shared.teacher, alignment.teacher)):
        for i, cell in enumerate(side.cell.tolist()):
            assert tokens.of[i].startswith(of_cell[cell])
    for side, tokens in ((shared.student, alignment.student), (shared.teacher, alignment.teacher)):
        ids = [i for i in range(tokens.size) if tokens.of[i].startswith(b" re")]
        (of_re,) = [i for i in ids if tokens.of[i] == b" re"] or [None]
        if of_re is not None:
            mask = side.begins_with(side.rank.new_tensor([of_re]))[0]
            assert mask.nonzero()[:, 0].tolist() == ids
    reached = shared.weights.sum(1)
    assert ((reached - 1).abs() < 1e-6).sum() >= len(alignment.shared)
