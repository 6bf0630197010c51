"""Several teachers as one: the mixture of their distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from llm_distill.divergences import Divergence
from llm_distill.models import HEAD, LanguageModel, Needs
from llm_distill.probes import Collator
from llm_distill.rows import View
from llm_distill.signals import HiddenSignal, MixtureSignal
from llm_distill.teachers.base import Teacher


class EnsembleTeacher(Teacher):
    """p = Σ wᵢ pᵢ over teachers that share a tokenizer and give hidden states."""

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float] | None = None) -> None:
        """`weights` default to equal ones; others are taken relative to their sum.

        Raises:
            ValueError: no teacher, a weight that is not positive and finite, or another number of weights than of
                teachers.
        """
        weights = [1.0] * len(teachers) if weights is None else list(weights)
        if not teachers or len(weights) != len(teachers) or not all(0 < weight < math.inf for weight in weights):
            raise ValueError(f"{len(teachers)} teachers need as many positive, finite weights, got {weights}.")
        self.teachers = tuple(teachers)
        self.weights = tuple(weight / sum(weights) for weight in weights)

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        return tuple(model for teacher in self.teachers for model in teacher.models)

    def score(self, view: View, needs: Needs = HEAD) -> MixtureSignal:
        signals = []
        for teacher in self.teachers:
            signal = teacher.score(view)
            if not isinstance(signal, HiddenSignal):
                raise TypeError(f"an ensemble mixes full distributions; {type(teacher).__name__} gave {type(signal)}.")
            signals.append(signal)
        return MixtureSignal(tuple(signals), self.weights)

    def describe(self) -> dict[str, Any]:
        return {"ensemble": [teacher.describe() for teacher in self.teachers], "weights": list(self.weights)}

    def check(self, divergence: Divergence, temperature: float) -> None:
        for teacher in self.teachers:
            if teacher.k is not None:
                raise ValueError(f"an ensemble mixes full distributions, and a {type(teacher).__name__} has its top k.")
            teacher.check(divergence, temperature)

    def fit_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        for teacher in self.teachers:
            teacher.fit_to(tokenizer)

    @property
    def max_length(self) -> int | None:
        return min((limit for teacher in self.teachers if (limit := teacher.max_length)), default=None)

    def require_documents_apart(self, collate: Collator, accelerator: Accelerator) -> None:
        for teacher in self.teachers:
            teacher.require_documents_apart(collate, accelerator)

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        for teacher in self.teachers:
            teacher.prepare(accelerator, student)
