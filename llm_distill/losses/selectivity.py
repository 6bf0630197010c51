"""Neuron selectivity transfer: which tokens neurons react to, as a distribution over neurons (arXiv:1707.01219).

A neuron is what its activations over the tokens of a text are, at length 1. The squared maximum mean discrepancy of the
student's neurons and the teacher's, with the paper's polynomial kernel (a · b)², is ‖Gs/Cs − Gt/Ct‖² of the Gram
matrices G over tokens, so that the widths C may differ and nothing is projected.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn

from llm_distill.losses.layers import LayerTerm, hidden_of, in_chunks, over_texts, widen
from llm_distill.models import Kept
from llm_distill.rows import Positions, Text, texts_of
from llm_distill.signals import HiddenSignal


@dataclass(frozen=True)
class Selectivity(LayerTerm):
    """MMD² between the activations of layers over the rows that count of a text, a mean over texts by their rows."""

    layers: Any = "last"
    name: ClassVar[str] = "selectivity"

    def __call__(
        self, student: Kept, signal: HiddenSignal, positions: Positions, module: Any
    ) -> Float[Tensor, " rows"]:
        texts = texts_of(positions)

        def of_layers(layer: int, target: int) -> Float[Tensor, " rows"]:
            states = (hidden_of(student, layer), hidden_of(signal, target))

            def of_text(text: Text) -> Float[Tensor, " rows"]:
                both = [nn.functional.normalize(widen(activations[text.rows]), dim=0) for activations in states]
                count = len(both[0])

                def of_rows(part: slice) -> Float[Tensor, " some"]:
                    gram, wanted = (neurons[part] @ neurons.T / neurons.shape[1] for neurons in both)
                    return (gram - wanted).square().sum(-1)

                # Each row has all of its text's discrepancy, so that the mean over rows is one over texts.
                return in_chunks(of_rows, count, count).sum().expand(count)

            return over_texts(of_text, texts, student)

        return self.mean_over_layers(of_layers)
