"""A student made of some of its teacher's layers (DistilBERT, arXiv:1910.01108; ShortGPT, arXiv:2403.03853).

What a configuration says of each layer goes along, whatever the family calls it, and nothing is taken on trust: the
student is loaded as anybody will load it, each module of its layers is held against the one that it was, and its logits
against the teacher's own, the other layers passed by. A family of which that is not true is refused by name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from llm_distill.heads import intercepted
from llm_distill.loading import LOADING_ERRORS
from llm_distill.models import decoder_layers
from llm_distill.students.smaller import make_smaller, probe_logits, require_whole, say_the_same

INDICES = {"mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs", "cross_attention_layers"}
"""Options of configurations that are lists of layers, from 0."""
FIRST = {"first_k_dense_replace", "num_dense_layers", "max_window_layers", "num_hash_layers"}
LAST = {"num_kv_shared_layers"}
"""Options that say for how many layers, the first ones or the last, something is true."""


def cut_layers(model: PreTrainedModel, keep: Sequence[int]) -> PreTrainedModel:
    """A new model of some layers of another, with copies of its weights; what lies outside of the layers is kept.

    Args:
        model: a causal LM with its whole weights in memory.
        keep: which layers, by their number from 1, in ascending order.

    Raises:
        ValueError: a layer that is not there, or is named twice; a model that is quantised or has adapters; a family
            whose configuration cannot say which layers are left.
    """
    require_whole(model)
    layers = decoder_layers(model)
    require_layers_once(keep, len(layers))
    prefix = next(name for name, module in model.named_modules() if module is layers)
    try:
        student = make_smaller(model, config_of_layers(model.config, keep), _taker(model, prefix, len(layers), keep))
        _require_same_modules(model, student, prefix, keep)
        dropped = {number: None for number in range(1, len(layers) + 1) if number not in keep}
        with passed_by(model, outputs_beside(model), dropped):
            expected = probe_logits(model)
        if not say_the_same(probe_logits(student), expected, model.dtype):
            raise ValueError("they say something else than they do in it.")
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"layers {', '.join(map(str, keep))} of a {type(model).__name__} make no model of their own: "
            f"{'' if isinstance(error, ValueError) else f'{type(error).__name__}: '}{reason} Choose layers that keep "
            "the family's pattern, or keep all of them and prune widths."
        ) from error
    return student


def require_layers_once(keep: Sequence[int], count: int) -> None:
    """Raises ValueError unless these are numbers of some of a model's layers, from 1, each once and in their order."""
    if not keep:
        raise ValueError(f"no layer is kept: name at least one of the {count}.")
    if missing := [number for number in keep if not 1 <= number <= count]:
        raise ValueError(f"there is no layer {missing[0]}: the model has layers 1 to {count}.")
    if repeated := [number for number in keep if list(keep).count(number) > 1]:
        raise ValueError(f"layer {repeated[0]} is named twice: a layer is kept once, or not at all.")
    if list(keep) != sorted(keep):
        raise ValueError(f"layers stay in their order: give {' '.join(map(str, sorted(keep)))}.")


def config_of_layers(config: PreTrainedConfig, keep: Sequence[int]) -> PreTrainedConfig:
    """The configuration of a model with some of its layers: how many, and each option that has a value for each."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    count, kept = text.num_hidden_layers, [number - 1 for number in keep]
    if len(kept) == count:
        return config
    options = {name: value for name, value in text.to_dict().items() if not name.endswith("_token_id")}
    step = options.get("decoder_sparse_step") or 1
    if step > 1 and "mlp_only_layers" in options:  # Qwen's: the layers that the step leaves dense are named instead
        dense = {*(options["mlp_only_layers"] or ()), *(layer for layer in range(count) if (layer + 1) % step)}
        options["mlp_only_layers"] = sorted(dense)
        text.decoder_sparse_step = 1
    text.num_hidden_layers = len(kept)
    for name, value in options.items():
        if name in INDICES and isinstance(value, list):
            setattr(text, name, [kept.index(layer) for layer in value if layer in kept])
        elif isinstance(value, list) and len(value) == count:
            setattr(text, name, [value[layer] for layer in kept])
        elif name in FIRST and isinstance(value, int) and value < count:
            setattr(text, name, sum(layer < value for layer in kept))
        elif name in LAST and isinstance(value, int):
            setattr(text, name, sum(layer >= count - value for layer in kept))
    return config


def _taker(model: nn.Module, prefix: str, count: int, keep: Sequence[int]) -> Callable[[str, torch.Size], Tensor]:
    """What gives the student its weights."""
    weights, name_in_model = model.state_dict(), _renumbering(prefix, keep)

    def take(name: str, shape: torch.Size) -> Tensor:
        weight = weights.get(name_in_model(name))
        if weight is not None and weight.shape != shape:
            weight = _slices_of_layers(weight, shape, count, keep)
        if weight is None:
            raise ValueError(f"its configuration asks for a {name} of {tuple(shape)}, which they do not have.")
        return weight.detach().clone()

    return take


def _renumbering(prefix: str, keep: Sequence[int]) -> Callable[[str], str]:
    """What gives the name in the model of a module or weight of the student."""
    number = re.compile(rf"^{re.escape(prefix)}\.(\d+)(?=\.|$)")

    def name_in_model(name: str) -> str:
        match = number.match(name)
        if match is None:
            return name
        if int(match[1]) >= len(keep):
            raise ValueError("its configuration says otherwise how many layers there are.")
        return f"{prefix}.{keep[int(match[1])] - 1}{name[match.end() :]}"

    return name_in_model


def _slices_of_layers(weight: Tensor, shape: torch.Size, count: int, keep: Sequence[int]) -> Tensor | None:
    """Of a weight that has a slice for each layer, one after the other along a dimension, those of the kept layers."""
    differing = [dim for dim, (old, new) in enumerate(zip(weight.shape, shape, strict=False)) if old != new]
    if len(weight.shape) != len(shape) or len(differing) != 1 or weight.shape[differing[0]] % count:
        return None
    slices = weight.chunk(count, differing[0])
    taken = torch.cat([slices[number - 1] for number in keep], differing[0])
    return taken if taken.shape == shape else None


def _require_same_modules(model: PreTrainedModel, student: PreTrainedModel, prefix: str, keep: Sequence[int]) -> None:
    """Raises ValueError, naming it, if a module of the layers is of another class than the one that it was, or has
    another number or word in it, such as its window, but for the numbers of layers.
    """
    count, name_in_model = len(decoder_layers(model)), _renumbering(prefix, keep)
    place = {number - 1: new for new, number in enumerate(keep)}
    for name, ours in student.get_submodule(prefix).named_modules(prefix=prefix):
        theirs = model.get_submodule(name_in_model(name))
        if type(ours) is not type(theirs):
            raise ValueError(f"{name} would be a {type(ours).__name__}, and was a {type(theirs).__name__}.")
        for option, was in vars(theirs).items():
            now = vars(ours).get(option)
            if option[0] == "_" or option == "training" or not isinstance(was, int | float | str | list | tuple | None):
                continue
            if isinstance(was, list | tuple):
                was, now = list(was), list(now or ())
            is_number = type(was) is int and (now == place.get(was) or (was, now) == (count, len(keep)))
            is_list = isinstance(was, list) and len(was) == count and now == [was[number - 1] for number in keep]
            if was != now and not is_list and not (is_number and "layer" in option):
                raise ValueError(f"{option} of {name} would be {now!r}, and was {was!r}.")


Beside = Sequence[tuple[Any, ...] | None]
"""What each layer returns beside the hidden states: nothing, or so many more places of a tuple."""


def outputs_beside(model: PreTrainedModel) -> Beside:
    """From a forward. Raises ValueError if it does not call each layer."""
    beside: dict[nn.Module, tuple[Any, ...] | None] = {}

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        beside[layer] = (None,) * (len(output) - 1) if isinstance(output, tuple | list) else None

    layers = decoder_layers(model)
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        probe_logits(model)
    finally:
        for hook in hooks:
            hook.remove()
    if len(beside) < len(layers):
        raise ValueError("its forward does not call them one after the other.")
    return [beside[layer] for layer in layers]


@contextmanager
def passed_by(model: nn.Module, beside: Beside, outputs: Mapping[int, Tensor | None]) -> Iterator[None]:
    """Inside, some layers compute nothing.

    Args:
        model: a causal LM.
        beside: as `outputs_beside` gives it.
        outputs: by the numbers of these layers, from 1, what they return; None returns what goes in.
    """
    layers = decoder_layers(model)

    def stand_in(number: int) -> Callable[..., Any]:
        output, extra = outputs[number], beside[number - 1]

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            hidden = hidden_states if output is None else output
            return hidden if extra is None else (hidden, *extra)

        return forward

    with ExitStack() as stack:
        for number in outputs:
            stack.enter_context(intercepted(layers[number - 1], stand_in(number)))
        yield
