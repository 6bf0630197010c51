"""Terms on what comes out of layers: the student's hidden states beside the teacher's (FitNets, arXiv:1412.6550)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_distill.models import Kept, LanguageModel, Needs, require_layers
from llm_distill.signals import HiddenSignal, Signal


@dataclass(frozen=True)
class HiddenStates:
    """Mean squared error between hidden states of chosen layers, a mean over the width and over the pairs of layers.

    Where the widths differ, a linear map without bias takes the student's to the teacher's (FitNets, eq. 3, has a
    regressor there). It learns with the student.

    Args:
        layers: {student's layer: teacher's layer}, counted from 1.
        weight: what the term is multiplied by.
    """

    layers: Mapping[int, int] = field(default_factory=dict)
    weight: float = 1.0
    name: str = field(default="hidden", init=False)

    def __post_init__(self) -> None:
        try:
            pairs = {int(student): int(teacher) for student, teacher in dict(self.layers).items()}
        except (TypeError, ValueError) as error:
            raise ValueError(f"hidden: layers is like {{4: 8}} (student's: teacher's), got {self.layers!r}.") from error
        if not pairs or min(*pairs, *pairs.values()) < 1:
            raise ValueError(
                f"hidden: layers needs pairs of layers counted from 1, such as {{4: 8}}, got {self.layers!r}."
            )
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"hidden: weight must be positive and finite, got {self.weight}.")
        object.__setattr__(self, "layers", pairs)

    @property
    def student_needs(self) -> Needs:
        return {"hidden": tuple(self.layers)}

    @property
    def teacher_needs(self) -> Needs:
        return {"hidden": tuple(self.layers.values())}

    def make_module(self, student: PreTrainedModel, teachers: Sequence[LanguageModel]) -> nn.Module | None:
        """A projection for each pair of layers, where the widths differ.

        Raises:
            ValueError: there is no such layer.
        """
        require_layers(student, self.layers)
        require_layers(teachers[0].model, self.layers.values())
        width, wanted = (model.config.get_text_config().hidden_size for model in (student, teachers[0].model))
        if width == wanted:
            return None
        random = torch.Generator().manual_seed(0)  # the same on every rank
        projections = nn.ModuleDict()
        for layer in self.layers:
            projection = nn.Linear(width, wanted, bias=False)
            nn.init.normal_(projection.weight, std=width**-0.5, generator=random)
            projections[str(layer)] = projection
        return projections

    def __call__(self, student: Kept, signal: Signal, module: Any) -> Float[Tensor, " rows"]:
        assert isinstance(signal, HiddenSignal), "Objective.require_served has seen to it"
        errors = []
        for layer, target in self.layers.items():
            student_states, teacher_states = student.layers[layer], signal.layers[target]
            if module is not None:
                projection = module[str(layer)]
                student_states = projection(student_states.to(projection.weight.dtype))
            dtype = torch.promote_types(student_states.dtype, torch.float32)
            errors.append((student_states.to(dtype) - teacher_states.to(dtype)).square().mean(-1))
        return torch.stack(errors).mean(0)
