"""A teacher that is the student without its adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase

from llm_distill.heads import LMHead
from llm_distill.models import HEAD, LAYERS, Needs, describe_model, kept_in_evaluation, vocabulary_size
from llm_distill.rows import View
from llm_distill.signals import HiddenSignal
from llm_distill.teachers.base import Teacher


class AdaptersOffTeacher(Teacher):
    """The student's own base model, its LoRA adapters switched off: a second model for the memory of none.

    It teaches to stay what it was: with `ce_weight` for the new data, the divergence is the price of forgetting.
    """

    can = frozenset({"head"}) | LAYERS
    is_student = True

    def __init__(self) -> None:
        self._student: PeftModel | None = None
        self._head: LMHead | None = None
        self._vocab_size: int | None = None

    def fit_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._vocab_size = vocabulary_size(tokenizer)

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        if not isinstance(student, PeftModel):
            raise ValueError(
                "teacher_adapters_off needs a student with adapters (peft_config=... or --use_peft): without them the "
                "teacher would be the student itself, and there is nothing to learn from it."
            )
        self._student = student
        with _adapters_off(student):
            self._head = LMHead.of(student, self._vocab_size)

    def score(self, view: View, needs: Needs = HEAD) -> HiddenSignal:
        assert self._student is not None, "prepare() comes first"
        assert self._head is not None, "prepare() comes first"
        with _adapters_off(self._student):
            return HiddenSignal(*kept_in_evaluation(self._student, self._head, view, needs))

    def summary(self) -> str:
        return "the student's own base, without its adapters"

    def describe(self) -> dict[str, Any]:
        assert self._student is not None, "prepare() comes first"
        return describe_model(self._student.get_base_model(), None) | {"adapters": "off"}


@contextmanager
def _adapters_off(student: PeftModel) -> Iterator[None]:
    """PEFT's own switch, which on the way back would make every active adapter trainable: frozen ones stay so."""
    trained = [(weight, weight.requires_grad) for weight in student.parameters()]
    try:
        with student.disable_adapter():
            yield
    finally:
        for weight, is_trained in trained:
            weight.requires_grad_(is_trained)
