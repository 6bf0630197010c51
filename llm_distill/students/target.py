"""Which shapes of student have a wanted size: fewer layers, narrower layers, or some of both."""

from __future__ import annotations

import itertools
import math
import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from llm_distill.loading import LOADING_ERRORS
from llm_distill.models import decoder_layers, millions
from llm_distill.students.choose import even_layers
from llm_distill.students.cut import config_of_layers
from llm_distill.students.prune import config_of_width, width_of

SCALES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
AMOUNTS = {
    "target": ("x", "0.5x"),
    "params": ("", "80M"),
    "bytes": ("B", "150MB"),
    "latency": ("x|ms", "20ms, of a token, or 0.5x"),
}
"""Of each option that is a size to reach, its units and an example."""
STEPS = (
    ("intermediate_size", 1 / 2),
    ("hidden_size", 1 / 2),
    ("intermediate_size", 1 / 4),
    ("num_attention_heads", 1 / 2),
)
"""Narrower, one after the other, down to which share: neurons first, heads last (Minitron, arXiv:2407.14679)."""
LEAST_SHARE = 0.9
"""Of the cost that is allowed: shapes that cost less are too small to be held against the others."""


class Shape(NamedTuple):
    """What a student could be."""

    name: str
    layers: int
    sizes: dict[str, int]
    """Its widths, of those that change."""
    parameters: int


Cost = Callable[[PreTrainedModel, int, Mapping[str, int]], float]
"""What so many layers of these widths cost: parameters, or the milliseconds of a token."""


def propose_shapes(
    model: PreTrainedModel, limit: float, cost: Cost | None = None, write: Callable[[Any], str] = millions
) -> list[Shape]:
    """The largest shapes of at most this cost that have fewer layers, narrower ones, or half and half.

    Args:
        cost: `count_parameters`, unless told otherwise.
        write: how a cost is written in messages.

    Raises:
        ValueError: there is none, or the model costs no more already.
    """
    cost = cost or count_parameters
    total, whole, widths = len(decoder_layers(model)), cost(model, len(decoder_layers(model)), {}), [*narrower(model)]
    if limit >= whole:
        raise ValueError(f"a target of {write(limit)} is no smaller: the model has {write(whole)}.")
    depths = [(layers, dict[str, int]()) for layers in range(total, 0, -1)]
    halfway = first_within(model, depths, (whole + limit) / 2, cost)
    paths = {
        "fewer layers": depths,
        "narrower": [(total, sizes) for sizes in widths],
        "both": [(halfway[0], sizes) for sizes in widths] if halfway else [],
    }
    shapes = []
    for name, path in paths.items():
        if found := first_within(model, path, limit, cost):
            shapes.append(Shape(name, *found, count_parameters(model, *found)))
    if not shapes:
        embedding = model.get_input_embeddings().weight.numel()
        raise ValueError(
            f"a target of {write(limit)} is below the floor: the embeddings alone have {millions(embedding)}, and the "
            f"smallest shape of one layer {write(min(cost(model, 1, sizes) for sizes in (widths[0], widths[-1])))}. "
            "Choose a larger target, or another model."
        )
    return shapes


def search_shapes(
    model: PreTrainedModel, limit: float, count: int, cost: Cost | None = None, write: Callable[[Any], str] = millions
) -> list[Shape]:
    """`propose_shapes`, and others of about the same cost until there are `count`, as far as there are so many.

    They are drawn from all depths, numbers of channels and of heads; as many neurons are left as the cost allows.
    Raises ValueError as `propose_shapes` does.
    """
    cost = cost or count_parameters
    shapes = propose_shapes(model, limit, cost, write)
    channels, heads, neurons = (
        [*narrower(model, [(option, share)])]
        for option, share in (("hidden_size", 1 / 2), ("num_attention_heads", 1 / 2), ("intermediate_size", 1 / 4))
    )
    grid = [*itertools.product(range(1, len(decoder_layers(model)) + 1), channels, heads)]
    random.Random(0).shuffle(grid)
    for layers, *sizes in grid:
        if len(shapes) >= count:
            break
        if not is_allowed(model, sizes[0] | sizes[1]):
            continue
        path = [(layers, sizes[0] | sizes[1] | fewer) for fewer in neurons]
        found = first_within(model, path, limit, cost)
        is_new = found is not None and found not in [(shape.layers, shape.sizes) for shape in shapes]
        if found is not None and is_new and cost(model, *found) >= LEAST_SHARE * limit:
            shapes.append(Shape(f"shape {len(shapes) + 1}", *found, count_parameters(model, *found)))
    return shapes[:count]


def first_within(
    model: PreTrainedModel, path: Sequence[tuple[int, dict[str, int]]], limit: float, cost: Cost
) -> tuple[int, dict[str, int]] | None:
    """The first of ever cheaper shapes, as (layers, sizes), that costs no more than the limit, if there is one."""
    place = bisect_left(path, True, key=lambda shape: cost(model, *shape) <= limit)
    return path[place] if place < len(path) else None


def narrower(model: PreTrainedModel, steps: Sequence[tuple[str, float]] = STEPS) -> Iterator[dict[str, int]]:
    """Widths that become smaller step by step, down to which share, as far as the family has them and allows them."""
    sizes: dict[str, int] = {}
    yield sizes
    heads = getattr(model.config.get_text_config(), "num_attention_heads", 1)
    for option, share in steps:
        try:
            width = width_of(model, option)
        except LOADING_ERRORS:
            continue
        largest = width.units * width.heads_per_unit
        step = width.heads_per_unit if option == "num_attention_heads" else multiple_of(largest)
        if option == "hidden_size":  # many a family asks for a multiple of its heads
            step = min(math.lcm(step, heads), math.lcm(8, heads), key=lambda step: (step > largest / 8, -step))
        for size in range(sizes.get(option, largest) // step * step, 0, -step):
            if largest * share <= size < sizes.get(option, largest) and is_allowed(model, sizes | {option: size}):
                sizes = sizes | {option: size}
                yield sizes


def is_allowed(model: PreTrainedModel, sizes: Mapping[str, int]) -> bool:
    """Whether the family's configuration can be of these widths."""
    try:
        config_of_shape(model, len(decoder_layers(model)), sizes)
    except LOADING_ERRORS:
        return False
    return True


def multiple_of(width: int) -> int:
    """Of which number a pruned width is a multiple, so that kernels like it."""
    return next((step for step in (64, 32, 16, 8) if width >= 16 * step), 4)


def config_of_shape(model: PreTrainedModel, layers: int, sizes: Mapping[str, int]) -> PreTrainedConfig:
    """The configuration of a student of this shape; where layers differ, of evenly chosen ones."""
    config = config_of_layers(model.config, even_layers(len(decoder_layers(model)), layers))
    for option, size in sizes.items():
        config = config_of_width(config, option, size)
    return type(config).from_dict(config.to_dict())


def count_parameters(model: PreTrainedModel, layers: int, sizes: Mapping[str, int]) -> int:
    """Of a student of this shape."""
    config = config_of_shape(model, layers, sizes)
    with torch.device("meta"):
        return type(model)(config).num_parameters()


def parse_amount(name: str, text: Any) -> tuple[float, str]:
    """The number and unit of 80M, 1.5B, 150MB, 20ms or 0.5x. Raises ValueError for other words, naming the option."""
    units, examples = AMOUNTS[name]
    match = re.fullmatch(rf"(\d+(?:\.\d*)?|\.\d+)\s*([KMGB]?)({units})", str(text).strip(), flags=re.IGNORECASE)
    if match is None or float(match[1]) == 0 or (match[2] and name in ("target", "latency")):
        raise ValueError(f"{name} must be an amount such as {examples}, got {text!r}.")
    return float(match[1]) * SCALES[match[2].upper()], match[3].lower()
