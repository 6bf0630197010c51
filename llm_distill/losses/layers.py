"""What terms on layers have in common: which of the student's layers learns from which of the teacher's."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel

from llm_distill.models import LAST, Kept, Needs
from llm_distill.rows import Text
from llm_distill.signals import HiddenSignal

RULES = ("even", "last", "cut", "head")
RECORD = "pruning.json"
"""What `llm-distill prune` writes beside a student; its `layers` are the teacher's that were kept, from 1."""
CHUNK_NUMBERS = 2**22
"""Of a matrix of token pairs so many numbers are there at a time, and are computed again in backward."""


@dataclass(frozen=True)
class LayerTerm:
    """A term on pairs of layers. A subclass has its `name`, the `kinds` that it needs of both models (see
    `models.Kept`), its own options as further fields, and `__call__`.

    Args:
        layers: {student's layer: teacher's layer}, counted from 1, or pairs [[student's, teacher's], …], or a rule:
            `even` (each of the student's layers, with the teacher's at the same share of its depth), `last` (the last
            of both), `cut` (each of the student's layers, with the one that it was cut from), `head` (what goes into
            the head: the only one for which stored hidden states are enough).
        weight: what the term is multiplied by.
    """

    layers: Any = "even"
    weight: float = 1.0
    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]] = ("hidden",)

    def __post_init__(self) -> None:
        if self.layers not in RULES:
            object.__setattr__(self, "layers", self._parsed_pairs())
        if not (isinstance(self.weight, int | float) and 0 < self.weight < float("inf")):
            raise ValueError(f"{self.name}: weight must be positive and finite, got {self.weight!r}.")

    def _parsed_pairs(self) -> dict[int, int]:
        given = self.layers.items() if isinstance(self.layers, Mapping) else self.layers
        try:
            pairs = [(_whole_number(student), _whole_number(teacher)) for student, teacher in given]
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.name}: layers is {', '.join(RULES[:-1])} or {RULES[-1]}, or pairs like {{4: 8}} (student's: "
                f"teacher's), got {self.layers!r}."
            ) from error
        if not pairs or min(min(pair) for pair in pairs) < 1:
            raise ValueError(
                f"{self.name}: layers needs pairs of layers counted from 1, such as {{4: 8}}, got {self.layers!r}."
            )
        if len(dict(pairs)) < len(pairs):
            raise ValueError(f"{self.name}: a layer of the student is named twice in layers={self.layers!r}.")
        return dict(pairs)

    def _require_one_of(self, option: str, *choices: str) -> None:
        if getattr(self, option) not in choices:
            raise ValueError(f"{self.name}: {option} must be {' or '.join(choices)}, got {getattr(self, option)!r}.")

    def fit(self, student: PreTrainedConfig, teacher: PreTrainedConfig) -> Self:
        """The same with pairs in place of a rule.

        Raises:
            ValueError: a layer that there is not, or no record of what was cut.
        """
        ours, theirs = (config.get_text_config().num_hidden_layers for config in (student, teacher))
        if self.layers == "even":
            pairs = {layer: max(1, round(layer * theirs / ours)) for layer in range(1, ours + 1)}
        elif self.layers == "last":
            pairs = {ours: theirs}
        elif self.layers == "cut":
            pairs = dict(enumerate(self._layers_cut(student._name_or_path, ours), 1))
        elif self.layers == "head":
            if self.kinds != ("hidden",):
                raise ValueError(f"{self.name}: layers=head has hidden states alone, no {' and '.join(self.kinds)}.")
            return self
        else:
            pairs = self.layers
        for whose, layers, count in (("student", pairs, ours), ("teacher", pairs.values(), theirs)):
            if missing := [layer for layer in layers if layer > count]:
                raise ValueError(f"{self.name}: there is no layer {missing[0]}: the {whose} has layers 1 to {count}.")
        return replace(self, layers=pairs)

    def _layers_cut(self, folder: str, count: int) -> list[int]:
        path = Path(folder, RECORD)
        layers = json.loads(path.read_text()).get("layers") if folder and path.is_file() else None
        if not isinstance(layers, list) or len(layers) != count:
            raise ValueError(
                f"{self.name}: layers=cut needs a student from `llm-distill prune`, with a {RECORD} that names its "
                f"{count} layers, and there is none in {folder or 'memory'!r}. layers=even needs none."
            )
        return layers

    @property
    def student_needs(self) -> Needs:
        return self._needs(0)

    @property
    def teacher_needs(self) -> Needs:
        return self._needs(1)

    def _needs(self, side: int) -> Needs:
        """Before it is fitted, the kinds alone."""
        if self.layers == "head":
            return {LAST: ()}
        pairs = self.layers.items() if self.layers not in RULES else ()
        return dict.fromkeys(self.kinds, tuple(pair[side] for pair in pairs))

    def make_module(self, student: PreTrainedModel, width: int) -> nn.Module | None:
        """What it trains beside the student, if anything; `width` is that of the teacher's hidden states."""
        return None

    def mean_over_layers(self, value: Callable[[int, int], Tensor]) -> Float[Tensor, " rows"]:
        """The mean of `value(student's layer, teacher's layer)` over all pairs; what goes into the head is layer 0."""
        pairs = [(0, 0)] if self.layers == "head" else self.layers.items()
        return torch.stack([value(*pair) for pair in pairs]).mean(0)


def hidden_of(kept: Kept | HiddenSignal, layer: int) -> Float[Tensor, "rows width"]:
    """What came out of a layer; of layer 0, what goes into the head."""
    return kept.hidden if layer == 0 else kept.layers["hidden"][layer]


def _whole_number(value: Any) -> int:
    """Of a key of JSON too, which is text. Raises TypeError or ValueError."""
    return int(value) if isinstance(value, str) else operator.index(value)


def options_of(term: type[Any]) -> tuple[str, ...]:
    """What a person may set of a term."""
    return tuple(field.name for field in fields(term) if field.init)


def widen(states: Tensor) -> Tensor:
    """In float32 at least."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


def over_texts(
    value: Callable[[Text], Float[Tensor, " some"]], texts: Sequence[Text], student: Kept
) -> Float[Tensor, " rows"]:
    """`value` of each text's rows; where no row counts, none."""
    return torch.cat([value(text) for text in texts]) if texts else widen(student.hidden).sum(-1)


def in_chunks(value: Callable[[slice], Tensor], rows: int, numbers_per_row: int) -> Float[Tensor, " rows"]:
    """`value` of a few rows at a time, computed again in backward, so that what it makes of them is never all there."""
    size = max(1, CHUNK_NUMBERS // max(1, numbers_per_row))
    parts = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
    return torch.cat([checkpoint(value, part, use_reentrant=False, preserve_rng_state=False) for part in parts])
