"""Hidden states of the student beside the teacher's (FitNets, arXiv:1412.6550; the cosine is DistilBERT's,
arXiv:1910.01108).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

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
    """

    distance: str = "mse"
    name: ClassVar[str] = "hidden"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of("distance", "mse", "cosine")

    def make_module(self, student: PreTrainedModel, width: int) -> nn.Module | None:
        """A projection for each pair of layers, where the widths differ."""
        own_width = student.config.get_text_config().hidden_size
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
            if module is not None:
                projection = module[str(layer)]
                ours = projection(ours.to(projection.weight.dtype))
            if self.distance == "cosine":
                return 1 - nn.functional.cosine_similarity(widen(ours), theirs, dim=-1)
            return (widen(ours) - theirs).square().mean(-1)

        return self.mean_over_layers(distance)
