"""MiniLM v2: how the tokens of a text are related to each other, by their queries, keys and values (arXiv:2012.15828).

Widths and heads may differ, and nothing is projected: only relations are compared. A deviation from the paper: queries
and keys are those that attention gets, with their rotary positions, as every family has them there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from llm_distill.losses.layers import LayerTerm, in_chunks, over_texts, widen
from llm_distill.models import ATTENTION, Kept
from llm_distill.rows import Positions, Text, texts_of
from llm_distill.signals import HiddenSignal


@dataclass(frozen=True)
class Relations(LayerTerm):
    """KL(teacher‖student) between softmax(a · b / √size) over all tokens of a text, a mean over heads and relations.

    Args:
        of: which vectors are related to themselves: some of query, key, value.
        heads: into how many heads the vectors of either model are cut anew. By default, as many as both models' groups
            of keys and values can be cut into.
    """

    layers: Any = "last"
    of: Any = ATTENTION
    heads: int | None = None
    name: ClassVar[str] = "relations"

    def __post_init__(self) -> None:
        super().__post_init__()
        of = (self.of,) if isinstance(self.of, str) else tuple(self.of)
        if not of or len({*of} & {*ATTENTION}) < len(of):
            raise ValueError(f"relations: of must be some of {', '.join(ATTENTION)}, each once, got {self.of!r}.")
        if self.heads is not None and not (isinstance(self.heads, int) and self.heads >= 1):
            raise ValueError(f"relations: heads must be a number from 1, got {self.heads!r}.")
        object.__setattr__(self, "of", of)

    @property
    def kinds(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(self.of)

    def __call__(
        self, student: Kept, signal: HiddenSignal, positions: Positions, module: Any
    ) -> Float[Tensor, " rows"]:
        texts = texts_of(positions)

        def distance(layer: int, target: int) -> Float[Tensor, " rows"]:
            both_of = {kind: self._split(student.layers[kind][layer], signal.layers[kind][target]) for kind in self.of}

            def of_text(text: Text) -> Float[Tensor, " rows"]:
                at, tokens = positions.position[text.rows], text.tokens

                def of_rows(part: slice, both: Sequence[Tensor]) -> Float[Tensor, " some"]:
                    log_q, log_p = (
                        log_relations(states[text.sample, at[part]], states[text.sample, tokens]) for states in both
                    )
                    return (log_p.exp() * (log_p - log_q)).sum(-1).mean(0)

                values = [
                    in_chunks(partial(of_rows, both=both), len(at), both[0].shape[2] * (tokens.stop - tokens.start))
                    for both in both_of.values()
                ]
                return torch.stack(values).mean(0)

            return over_texts(of_text, texts, student)

        return self.mean_over_layers(distance)

    def _split(self, *both: Float[Tensor, "batch time ..."]) -> list[Float[Tensor, "batch time heads ..."]]:
        """The student's vectors and the teacher's, cut anew into equally many heads."""
        heads = self.heads or gcd(*(states.shape[2] for states in both))
        widths = [states.shape[2] * states.shape[3] for states in both]
        if any(width % heads for width in widths):
            raise ValueError(
                f"relations: heads={heads} does not divide the widths {widths[0]} (student's) and {widths[1]} "
                f"(teacher's). Take a divisor of {gcd(*widths)}."
            )
        return [states.flatten(2).unflatten(2, (heads, -1)) for states in both]


def log_relations(
    rows: Float[Tensor, "rows heads size"], tokens: Float[Tensor, "tokens heads size"]
) -> Float[Tensor, "heads rows tokens"]:
    """The logarithm of the softmax of the scaled products of some rows with all tokens."""
    return (torch.einsum("rhs,ths->hrt", widen(rows), widen(tokens)) * rows.shape[-1] ** -0.5).log_softmax(-1)
