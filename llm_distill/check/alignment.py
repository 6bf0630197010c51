"""How well two tokenizers go together: what `check` says of a teacher with other tokens than the student's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from llm_distill.alignment import NO_GROUP
from llm_distill.check.report import Finding
from llm_distill.data.other_tokens import AlignedCollator
from llm_distill.rows import IGNORED

FEW_ALIGNED = 0.5
"""A share of the tokens that count below which more is lost than taught."""
LONG_GROUPS = 4.0
"""Student tokens a group above which the teacher's distribution says little of most of them. A rule of thumb, as is the
one before."""
WAY_OUT = "train on the teacher's own text (llm-distill generate), which needs no common tokens"


def alignment_findings(collate: AlignedCollator, rows: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Of the vocabularies, and of some prepared rows of the student's, as far as the teacher can read them."""
    alignment = collate.alignment
    student, teacher = alignment.student, alignment.teacher
    shared = alignment.shared
    sizes, groups, aligned = np.zeros(2, dtype=np.int64), 0, 0
    ones = whole = texts = counted = known = 0
    for row in rows:
        labels = row.get("labels", row["input_ids"])
        text = collate.read(row, is_written=True)
        numbers = [number for number in text.groups if number != NO_GROUP]
        own = [number for number in text.student_groups if number != NO_GROUP]
        learned = [label for label in labels[1:] if label != IGNORED]
        per_group = [np.bincount(of, minlength=1) for of in (own, numbers)] if own else [np.zeros(0), np.zeros(0)]
        ones += int(((per_group[0] == 1) & (per_group[1] == 1)).sum())
        groups += len(per_group[0])
        sizes += [len(own), len(numbers)]
        texts, counted, aligned = texts + 1, counted + len(learned), aligned + len(own)
        known += sum(label in shared for label in learned)
        whole += len(own) >= len(learned) > 0
    special = ", ".join(
        f"{name} → {teacher.special[alignment.special[i]]}" if i in alignment.special else f"{name} → nothing"
        for i, name in sorted(student.special.items())[:8]
    )
    yield Finding(
        "green",
        "tokenizers",
        f"{len(shared) / student.size:.0%} of the student's {student.size:,} tokens are among the teacher's "
        f"{teacher.size:,}, and {known / max(counted, 1):.0%} of those in the data; special ones: {special or 'none'}",
    )
    if not groups:
        yield Finding("red", "alignment", f"nothing of {texts:,} texts aligns", WAY_OUT)
        return
    means = sizes / groups
    text_of_groups = (
        f"{whole / texts:.0%} of {texts:,} texts align as a whole, {aligned / max(counted, 1):.1%} of the tokens that "
        f"count; {means[0]:.2f} of the student's tokens and {means[1]:.2f} of the teacher's a group, "
        f"{ones / groups:.0%} of the groups one to one"
    )
    if aligned < FEW_ALIGNED * counted or means[0] > LONG_GROUPS:
        yield Finding("amber", "alignment", f"{text_of_groups}: too little for the teacher's distribution", WAY_OUT)
    else:
        yield Finding("green", "alignment", text_of_groups)
