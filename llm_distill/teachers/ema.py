"""A teacher that is the exponential average of its student over the steps (mean teachers, arXiv:1703.01780)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llm_distill.heads import LMHead, base_of
from llm_distill.models import HEAD, LAYERS, Needs, describe_model, kept_in_evaluation, vocabulary_size
from llm_distill.ranks import SHARDED
from llm_distill.rows import View
from llm_distill.signals import HiddenSignal
from llm_distill.teachers.base import Teacher

FILE = "ema_teacher.safetensors"


class EMATeacher(Teacher):
    """After each optimizer step, average = decay · average + (1 − decay) · student, from its first weights on.

    Only the weights that are trained have an average, in float32 at least: with LoRA, that is one of the adapters. To
    read, the student takes them for the while, so that there is no second model.

    Args:
        decay: from 0 (the student as it was after the last step) to 1 (as it was before the first).
    """

    can = frozenset({"head"}) | LAYERS
    is_student = True

    def __init__(self, decay: float) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"teacher_ema_decay must be from 0 to 1, got {decay}.")
        self.decay = decay
        self._student: nn.Module | None = None
        self._head: LMHead | None = None
        self._averages: dict[str, Tensor] = {}
        self._vocab_size: int | None = None

    def fit_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._vocab_size = vocabulary_size(tokenizer)

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        if accelerator.distributed_type in SHARDED:
            raise ValueError("teacher_ema_decay does not go with sharded students (FSDP, DeepSpeed): use DDP.")
        self._student = student
        self._head = LMHead.of(student, self._vocab_size)
        self._averages = {
            name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
            for name, weight in student.named_parameters()
            if weight.requires_grad
        }

    @torch.no_grad()
    def update(self) -> None:
        for weight, average in self._pairs():
            average.lerp_(weight.to(average), 1 - self.decay)

    @torch.no_grad()
    def score(self, view: View, needs: Needs = HEAD) -> HiddenSignal:
        assert self._student is not None, "prepare() comes first"
        assert self._head is not None, "prepare() comes first"
        with self._averages_in_place():
            kept = kept_in_evaluation(self._student, self._head, view, needs)
            return HiddenSignal(kept.hidden, replace(self._head, module=_as_it_is(self._head.module)), kept.layers)

    def save_state(self, folder: Path) -> None:
        save_file({name: average.contiguous() for name, average in self._averages.items()}, folder / FILE)

    def load_state(self, folder: Path) -> None:
        if not (folder / FILE).is_file():
            raise ValueError(f"{folder} has no {FILE}: it is a checkpoint of a run without teacher_ema_decay.")
        for name, average in load_file(folder / FILE).items():
            self._averages[name].copy_(average)

    def summary(self) -> str:
        return f"the student's own average over its steps (decay {self.decay})"

    def describe(self) -> dict[str, Any]:
        assert self._student is not None, "prepare() comes first"
        return describe_model(base_of(self._student), None) | {"ema_decay": self.decay}

    def _pairs(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        assert self._student is not None, "prepare() comes first"
        for name, average in self._averages.items():
            yield self._student.get_parameter(name), average

    @contextmanager
    def _averages_in_place(self) -> Iterator[None]:
        students = [(weight, weight.data) for weight, _ in self._pairs()]
        for weight, average in self._pairs():
            weight.data = average.to(weight.dtype)
        try:
            yield
        finally:
            for weight, own in students:
                weight.data = own


def _as_it_is(projection: nn.Linear) -> nn.Linear:
    """The same module with the weights that it has now, whatever it has later."""
    if not any(parameter.requires_grad for parameter in projection.parameters()):
        return projection
    copy = nn.Linear(projection.in_features, projection.out_features, projection.bias is not None, device="meta")
    for name, parameter in projection.named_parameters():
        setattr(copy, name, nn.Parameter(parameter.detach(), requires_grad=False))
    return copy
