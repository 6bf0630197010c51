"""Relational knowledge distillation: distances and angles between hidden states (arXiv:1904.05068).

A deviation from the paper: it relates the examples of a batch, and here the rows of one text are related. A loss over a
batch would depend on what else is in it: on the size of micro-batches and the number of ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from llm_distill.losses.layers import LayerTerm, hidden_of, over_texts, widen
from llm_distill.models import Kept
from llm_distill.rows import Positions, texts_of
from llm_distill.signals import HiddenSignal


@dataclass(frozen=True)
class RelationalKD(LayerTerm):
    """Huber losses of distances and angles between rows of a text, a mean over texts by their rows.

    Args:
        rows: as many rows of a text are related, evenly spaced. Angles are taken of all triples of them.
        distances: the weight of distances, each over their mean.
        angles: the weight of angles; twice that of distances, as in the paper.
    """

    layers: Any = "last"
    rows: int = 32
    distances: float = 1.0
    angles: float = 2.0
    name: ClassVar[str] = "rkd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.rows, int) and self.rows >= 3):
            raise ValueError(f"rkd: rows must be a number from 3, got {self.rows!r}.")
        weights = (self.distances, self.angles)
        if not all(isinstance(w, int | float) and 0 <= w < float("inf") for w in weights) or not any(weights):
            raise ValueError(f"rkd: distances and angles are weights, one of them positive, got {weights}.")

    def __call__(
        self, student: Kept, signal: HiddenSignal, positions: Positions, module: Any
    ) -> Float[Tensor, " rows"]:
        texts = texts_of(positions)

        def of_layers(layer: int, target: int) -> Float[Tensor, " rows"]:
            ours, theirs = hidden_of(student, layer), hidden_of(signal, target)
            return over_texts(lambda text: self._of_text(ours[text.rows], theirs[text.rows]), texts, student)

        return self.mean_over_layers(of_layers)

    def _of_text(
        self, student: Float[Tensor, "rows width"], teacher: Float[Tensor, "rows width_t"]
    ) -> Float[Tensor, " rows"]:
        """The same for each row of the text."""
        count = len(student)
        drawn = torch.linspace(0, count - 1, min(count, self.rows)).round().long().unique().to(student.device)
        ours, theirs = widen(student)[drawn], widen(teacher)[drawn]
        value = ours.new_zeros(())
        if self.distances and len(drawn) > 1:
            value = value + self.distances * nn.functional.smooth_l1_loss(distances(ours), distances(theirs))
        if self.angles and len(drawn) > 2:
            value = value + self.angles * nn.functional.smooth_l1_loss(angles(ours), angles(theirs))
        return value.expand(count)


def distances(states: Float[Tensor, "rows width"]) -> Float[Tensor, " pairs"]:
    """Between all pairs, over their mean."""
    first, second = torch.triu_indices(len(states), len(states), offset=1, device=states.device)
    lengths = (states[first] - states[second]).norm(dim=-1)
    return lengths / lengths.mean().clamp(min=torch.finfo(lengths.dtype).tiny)


def angles(states: Float[Tensor, "rows width"]) -> Float[Tensor, " triples"]:
    """The cosine at each row between the ways to two others."""
    ways = nn.functional.normalize(states[None] - states[:, None], dim=-1)
    cosines = ways @ ways.transpose(1, 2)  # [at, one, other]
    number = torch.arange(len(states), device=states.device)
    at, one, other = number[:, None, None], number[:, None], number
    return cosines[(at != one) & (at != other) & (one < other)]
