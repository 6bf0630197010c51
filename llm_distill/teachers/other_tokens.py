"""A teacher with another tokenizer than the student's: it reads the same text in its own tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from llm_distill.alignment import Alignment
from llm_distill.divergences import Divergence
from llm_distill.models import HEAD, LanguageModel, Needs, require_same_ids
from llm_distill.probes import Collator
from llm_distill.rows import View
from llm_distill.signals import AlignedSignal, HiddenSignal, MixtureSignal
from llm_distill.teachers.base import Teacher


class OtherTokensTeacher(Teacher):
    """What a teacher says in its own tokens, beside the groups in which they are the student's."""

    def __init__(self, teacher: Teacher, tokenizer: PreTrainedTokenizerBase) -> None:
        """`tokenizer` is the teacher's."""
        self.teacher, self.tokenizer = teacher, tokenizer
        self.is_stored, self.width = teacher.is_stored, teacher.width
        self.reader: Any = teacher.reader

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        return self.teacher.models

    def summary(self) -> str:
        return f"{self.teacher.summary()}, in its own tokens ({len(self.tokenizer.get_vocab()):,})"

    def fit_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raises ValueError if tokens of one of them have no bytes; the teacher's own are always its own."""
        self.alignment = Alignment(tokenizer, self.tokenizer)
        self.teacher.fit_to(self.tokenizer)

    def check(self, divergence: Divergence, temperature: float) -> None:
        """Raises ValueError for a teacher that tells a part of its distribution."""
        if self.teacher.k is not None:
            raise ValueError(
                f"the teacher tells its top {self.teacher.k} tokens, and has another tokenizer: how likely the others "
                "are in the student's tokens is not known. Take a teacher in memory."
            )
        self.teacher.check(divergence, temperature)

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        self.teacher.prepare(accelerator, student)

    def require_documents_apart(self, collate: Collator, accelerator: Accelerator) -> None:
        raise ValueError(
            "the teacher has another tokenizer, and rows are packed: set packing and padding_free to False."
        )

    def score(self, view: View, needs: Needs = HEAD) -> AlignedSignal:
        assert view.groups is not None, "an `AlignedCollator` makes the batches"
        assert self.alignment is not None, "fit_to() comes first"
        signal = self.teacher.score(view, needs)
        assert isinstance(signal, HiddenSignal | MixtureSignal), "check() comes first"
        student_groups, groups = view.groups
        return AlignedSignal(signal, view.positions.targets, groups, student_groups, self.alignment.shared_tokens)

    def describe(self) -> dict[str, Any]:
        return self.teacher.describe()

    def update(self) -> None:
        self.teacher.update()

    def save_state(self, folder: Path) -> None:
        self.teacher.save_state(folder)

    def load_state(self, folder: Path) -> None:
        self.teacher.load_state(folder)

    def flush(self) -> None:
        self.teacher.flush()


def with_other_tokens(teacher: Teacher, tokenizer: PreTrainedTokenizerBase, method: str) -> Teacher:
    """The teacher, which reads its own tokens where `method` (teacher_alignment) is not none, and, if it is auto, where
    they are others than those of the student's `tokenizer`.

    Raises:
        ValueError: a method for a teacher whose tokenizer is not known, or for several with different ones.
    """
    owns = [model.tokenizer for model in teacher.models if model.tokenizer is not None]
    if method == "none" or teacher.is_student:
        return teacher
    if method == "auto" and not any(differ(own, tokenizer) for own in owns):
        return teacher
    if not owns:
        raise ValueError(
            f"teacher_alignment={method} needs the teacher's own tokenizer, and a {type(teacher).__name__} has none "
            "here. Take a teacher in memory, with its tokenizer beside its weights."
        )
    if any(differ(own, owns[0]) for own in owns[1:]):
        raise ValueError(
            "the teachers of an ensemble have different tokenizers, and their mixture is one over the same tokens: "
            "take teachers that share one, or distil from one after the other."
        )
    return OtherTokensTeacher(teacher, owns[0])


def differ(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> bool:
    """Whether a text has other ids for one than for the other."""
    try:
        require_same_ids(teacher, student)
    except ValueError:
        return True
    return False
