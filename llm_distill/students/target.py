"""Which shapes of student have a wanted size: fewer layers, narrower layers, or some of both."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from llm_distill.loading import LOADING_ERRORS
from llm_distill.models import decoder_layers, millions
from llm_distill.students.choose import even_layers
from llm_distill.students.cut import config_of_layers
from llm_distill.students.prune import config_of_width, width_of

SCALES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
STEPS = (
    ("intermediate_size", 1 / 2),
    ("hidden_size", 1 / 2),
    ("intermediate_size", 1 / 4),
    ("num_attention_heads", 1 / 2),
)
"""Narrower, one after the other, down to which share: neurons first, heads last (Minitron, arXiv:2407.14679)."""


class Shape(NamedTuple):
    """What a student could be."""

    name: str
    layers: int
    sizes: dict[str, int]
    """Its widths, of those that change."""
    parameters: int


def propose_shapes(model: PreTrainedModel, parameters: int) -> list[Shape]:
    """The largest shapes of at most so many parameters that have fewer layers, narrower ones, or half and half.

    Raises:
        ValueError: there is none, or the model is as small already.
    """
    total, whole = len(decoder_layers(model)), model.num_parameters()
    if parameters >= whole:
        raise ValueError(f"a target of {millions(parameters)} is no smaller: the model has {millions(whole)}.")
    depths = {count: count_parameters(model, count, {}) for count in range(1, total + 1)}
    paths = {
        "fewer layers": max((n for n, size in depths.items() if size <= parameters), default=None),
        "narrower": total,
        "both": max((n for n, size in depths.items() if size <= (whole + parameters) / 2), default=None),
    }
    shapes, smallest = [], whole
    for name, layers in paths.items():
        for sizes in [{}] if name == "fewer layers" else narrower(model):
            size = whole if layers is None else count_parameters(model, layers, sizes)
            if layers is not None and size <= parameters:
                shapes.append(Shape(name, layers, sizes, size))
                break
    if not shapes:
        smallest = min(depths[1], *(count_parameters(model, 1, sizes) for sizes in narrower(model)))
        embedding = model.get_input_embeddings().weight.numel()
        raise ValueError(
            f"a target of {millions(parameters)} is below the floor: the embeddings alone have {millions(embedding)}, "
            f"and the smallest shape of one layer {millions(smallest)}. Choose a larger target, or another model."
        )
    return shapes


def narrower(model: PreTrainedModel) -> Iterator[dict[str, int]]:
    """Widths that become smaller step by step, as far as the family has them and allows them."""
    sizes: dict[str, int] = {}
    yield sizes
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 1)
    for option, share in STEPS:
        try:
            width = width_of(model, option)
        except LOADING_ERRORS:
            continue
        largest = width.units * width.heads_per_unit
        step = width.heads_per_unit if option == "num_attention_heads" else multiple_of(largest)
        if option == "hidden_size":  # many a family asks for a multiple of its heads
            step = min(math.lcm(step, heads), math.lcm(8, heads), key=lambda step: (step > largest / 8, -step))
        for size in range(sizes.get(option, largest) // step * step, 0, -step):
            if largest * share <= size < sizes.get(option, largest):
                sizes = sizes | {option: size}
                yield sizes


def multiple_of(width: int) -> int:
    """Of which number a pruned width is a multiple, so that kernels like it."""
    return next((step for step in (64, 32, 16, 8) if width >= 16 * step), 4)


def count_parameters(model: PreTrainedModel, layers: int, sizes: Mapping[str, int]) -> int:
    """Of a student of this shape; where layers differ, of evenly chosen ones."""
    config = config_of_layers(model.config, even_layers(len(decoder_layers(model)), layers))
    for option, size in sizes.items():
        config = config_of_width(config, option, size)
    with torch.device("meta"):
        return type(model)(type(config).from_dict(config.to_dict())).num_parameters()


def parse_amount(name: str, text: Any) -> float:
    """The number that 80M, 1.5B, 150MB or 0.5x means. Raises ValueError for other words, naming the option."""
    unit = {"target": "x", "params": "", "bytes": "B"}[name]
    match = re.fullmatch(rf"(\d+(?:\.\d*)?|\.\d+)\s*([KMGB]?){unit}", str(text).strip(), flags=re.IGNORECASE)
    if match is None or float(match[1]) == 0 or (name == "target" and match[2]):
        example = {"target": "0.5x", "params": "80M", "bytes": "150MB"}[name]
        raise ValueError(f"{name} must be an amount such as {example}, got {text!r}.")
    return float(match[1]) * SCALES[match[2].upper()]
