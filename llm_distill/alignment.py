"""One text in the tokens of two tokenizers, aligned by its bytes.

A group is the shortest run of student tokens and of teacher tokens that end at the same byte: what both models say of a
group, they say of the same text after the same text. Nothing is aligned by position or by strings that were decoded.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from llm_distill.models import TEXTS, vocabulary_size
from llm_distill.rows import IGNORED
from llm_distill.signals import SharedTokens, Vocabulary

NO_GROUP = NOWHERE = -1
MOST_PIECES = 4
"""Of a token, in the other's tokens."""
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")
SENTENCEPIECE_SPACE = "▁"


class TokenBytes:
    """The bytes of each token of a tokenizer, whichever way its vocabulary spells them.

    Raises:
        ValueError: a kind that spells them in no known way, or that changes plain text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, role: str) -> None:
        self.tokenizer, self.role, self.size = tokenizer, role, vocabulary_size(tokenizer)
        self.spelling = _spelling_of(tokenizer, role)
        self.special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special |= {i: tokenizer.convert_ids_to_tokens(i) for i in tokenizer.all_special_ids}
        self.of: list[bytes] = [b""] * (max(tokenizer.get_vocab().values()) + 1)
        """By id; nothing of special tokens."""
        added = tokenizer.added_tokens_decoder
        for token, i in tokenizer.get_vocab().items():
            if i not in self.special:
                self.of[i] = str(token).encode() if i in added else self._bytes_of(token)
        if self.encode(TEXTS[0]) is None:
            raise ValueError(
                f"the {role}'s tokenizer ({type(tokenizer).__name__}) changes a plain text before it cuts it into "
                f"tokens, so that its tokens have other bytes: {TEXTS[0][:40]!r} becomes "
                f"{self.text_of(self._ids(TEXTS[0]))[:40]!r}. Distil from the teacher's text instead (sequence-level "
                "distillation)."
            )

    def _bytes_of(self, token: str) -> bytes:
        if self.spelling == "bytes":
            return bytes(BYTE_OF[letter] for letter in token) if {*token} <= BYTE_OF.keys() else token.encode()
        if is_byte := BYTE_TOKEN.fullmatch(token):
            return bytes([int(is_byte[1], 16)])
        return token.replace(SENTENCEPIECE_SPACE, " ").encode()

    def text_of(self, ids: Sequence[int]) -> str:
        return b"".join(self.of[i] for i in ids).decode(errors="replace")

    def _ids(self, texts: str | list[str]) -> list[Any]:
        """Of a text that has the name of a special token in it, its letters."""
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    @cached_property
    def puts_space(self) -> bool:
        """Whether it puts a space before a text."""
        return b"".join(self.of[i] for i in self._ids("a")) == b" a"

    def encode(self, text: str) -> tuple[list[int], np.ndarray] | None:
        """The tokens of a text and the byte at which each ends, without a space that was put before it; None where they
        spell another text.
        """
        ids, data = self._ids(text), text.encode()
        ends = np.cumsum([len(self.of[i]) for i in ids], dtype=np.int64)
        spelt = b"".join(self.of[i] for i in ids)
        if spelt == b" " + data:
            ends = np.maximum(ends - 1, 0)
        elif spelt != data:
            return None
        return ids, ends

    @cached_property
    def begins_with(self) -> int | None:
        """The token that this tokenizer puts before every text, if it does."""
        ids = self.tokenizer("a")["input_ids"]
        return ids[0] if ids and ids[0] in self.special else None


def _spelling_of(tokenizer: PreTrainedTokenizerBase, role: str) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        parts = json.loads(backend.to_str())
        kinds = {kind for part in ("decoder", "pre_tokenizer") for kind in _kinds(parts[part])}
        if "ByteLevel" in kinds:
            return "bytes"
        if kinds & {"Metaspace", "ByteFallback"}:
            return "sentencepiece"
    raise ValueError(
        f"the {role}'s tokenizer ({type(tokenizer).__name__}) is neither byte-level nor like SentencePiece, so it does "
        "not tell the bytes of its tokens, and no other tokenizer can be aligned with it. Distil from the teacher's "
        "text instead (sequence-level distillation)."
    )


def _kinds(part: Any) -> set[str]:
    """The types in a part of a `tokenizer.json`, however deep."""
    if isinstance(part, list):
        return set().union(*map(_kinds, part)) if part else set()
    if not isinstance(part, dict):
        return set()
    return ({part["type"]} if "type" in part else set()) | _kinds(list(part.values()))


def _byte_alphabet() -> dict[str, int]:
    """The letter by which byte-level BPE spells each byte (GPT-2's): printable ones as they are, others from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


BYTE_OF = _byte_alphabet()


class AlignedText(NamedTuple):
    """What the teacher reads of a student's row."""

    ids: list[int]
    labels: list[int]
    """IGNORED for all tokens that are in no group that counts."""
    groups: list[int]
    """Of each of the teacher's tokens; NO_GROUP where it is in none that counts."""
    student_groups: list[int]
    """The same of the student's, which count in the same groups."""


class Alignment:
    """What is known of two tokenizers: which tokens are the same, and how each cuts the other's.

    Args:
        student: its tokenizer.
        teacher: its tokenizer.

    Raises:
        ValueError: one of them does not tell the bytes of its tokens, or changes plain text.
    """

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> None:
        self.student, self.teacher = TokenBytes(student, "student"), TokenBytes(teacher, "teacher")
        self.special: dict[int, int] = self._map_special()
        """The teacher's token in the place of a special one of the student's, by role: the end of a text is the end of
        a text, whatever it is called; others are those of the same name."""

    def _map_special(self) -> dict[int, int]:
        student, teacher = self.student.tokenizer, self.teacher.tokenizer
        named = {name: i for i, name in self.teacher.special.items()}
        mapped = {i: named[name] for i, name in self.student.special.items() if name in named}
        if student.eos_token_id is not None and teacher.eos_token_id is not None:
            mapped[student.eos_token_id] = teacher.eos_token_id
        return mapped

    def align(self, ids: Sequence[int], labels: Sequence[int]) -> AlignedText:
        """What the teacher reads of a row of the student's, and how the tokens of both are grouped.

        A group counts where all its student tokens count and both sides have something before it.
        """
        ends, data, pieces = self._cut(ids)
        begins_with = self.teacher.begins_with
        teacher_ids = [] if begins_with is None else [begins_with]
        teacher_ends = [NOWHERE] * len(teacher_ids)
        is_broken: list[tuple[int, int]] = []
        for start, stop, special in pieces:
            if special is not None:
                teacher_ids.append(special)
                teacher_ends.append(stop)
                continue
            text, broken = _readable(data[start:stop])
            encoded = self.teacher.encode(text)
            if encoded is None:  # a normaliser has changed it
                own = self.teacher._ids(text)
                encoded = own, np.full(len(own), stop - start, dtype=np.int64)
                broken = [(0, stop - start)]
            own, own_ends = encoded
            teacher_ids += own
            teacher_ends += (start + own_ends).tolist()
            is_broken += [(start + first, start + last) for first, last in broken]
        return self.group(labels, ends, teacher_ids, np.array(teacher_ends, dtype=np.int64), is_broken)

    def _cut(self, ids: Sequence[int]) -> tuple[np.ndarray, bytes, list[tuple[int, int, int | None]]]:
        """The byte at which each token ends, the bytes, and their pieces: (first, end, the teacher's special token).

        A special token takes one byte. One that the teacher lacks, or has put there itself, ends NOWHERE. The space
        that SentencePiece puts before a text is not the text's.
        """
        data, ends, pieces, start = bytearray(), list[int](), list[tuple[int, int, int | None]](), 0
        has_space_before = self.student.puts_space
        for place, i in enumerate(ids):
            if i not in self.student.special:
                own = self.student.of[i]
                data += own.removeprefix(b" ") if has_space_before else own
                has_space_before = False
                ends.append(len(data))
                continue
            if len(data) > start:
                pieces.append((start, len(data), None))
            start, special = len(data), self.special.get(i)
            if special is None or (place == 0 and special == self.teacher.begins_with):
                ends.append(NOWHERE)
                continue
            data.append(0)
            pieces.append((start, start + 1, special))
            start += 1
            ends.append(start)
        if len(data) > start:
            pieces.append((start, len(data), None))
        return np.array(ends, dtype=np.int64), bytes(data), pieces

    def group(
        self,
        labels: Sequence[int],
        ends: np.ndarray,
        teacher_ids: list[int],
        teacher_ends: np.ndarray,
        broken: list[tuple[int, int]],
    ) -> AlignedText:
        """Tokens of both, of which the byte is known at which each ends: NOWHERE for those that are in no group.

        Args:
            labels: the student's.
            broken: bytes, from the first to the one after the last, whose groups do not count.
        """
        boundaries = np.intersect1d(ends, teacher_ends)
        boundaries = boundaries[boundaries > 0]
        counts = np.ones(len(boundaries) + 1, dtype=bool)
        counts[-1] = False  # what is after the last common end, and what is nowhere
        groups, teacher_groups = (
            np.where(of == NOWHERE, len(boundaries), np.searchsorted(boundaries, of, side="left"))
            for of in (ends, teacher_ends)
        )
        counts[groups[np.array(labels, dtype=np.int64) == IGNORED]] = False
        for of in (groups, teacher_groups):
            counts[of[:1]] = False  # nothing is before it
        starts = np.concatenate([[0], boundaries])
        for first, last in broken:
            counts[np.searchsorted(boundaries, first, side="right") : np.searchsorted(starts, last, side="left")] = (
                False
            )
        number = np.where(counts, np.cumsum(counts) - 1, NO_GROUP)
        teacher_numbers = number[teacher_groups]
        masked = np.where(teacher_numbers == NO_GROUP, IGNORED, teacher_ids)
        return AlignedText(teacher_ids, masked.tolist(), teacher_numbers.tolist(), number[groups].tolist())

    @cached_property
    def shared(self) -> dict[int, int]:
        """The teacher's token of the same bytes, or of the same role, for each student token that has one."""
        of_bytes = {data: i for i, data in reversed([*enumerate(self.teacher.of)]) if data and i < self.teacher.size}
        same = {i: of_bytes[data] for i, data in enumerate(self.student.of) if data in of_bytes}
        same |= {i: j for i, j in self.special.items() if j < self.teacher.size}
        return {i: j for i, j in same.items() if i < self.student.size}

    @cached_property
    def shared_tokens(self) -> SharedTokens:
        """For the losses: cells of tokens, and what the teacher makes of each of the student's.

        Each token that both have is a cell. A token that only one has is in the cell of the first token into which the
        other cuts it; part of a letter, which cannot be cut, in that of the longest shared token with which it begins.
        """
        cell_of_teacher = {j: number for number, j in enumerate(sorted({*self.shared.values()}))}
        of_bytes = {self.teacher.of[j]: cell for j, cell in cell_of_teacher.items() if self.teacher.of[j]}
        known: list[dict[int, int]] = [{i: cell_of_teacher[j] for i, j in self.shared.items()}, cell_of_teacher]
        cuts = (_Cut(self.student, self.teacher), _Cut(self.teacher, self.student))
        nowhere = len(cell_of_teacher)

        def cell_of(side: int, token: int) -> int:
            if token not in known[side]:
                data, cut = cuts[side].own.of[token], cuts[side]
                first = next((cut.other.of[i] for i in cut.pieces(token)), b"")
                if data in of_bytes:
                    cell = of_bytes[data]
                elif 0 < len(first) < len(data):
                    cell = cell_of(1 - side, cut.pieces(token)[0])
                else:
                    starts = (data[:length] for length in range(len(data) - 1, 0, -1))
                    cell = next((of_bytes[start] for start in starts if start in of_bytes), nowhere)
                known[side][token] = cell
            return known[side][token]

        student, teacher = (
            Vocabulary(torch.tensor([cell_of(side, i) for i in range(cut.own.size)]), *_ranges(cut.own))
            for side, cut in enumerate(cuts)
        )
        return SharedTokens(student, teacher, nowhere + 1, *self._projection(cuts[0]))

    def _projection(self, cut: _Cut) -> tuple[torch.Tensor, torch.Tensor]:
        """All of a student token's probability goes to the same token, otherwise to the first MOST_PIECES of those into
        which the teacher cuts it, half as much to each as to the one before it.
        """
        ids = torch.zeros(self.student.size, MOST_PIECES, dtype=torch.long)
        weights = torch.zeros(self.student.size, MOST_PIECES)
        for token in range(self.student.size):
            same = self.shared.get(token)
            if pieces := [same] if same is not None else cut.pieces(token)[:MOST_PIECES]:
                halves = 0.5 ** torch.arange(len(pieces))
                ids[token, : len(pieces)] = torch.tensor(pieces)
                weights[token, : len(pieces)] = halves / halves.sum()
        return ids, weights


def _ranges(tokens: TokenBytes) -> tuple[torch.Tensor, torch.Tensor]:
    """The place of each token in the order of their bytes, and that after the last which begins with them; special
    tokens, which have none, come last and begin nothing.
    """
    data = tokens.of[: tokens.size]
    order = sorted(range(tokens.size), key=lambda i: (not data[i], data[i]))
    spelt = [data[i] for i in order if data[i]]
    rank = torch.empty(tokens.size, dtype=torch.long)
    rank[torch.tensor(order)] = torch.arange(tokens.size)
    longest = max(map(len, spelt), default=0)
    end = rank + 1
    for i, own in enumerate(data):
        if own:
            end[i] = bisect.bisect_right(spelt, own + b"\xff" * longest)
            rank[i] = bisect.bisect_left(spelt, own)
    return rank, end


class _Cut:
    """How one tokenizer cuts the tokens of another."""

    def __init__(self, own: TokenBytes, other: TokenBytes) -> None:
        self.own, self.other = own, other
        texts: dict[int, str] = {}
        for token, data in enumerate(own.of[: own.size]):
            try:
                if data:
                    texts[token] = data.decode()
            except UnicodeDecodeError:
                continue
        before = "\n" if other.puts_space else ""  # a token within a text has no space put before it
        self._begins = b" \n" if other.puts_space else b""
        encoded = other._ids([before + text for text in texts.values()])
        self._pieces = dict(zip(texts, encoded, strict=True))

    def pieces(self, token: int) -> list[int]:
        """The other's tokens of a token's bytes; none where they spell others."""
        pieces, spelt = self._pieces.get(token, []), b""
        for place, i in enumerate(pieces):
            if spelt == self._begins:
                rest = pieces[place:]
                is_same = b"".join(self.other.of[piece] for piece in rest) == self.own.of[token]
                return rest if is_same and max(rest) < self.other.size else []
            spelt += self.other.of[i]
        return []


def _readable(data: bytes) -> tuple[str, list[tuple[int, int]]]:
    """A text of as many bytes, and where it stands for bytes that are no letters."""
    broken: list[tuple[int, int]] = []
    readable = bytearray(data)
    while True:
        try:
            return bytes(readable).decode(), broken
        except UnicodeDecodeError as error:
            readable[error.start : error.end] = b"?" * (error.end - error.start)
            broken.append((error.start, error.end))
