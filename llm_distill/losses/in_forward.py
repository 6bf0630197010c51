"""The loss inside the student's own forward, in place of its logits."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_distill.heads import LMHead, base_of, intercepted, keep_differentiable
from llm_distill.losses.objective import Objective
from llm_distill.models import HEAD, keep_rows, tapped
from llm_distill.rows import Positions
from llm_distill.signals import HiddenSignal, Signal

MODULES = "distillation_terms"
"""What the student calls the modules that terms of the objective train beside it."""


@dataclass
class LossRequest:
    """The positions of one batch and what the teacher says about them, on their way into the student's forward."""

    objective: Objective
    positions: Positions
    time: int
    """The length of the labels."""
    signal: Signal | None
    num_rows: Tensor | int | None
    written: Bool[Tensor, " rows"] | None = None
    """Whether the student wrote the text of each position."""
    exchange: Callable[[HiddenSignal], Signal] | None = None
    """Gives the signal for what the student itself says; see `Teacher.exchange`."""
    value: Tensor | None = None
    """The loss, which the forward leaves here, as it does `metrics`: its output may be cast, by FSDP2 to bfloat16."""
    metrics: dict[str, Float[Tensor, " rows"]] = field(default_factory=dict)

    def exact(self, loss: Tensor) -> Tensor:
        """The forward's loss, for its gradient, with the value that it had before an engine cast it."""
        assert self.value is not None, "the forward comes first"
        return self.value + (loss - loss.detach())


def add_loss_forward(model: nn.Module, head: LMHead) -> None:
    """Lets `model(**inputs, loss_request=LossRequest(...))` return `{"loss", "aux_loss"}`; else it is what it was.

    The loss is computed where the logits would be, inside the forward of the output projection: DDP, FSDP2 and ZeRO
    gather parameters and synchronise gradients in the hooks of the forwards that they wrapped, and a loss computed
    outside them trains on stale or partial gradients without a word. All else of the family's own forward (masks,
    router losses, checkpointing) runs as it is, and generation is unchanged. A `copy.deepcopy` of the model would run
    the original's weights: save and load it instead.
    """
    base: PreTrainedModel = base_of(model)
    original = base.forward
    for module in base.modules():
        keep_differentiable(module)

    @functools.wraps(original)
    def forward(self: PreTrainedModel, *args: Any, loss_request: LossRequest | None = None, **kwargs: Any) -> Any:
        if loss_request is None:
            return original(*args, **kwargs)

        request = loss_request
        losses: list[Tensor] = []

        def loss_in_place_of_logits(hidden: Float[Tensor, "batch time hidden"]) -> Tensor:
            kept = keep_rows(hidden, head, taps, request.positions, request.time)
            if request.exchange is not None:
                request.signal = request.exchange(HiddenSignal(kept.hidden.detach(), kept.head))
            loss, request.metrics = request.objective(
                kept,
                request.signal,
                request.positions,
                request.num_rows,
                getattr(self, MODULES, None),
                request.written,
            )
            losses.append(loss)
            return hidden[..., :0]

        needs = request.objective.student_needs if request.signal is not None else HEAD
        with intercepted(head.module, loss_in_place_of_logits), tapped(self, needs) as taps:
            outputs = original(*args, **kwargs)
        (loss,) = losses  # LMHead.of has seen that the projection is called
        request.value = loss.detach()
        # The empty logits add nothing but an edge: the projection's own backward hooks (which gather and reduce its
        # weight) run before the loss's.
        loss = loss + outputs.logits.sum().to(loss)
        return {"loss": loss, "aux_loss": getattr(outputs, "aux_loss", None)}

    base.forward = MethodType(forward, base)
