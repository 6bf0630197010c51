"""Attention transfer: where the student looks beside where the teacher looks (arXiv:1612.03928; of transformers,
TinyBERT, arXiv:1909.10351, and MiniLM, arXiv:2002.10957).

The maps are made here, of the queries and keys that attention was handed, a few rows at a time. Attention itself runs
as it always does (sdpa, FlashAttention, packed rows), and no map of a layer is ever whole. What a family does to its
scores beside the scale (Gemma 2's soft cap, gpt-oss's sinks, a sliding window) is in neither side's map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from llm_distill.losses.layers import LayerTerm, in_chunks, over_texts, widen
from llm_distill.models import Kept
from llm_distill.rows import Positions, Text, texts_of
from llm_distill.signals import HiddenSignal


@dataclass(frozen=True)
class AttentionMaps(LayerTerm):
    """How far the student's attention at each position is from the teacher's, over the tokens of its text until there.

    Args:
        distance: `kl`, KL(teacher‖student) in nats; or `mse`, the squared error summed over tokens.
        heads: `mean` compares the mean of all heads; `matched`, each head with the teacher's of its number.
    """

    distance: str = "kl"
    heads: str = "mean"
    name: ClassVar[str] = "attention"
    kinds: ClassVar[tuple[str, ...]] = ("query", "key")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_one_of("distance", "kl", "mse")
        self._require_one_of("heads", "mean", "matched")

    def __call__(
        self, student: Kept, signal: HiddenSignal, positions: Positions, module: Any
    ) -> Float[Tensor, " rows"]:
        texts = texts_of(positions)

        def distance(layer: int, target: int) -> Float[Tensor, " rows"]:
            both = [
                (kept.layers["query"][n], kept.layers["key"][n]) for kept, n in ((student, layer), (signal, target))
            ]
            counts = [query.shape[2] for query, _ in both]
            if self.heads == "matched" and counts[0] != counts[1]:
                raise ValueError(
                    f"attention: heads=matched needs as many heads on both sides, and layer {layer} of the student has "
                    f"{counts[0]}, layer {target} of the teacher {counts[1]}. Set heads=mean."
                )

            def of_text(text: Text) -> Float[Tensor, " rows"]:
                at = positions.position[text.rows]

                def of_rows(part: slice) -> Float[Tensor, " some"]:
                    ours, theirs = (
                        attention_maps(
                            query[text.sample, at[part]], key[text.sample, text.tokens], at[part] - text.tokens.start
                        )
                        for query, key in both
                    )
                    if self.heads == "mean":
                        ours, theirs = ours.mean(0, keepdim=True), theirs.mean(0, keepdim=True)
                    if self.distance == "mse":
                        return (ours - theirs).square().sum(-1).mean(0)
                    tiny = torch.finfo(ours.dtype).tiny  # of tokens that come later both are 0
                    return (theirs * (theirs.clamp(min=tiny).log() - ours.clamp(min=tiny).log())).sum(-1).mean(0)

                return in_chunks(of_rows, len(at), max(counts) * (text.tokens.stop - text.tokens.start))

            return over_texts(of_text, texts, student)

        return self.mean_over_layers(distance)


def attention_maps(
    query: Float[Tensor, "rows heads size"], key: Float[Tensor, "tokens groups size"], last: Tensor
) -> Float[Tensor, "heads rows tokens"]:
    """softmax(q · k / √size) over the tokens up to each row's `last`; each group of heads shares its keys."""
    grouped = widen(query).unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("rghs,tgs->ghrt", grouped, widen(key)).flatten(0, 1) * query.shape[-1] ** -0.5
    later = torch.arange(len(key), device=last.device) > last[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1)
