"""Conversations for a teacher with another tokenizer: each side reads them in its own chat template.

Only the answers are aligned, by their bytes, and the ends of turns, by their role: `<|im_end|>` of one is `<|eot_id|>`
of the other. All else is context, which each side reads in the form that it was trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llm_distill.alignment import NO_GROUP, NOWHERE, AlignedText, Alignment, TokenBytes
from llm_distill.data.teacher_view import IDS, LABELS, MisfitError
from llm_distill.rows import IGNORED

SHOWN = 60
"""Letters of an answer in a message."""
END = b"\0"
"""In the bytes of an answer, where its turn ends."""


class Answer(NamedTuple):
    """What a side reads of an answer: its tokens, from the first that is learned to the last in a row."""

    places: slice
    """In the text."""
    ends: np.ndarray
    """The byte at which each token ends, [tokens]."""
    data: bytes
    """With END, and what the template puts after it."""
    length: int
    """Of the answer alone, in bytes."""
    special: set[tuple[int, int]]
    """The bytes of special tokens in it, which are spelt by their names."""
    end: int | None
    """The token that ends the turn; None if the template has none, or the text was cut before it."""

    @property
    def text(self) -> bytes:
        """Without the space around it, which may be the template's."""
        return self.data[: self.length].strip()

    @property
    def space_before(self) -> bytes:
        return self.data[: len(self.data) - len(self.data.lstrip())]


def answers_of(ids: Sequence[int], labels: Sequence[int], tokens: TokenBytes) -> list[Answer]:
    """The answers of a text in which `labels` say what is learned."""
    counts = np.array([IGNORED, *labels, IGNORED]) != IGNORED
    edges = np.flatnonzero(counts[1:] != counts[:-1])
    return [_answer(ids, slice(first, last), tokens) for first, last in zip(edges[::2], edges[1::2], strict=True)]


def _answer(ids: Sequence[int], places: slice, tokens: TokenBytes) -> Answer:
    own = ids[places]
    last = max((place for place, i in enumerate(own) if i in tokens.special), default=None)
    if last is not None and b"".join(tokens.of[i] for i in own[last + 1 :]).strip():
        last = None  # the answer goes on after it
    spelt = [tokens.special[i].encode() if i in tokens.special else tokens.of[i] for i in own]
    if last is not None:
        spelt[last] = END
    ends = np.cumsum([len(data) for data in spelt], dtype=np.int64)
    special = {
        (int(ends[place]) - len(spelt[place]), int(ends[place]))
        for place, i in enumerate(own)
        if i in tokens.special and place != last
    }
    length = int(ends[-1] if last is None else ends[last] - 1)
    return Answer(places, ends, b"".join(spelt), length, special, None if last is None else own[last])


def map_ends(alignment: Alignment, rows: Iterable[Mapping[str, Any]]) -> None:
    """Makes the ends of turns in some prepared rows the same token for both sides, in the place of other roles."""
    pairs: dict[int, int] = {}
    for row in rows:
        if row.get(IDS) is None:
            continue
        own = answers_of(row["input_ids"], row["labels"], alignment.student)
        read = answers_of(row[IDS], row[LABELS], alignment.teacher)
        for student, teacher in zip(own, read, strict=False):
            if student.end is not None and teacher.end is not None:
                pairs.setdefault(student.end, teacher.end)
    others = {i: j for i, j in alignment.special.items() if j not in pairs.values()}
    alignment.special = others | pairs


def align_answers(
    alignment: Alignment, ids: Sequence[int], labels: Sequence[int], read_ids: Sequence[int], read: Sequence[int]
) -> AlignedText:
    """How the tokens of the answers are grouped, where each side has its own form of all else.

    Args:
        ids: of the student's row, and `labels`, which say where its answers are; `max_length` may have cut them.
        read_ids: of what the teacher reads, and `read`, its labels.

    Raises:
        MisfitError: the answers are others.
    """
    own, teachers = answers_of(ids, labels, alignment.student), answers_of(read_ids, read, alignment.teacher)
    if len(own) > len(teachers):
        raise MisfitError(
            f"the student learns {len(own)} answers, and the teacher's chat template marks {len(teachers)}. Give a "
            "teacher_chat_template that marks each ({% generation %}), or rows of prompt and completion."
        )
    groups, teacher_groups = np.full(len(ids), NO_GROUP), np.full(len(read_ids), NO_GROUP)
    for number, (student, teacher) in enumerate(zip(own, teachers, strict=False)):
        if student.text != teacher.text:
            is_cut = number == len(own) - 1 and student.end is None and teacher.text.startswith(student.text)
            if not is_cut:
                raise _other_answers(student.text, teacher.text)
        ends, teacher_ends = np.full(len(ids), NOWHERE), np.full(len(read_ids), NOWHERE)
        ends[student.places], teacher_ends[teacher.places], broken = _common_ends(alignment, student, teacher)
        text = alignment.group(labels, ends, list(read_ids), teacher_ends, broken)
        first = groups.max(initial=NO_GROUP) + 1
        for of, part in ((groups, np.array(text.student_groups)), (teacher_groups, np.array(text.groups))):
            of[part != NO_GROUP] = part[part != NO_GROUP] + first
    masked = np.where(teacher_groups == NO_GROUP, IGNORED, read_ids)
    return AlignedText(list(read_ids), masked.tolist(), teacher_groups.tolist(), groups.tolist())


def _common_ends(
    alignment: Alignment, student: Answer, teacher: Answer
) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """The byte at which each token of either side ends in what both have, otherwise NOWHERE, and bytes that are not to
    be compared.

    Where the space around an answer differs, it is context. A token that has some of it and some of the answer is not
    compared, nor is the end of a turn after other space.
    """
    sides = (student, teacher)
    is_same_space = student.space_before == teacher.space_before
    starts = [0 if is_same_space else len(side.space_before) for side in sides]
    is_same_end = student.end is not None and alignment.special.get(student.end) == teacher.end
    stops = [None if is_same_end else side.length for side in sides]
    common = [side.data[start:stop] for side, start, stop in zip(sides, starts, stops, strict=True)]
    pairs = enumerate(zip(*common, strict=False))
    length = next((place for place, (a, b) in pairs if a != b), min(map(len, common)))
    ends, special, broken = list[np.ndarray](), list[set[tuple[int, int]]](), list[tuple[int, int]]()
    for side, start in zip(sides, starts, strict=True):
        own = side.ends - start
        ends.append(np.where((own > 0) & (own <= length), own, NOWHERE))
        special.append({(first - start, last - start) for first, last in side.special})
        if start and start not in side.ends:
            broken.append((0, 1))
    return ends[0], ends[1], broken + sorted(special[0] ^ special[1])


def _other_answers(student: bytes, teacher: bytes) -> MisfitError:
    shown = [text[: 4 * SHOWN].decode(errors="replace")[:SHOWN] for text in (student, teacher)]
    return MisfitError(
        f"the student learns the answer {shown[0]!r}, and the teacher would read {shown[1]!r}: its chat template must "
        "not change what is answered. Give another one as teacher_chat_template, or leave such rows out."
    )
