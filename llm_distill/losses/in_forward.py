"""A student whose forward returns the distillation loss in place of logits."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_distill.heads import LMHead, intercepted, keep_differentiable
from llm_distill.losses.objective import Objective
from llm_distill.rows import Rows
from llm_distill.signals import Signal


@dataclass
class Lesson:
    """The rows of one batch and what the teacher says about them, on their way into the student's forward."""

    objective: Objective
    rows: Rows
    time: int
    """The length of the labels. Hidden states may be longer, by the virtual tokens of a learned prompt in front."""
    signal: Signal | None
    num_rows: Tensor | int | None
    value: Tensor | None = None
    """The loss, which the forward leaves here, as it does `metrics`: its output may be cast, by FSDP2 to bfloat16."""
    metrics: dict[str, Float[Tensor, " rows"]] = field(default_factory=dict)

    def exact(self, loss: Tensor) -> Tensor:
        """The forward's loss, for its gradient, with the value that it had before an engine cast it."""
        assert self.value is not None, "the forward comes first"
        return self.value + (loss - loss.detach())


def add_lesson_forward(model: nn.Module, head: LMHead) -> None:
    """Lets `model(**inputs, lesson=Lesson(...))` return `{"loss", "aux_loss"}`; else it is what it was.

    The loss is computed where the logits would be, inside the forward of the output projection: DDP, FSDP2 and ZeRO
    gather parameters and synchronise gradients in the hooks of the forwards that they wrapped, and a loss computed
    outside them trains on stale or partial gradients without a word. All else of the family's own forward (masks,
    router losses, checkpointing) runs as it is, and generation is unchanged. A `copy.deepcopy` of the model would run
    the original's weights: save and load it instead.
    """
    base: PreTrainedModel = model.get_base_model() if isinstance(model, PeftModel) else model
    original = base.forward
    for module in base.modules():
        keep_differentiable(module)

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, lesson: Lesson | None = None, **kwargs: Any) -> Any:
        if lesson is None:
            return original(*args, **kwargs)

        loss: Tensor | None = None

        def loss_in_place_of_logits(hidden: Float[Tensor, "batch time hidden"]) -> Tensor:
            nonlocal loss
            hidden = hidden.to(lesson.rows.sample.device)  # a model spread over devices ends on another one
            taught = hidden[:, -lesson.time :][lesson.rows.sample, lesson.rows.position]
            loss, lesson.metrics = lesson.objective(taught, head, lesson.rows.targets, lesson.signal, lesson.num_rows)
            return hidden[..., :0]

        with intercepted(head.module, loss_in_place_of_logits):
            outputs = original(*args, **kwargs)
        assert loss is not None, "LMHead.of has seen that the projection is called"
        lesson.value = loss.detach()
        # The empty logits add nothing but an edge: the projection's own backward hooks (which gather and reduce its
        # weight) run before the loss's.
        loss = loss + outputs.logits.sum().to(loss)
        return {"loss": loss, "aux_loss": getattr(outputs, "aux_loss", None)}

    base.forward = MethodType(forward, base)
