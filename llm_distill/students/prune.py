"""A student that is narrower than its teacher: fewer neurons, channels, heads or experts (Minitron, arXiv:2407.14679).

Nothing is known of any family. Which dimensions of which weights belong to a width is seen from what its own class
builds when the width is changed; that nothing else changes, and that the student says what its teacher says with the
others silent, is tested. A family of which that is not true is refused by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel

from llm_distill.heads import LMHead
from llm_distill.loading import LOADING_ERRORS
from llm_distill.models import decoder_layers
from llm_distill.students.choose import Blocks, mean_loss
from llm_distill.students.options import WIDTHS
from llm_distill.students.smaller import make_smaller, probe_logits, require_whole, say_the_same

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What families call the number of their experts."""


HEAD_SIZES = ("head_dim", "head_size", "attention_head_size")


class Narrowed(NamedTuple):
    """A narrower student, and what of its teacher's activity is left."""

    student: PreTrainedModel
    activity: dict[str, list[float]]
    """By the width that was pruned, the share of what the kept units said on the calibration texts, of each layer."""


class Width(NamedTuple):
    """One width of a model, and where it is found."""

    option: str
    units: int
    """How many there are of what is kept or left out whole: neurons, channels, experts; of heads those groups that
    share a key."""
    heads_per_unit: int
    changed: dict[str, list[int]]
    """Of each weight that has it, in which dimensions."""
    readers: dict[str, nn.Linear]
    """By their names, the modules that read neurons or heads, one of a layer: what is silent there says nothing."""


def prune_widths(model: PreTrainedModel, sizes: Mapping[str, int], blocks: Blocks) -> Narrowed:
    """A new, narrower model with copies of a part of the weights of another.

    What is kept is what is most active over calibration texts: neurons by the mean size of what they say, groups of
    heads by the mean norm of what they say, channels by the mean size of what comes out of the norms, experts by the
    weight with which they are chosen. All of it is measured once, in the model itself.

    Args:
        model: a causal LM with its whole weights in memory.
        sizes: some of WIDTHS, and what they become.
        blocks: calibration texts.

    Raises:
        ValueError: a width that is not smaller, or that heads, groups or experts do not allow; a model that is
            quantised or has adapters; a family that has no such width, or another structure.
    """
    require_whole(model)
    try:
        widths = {option: width_of(model, option) for option in WIDTHS if option in sizes}
        units = {option: units_of(model, width, sizes[option]) for option, width in widths.items()}
        importances = measure_importances(model, list(widths.values()), blocks)
        activity, student = dict[str, list[float]](), model
        for option, count in units.items():
            importance = importances[option]
            keep = most_important(importance, count)
            activity[option] = (importance.gather(1, keep).sum(1) / importance.sum(1)).tolist()
            student = keep_units(student, width_of(student, option), keep)
    except LOADING_ERRORS as error:
        reason = f"{'' if isinstance(error, ValueError) else f'{type(error).__name__}: '}{' '.join(str(error).split())}"
        raise ValueError(f"a {type(model).__name__} cannot be pruned to {', '.join(sizes)}: {reason}") from error
    return Narrowed(student, activity)


def most_important(importance: Float[Tensor, "layers units"], count: int) -> Tensor:
    """Of each layer the numbers of the `count` most important units, from 0 and in their order, [layers, count]."""
    return importance.topk(count, dim=1).indices.sort(dim=1).values


def units_of(model: PreTrainedModel, width: Width, size: int) -> int:
    """How many units a size is. Raises ValueError for one that cannot be."""
    option, largest = width.option, width.units * width.heads_per_unit
    if not 0 < size < largest:
        raise ValueError(f"{option}={size} is no smaller width, there are {largest}.")
    if size % width.heads_per_unit:
        raise ValueError(
            f"{option}={size} cuts through groups, as {width.heads_per_unit} heads share a key: take a multiple of "
            f"{width.heads_per_unit}."
        )
    text = model.config.get_text_config()
    chosen = [getattr(text, name, None) for name in ("num_experts_per_tok", "moe_topk", "moe_k")]
    if option == "num_experts" and size < (needed := max((n for n in chosen if isinstance(n, int)), default=1)):
        raise ValueError(f"num_experts={size} are too few, as each token goes to {needed}.")
    return size // width.heads_per_unit


def config_of_width(config: PreTrainedConfig, option: str, size: int) -> PreTrainedConfig:
    """The same with another width; heads keep their size, and as many of them share a key."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if option in ("hidden_size", "num_attention_heads") and hasattr(text, "num_attention_heads"):
        text.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if option == "num_attention_heads" and hasattr(text, "num_key_value_heads"):
        text.num_key_value_heads = text.num_key_value_heads * size // text.num_attention_heads
    setattr(text, _name_of(text, option), size)
    return config


def width_of(model: PreTrainedModel, option: str) -> Width:
    """Where a width is found in a model. Raises ValueError if it is found nowhere, or in places whose meaning is not
    clear.
    """
    text = model.config.get_text_config()
    size = getattr(text, _name_of(text, option), None)
    if not isinstance(size, int) or size < 2:
        raise ValueError(f"its configuration has no {option} that could be smaller ({size}).")
    groups = size
    if option == "num_attention_heads":
        groups = getattr(text, "num_key_value_heads", None) or size
        if groups < 2:
            raise ValueError(f"all its {size} heads share one key.")
    smaller_size = groups // 2 * size // groups
    if option == "hidden_size" and (heads := getattr(text, "num_attention_heads", 1)) < size:
        smaller_size = max(heads, smaller_size // heads * heads)  # many a family asks for a multiple
    config = config_of_width(model.config, option, smaller_size)
    with torch.device("meta"):
        smaller = type(model)(type(config).from_dict(config.to_dict()))
    shapes, weights = ({name: weight.shape for name, weight in m.state_dict().items()} for m in (smaller, model))
    if shapes.keys() != weights.keys():
        raise ValueError(f"other weights come and go with its {option}.")
    changed = {
        name: [dim for dim, (old, new) in enumerate(zip(shape, shapes[name], strict=True)) if old != new]
        for name, shape in weights.items()
        if shape != shapes[name]
    }
    _require_same_numbers(model, smaller, option, smaller_size, size)
    if not changed:
        raise ValueError(f"none of its weights has {option}.")
    readers: dict[str, nn.Linear] = {}
    if option in ("intermediate_size", "num_attention_heads"):
        modules = dict(model.named_modules())
        for name in changed:
            module = modules.get(name.removesuffix(".weight"))
            if isinstance(module, nn.Linear) and changed[name] == [1]:
                readers[name.removesuffix(".weight")] = module
        layers = [_layer(model, name) for name in readers]
        if not readers or None in layers or len({*layers}) < len(layers):
            raise ValueError(f"{option} is not read by one linear module of a layer.")
    return Width(option, groups, size // groups, changed, readers)


def keep_units(model: PreTrainedModel, width: Width, keep: Tensor) -> PreTrainedModel:
    """A new model with some units of one width.

    Args:
        keep: the numbers of those of each layer, from 0, [layers, kept]; of channels, [1, kept].
    """
    weights, kept = model.state_dict(), keep.shape[1]

    def take(name: str, shape: torch.Size) -> Tensor:
        weight, layer = weights[name], _layer(model, name)
        row = keep[0 if width.option == "hidden_size" or layer is None else layer].to(weight.device)
        for dim in width.changed.get(name, ()):
            weight = weight.index_select(dim, _places(row, weight.shape[dim], width))
        if weight.shape != shape:
            raise ValueError(f"its {name} is {tuple(weights[name].shape)}, and would be {tuple(shape)}.")
        return weight.detach().clone()

    student = make_smaller(model, config_of_width(model.config, width.option, kept * width.heads_per_unit), take)
    logits = probe_logits(student)
    if width.readers:
        with silenced(model, width, keep):
            expected = probe_logits(model)
        if not say_the_same(logits, expected, model.dtype):
            raise ValueError(f"what is left of {width.option} says something else than it does in the model.")
    return student


@torch.no_grad()
def measure_importances(
    model: PreTrainedModel, widths: Sequence[Width], blocks: Blocks
) -> dict[str, Float[Tensor, "layers units"]]:
    """How active the units of each layer are over texts, by the option; of channels there is one row for all layers."""
    layers = len(decoder_layers(model))
    sums = {
        width.option: torch.zeros(1 if width.option == "hidden_size" else layers, width.units, dtype=torch.float64)
        for width in widths
    }
    hooks = []
    for width in widths:
        into = sums[width.option]
        for name, module in model.named_modules():
            layer = _layer(model, name)
            if layer is None:
                continue
            if name in width.readers:
                hooks.append(module.register_forward_pre_hook(_add_activity(into[layer], width)))
            elif width.option == "hidden_size" and "Norm" in type(module).__name__:
                hooks.append(module.register_forward_hook(_add_channels(into[0])))
            elif width.option == "num_experts" and name.endswith(".experts"):
                hooks.append(module.register_forward_pre_hook(_add_choices(into[layer]), with_kwargs=True))
    try:
        head = LMHead.of(model)
        for total in sums.values():
            total.zero_()  # of what measuring the head has read
        for ids in tqdm(blocks, desc="Activity", unit=" batches", leave=False):
            mean_loss(model, [ids], head)
    finally:
        for hook in hooks:
            hook.remove()
    if silent := [option for option, total in sums.items() if not total.any()]:
        raise ValueError(f"nothing of its {silent[0]} is seen to be active.")
    return sums


def _add_activity(into: Float[Tensor, " units"], width: Width) -> Any:
    """Neurons: the mean of |what they say|; groups of heads: of its norm, summed over the heads of a group."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        said = inputs[0].detach().float().flatten(0, -2)
        norms = said.unflatten(-1, (width.units * width.heads_per_unit, -1)).norm(dim=-1)
        into.add_(norms.double().sum(0).view(width.units, -1).sum(1).cpu())

    return hook


def _add_channels(into: Float[Tensor, " channels"]) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.shape[-1] == len(into):  # there are norms of heads too
            into.add_(output.detach().abs().flatten(0, -2).double().sum(0).cpu())

    return hook


def _add_choices(into: Float[Tensor, " experts"]) -> Any:
    """The weights of the experts that each token is sent to, as the experts get them: states, indices, weights."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
        indices, weights = [*inputs, *named.values()][1:3]
        if indices.is_floating_point() or indices.shape != weights.shape:
            raise ValueError("its experts are not told which token goes where, and with which weight.")
        into.index_add_(0, indices.flatten().cpu(), weights.detach().double().flatten().cpu())

    return hook


@contextmanager
def silenced(model: PreTrainedModel, width: Width, keep: Tensor) -> Iterator[None]:
    """Inside, the units of a width that are not kept say nothing."""

    def silence(layer: int, size: int) -> Any:
        mask = torch.zeros(size, device=model.device, dtype=model.dtype)
        mask[_places(keep[layer].to(model.device), size, width)] = 1
        return lambda module, inputs: (inputs[0] * mask, *inputs[1:])

    hooks = [
        module.register_forward_pre_hook(silence(_layer(model, name) or 0, module.in_features))
        for name, module in width.readers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _places(units: Tensor, size: int, width: Width) -> Tensor:
    """Where units lie in a dimension of this size: those of heads are whole runs of it; of neurons there may be two
    halves, of gate and up projection.
    """
    run, rest = divmod(size, width.units)
    if rest or (run > 1 and width.option in ("hidden_size", "num_experts")):
        raise ValueError(f"a dimension of {size} is no multiple of its {width.units}.")
    steps = torch.arange(run, device=units.device)
    if width.option == "num_attention_heads":
        return (units[:, None] * run + steps).flatten()
    return (steps[:, None] * width.units + units).flatten()


def _require_same_numbers(
    model: PreTrainedModel, smaller: PreTrainedModel, option: str, units: int, total: int
) -> None:
    """Raises ValueError, naming it, if a number or word in a module of the layers changes other than with the width,
    such as the size of a head.
    """
    prefix = next(name for name, module in model.named_modules() if module is decoder_layers(model))
    for name, theirs in model.get_submodule(prefix).named_modules(prefix=prefix):
        ours = vars(smaller.get_submodule(name))
        for number, was in vars(theirs).items():
            is_compared = number[0] != "_" and isinstance(was, int | float | str) and number != "training"
            now = ours.get(number)
            is_size = (
                type(was) is type(now) is int
                and was * units == now * total
                and not ("head" in number if option == "hidden_size" else number in HEAD_SIZES)
            )
            if is_compared and was != now and not is_size:
                raise ValueError(f"{number} of {name} would be {now!r}, and was {was!r}.")


def _layer(model: PreTrainedModel, name: str) -> int | None:
    """The layer, from 0, that a module or weight is in."""
    prefix = next(name for name, module in model.named_modules() if module is decoder_layers(model))
    match = re.match(rf"{re.escape(prefix)}\.(\d+)\.", f"{name}.")
    return int(match[1]) if match else None


def _name_of(text: PreTrainedConfig, option: str) -> str:
    """What the family calls it."""
    return next((name for name in EXPERTS if getattr(text, name, None)), "") if option == "num_experts" else option
