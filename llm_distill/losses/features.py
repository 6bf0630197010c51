"""Hidden states of the student beside the teacher's (FitNets, arXiv:1412.6550; the cosine is DistilBERT's,
arXiv:1910.01108; dimensions chosen by gradient are Flex-KD's, arXiv:2507.10155).

A deviation from Flex-KD, which correlates each dimension over a batch: the distance is that of each token, so that it
does not depend on what else is in the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_distill.divergences import ForwardKL
from llm_distill.losses.fused import fused_head_loss
from llm_distill.losses.layers import LayerTerm, hidden_of, widen
from llm_distill.models import Kept
from llm_distill.rows import Positions
from llm_distill.signals import HiddenSignal


@dataclass(frozen=True)
class HiddenStates(LayerTerm):
    """How far hidden states of chosen layers are from the teacher's, a mean over the pairs of layers.

    Where the widths differ, a linear map without bias takes the student's to the teacher's (FitNets, eq. 3, has a
    regressor there). It learns with the student.

    Args:
        distance: `mse`, the squared error, a mean over the width; or `cosine`, 1 − the cosine, whatever the lengths.
        dimensions: `projected`, as above; or `by_gradient`: of what goes into the teacher's head, as many dimensions as
            the student has, those with the largest importance (see `add_importance`), and nothing is projected.
    """

    distance: str = "mse"
    dimensions: str = "projected"
    name: ClassVar[str] = "hidden"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of("distance", "mse", "cosine")
        self._require_one_of("dimensions", "projected", "by_gradient")
        if self.dimensions == "by_gradient" and self.layers != "head":
            raise ValueError("hidden: dimensions=by_gradient are of what goes into the head: give it layers=head.")

    def make_module(self, student: PreTrainedModel, width: int) -> nn.Module | None:
        """A projection for each pair of layers, where the widths differ, or which dimensions were chosen."""
        own_width = student.config.get_text_config().hidden_size
        if self.dimensions == "by_gradient":
            if own_width >= width:
                raise ValueError(
                    f"hidden: dimensions=by_gradient chooses among the teacher's {width}, and the student has "
                    f"{own_width}: leave it out."
                )
            return ChosenDimensions(own_width, width)
        if own_width == width:
            return None
        random = torch.Generator().manual_seed(0)  # the same on every rank
        projections = nn.ModuleDict()
        for layer in [0] if self.layers == "head" else self.layers:
            projection = nn.Linear(own_width, width, bias=False)
            nn.init.normal_(projection.weight, std=own_width**-0.5, generator=random)
            projections[str(layer)] = projection
        return projections

    def __call__(
        self, student: Kept, signal: HiddenSignal, positions: Positions, module: Any
    ) -> Float[Tensor, " rows"]:
        def distance(layer: int, target: int) -> Float[Tensor, " rows"]:
            ours, theirs = hidden_of(student, layer), widen(hidden_of(signal, target))
            if isinstance(module, ChosenDimensions):
                theirs = theirs[:, module.chosen]
            elif module is not None:
                projection = module[str(layer)]
                ours = projection(ours.to(projection.weight.dtype))
            if self.distance == "cosine":
                return 1 - nn.functional.cosine_similarity(widen(ours), theirs, dim=-1)
            return (widen(ours) - theirs).square().mean(-1)

        return self.mean_over_layers(distance)


class ChosenDimensions(nn.Module):
    """Which of the teacher's dimensions the student's are held to, in ascending order: the first, until `choose`."""

    chosen: Tensor

    def __init__(self, own_width: int, width: int) -> None:
        super().__init__()
        self.importance = torch.zeros(width, dtype=torch.float64)
        self.register_buffer("chosen", torch.arange(own_width))

    def add_importance(self, signal: HiddenSignal, targets: Int[Tensor, " rows"]) -> None:
        """Of each dimension Σ |hᵢ · ∂CE/∂hᵢ| over rows: how far the teacher's own cross-entropy would move without it,
        to first order.
        """
        with torch.enable_grad():
            hidden = signal.hidden.detach().requires_grad_()
            loss, _ = fused_head_loss(
                hidden, signal.head, None, ForwardKL(), kd_weight=0.0, ce_weight=1.0, targets=targets, num_rows=1
            )
            (gradient,) = torch.autograd.grad(loss, hidden)
        self.importance += (hidden.detach().double() * gradient.double()).abs().sum(0).cpu()

    def choose(self) -> None:
        """Raises ValueError if no row has told anything."""
        if not self.importance.any():
            raise ValueError(
                "hidden: dimensions=by_gradient are chosen on texts of the train dataset, and no token counts in them: "
                "train on texts, and not only on what the student will write."
            )
        best = self.importance.topk(len(self.chosen)).indices.sort().values
        self.chosen.copy_(best)
