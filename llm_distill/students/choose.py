"""Which layers of a teacher a student is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from llm_distill.heads import LMHead
from llm_distill.losses.likelihoods import token_log_likelihoods
from llm_distill.models import decoder_layers
from llm_distill.students.cut import outputs_beside, passed_by

Blocks = Sequence[Int[Tensor, "batch time"]]
"""Calibration texts as batches of tokens without padding."""


def choose_layers(model: PreTrainedModel, count: int, method: str, blocks: Blocks) -> list[int]:
    """Which `count` layers to keep, by their numbers from 1.

    Args:
        model: a causal LM.
        count: how many.
        method: `influence`, those that change the hidden states most (ShortGPT, arXiv:2403.03853); `greedy`, those that
            are left when again and again the one without which the loss of the first batch is lowest goes; `even`, the
            first, the last and those between at equal steps (DistilBERT, arXiv:1910.01108), for which no text is read.
        blocks: calibration texts.

    Raises:
        ValueError: more layers than there are, or none.
    """
    total = len(decoder_layers(model))
    require_count(count, total)
    return layers_kept(measure_layers(model, count, method, blocks), total, count)


def measure_layers(model: PreTrainedModel, fewest: int, method: str, blocks: Blocks) -> dict[str, Any]:
    """What a choice of `fewest` layers, or of more, goes by, as JSON: of `influence` that of each layer, of `greedy`
    each layer that goes with the loss without it.
    """
    if method == "even":
        return {"method": method}
    if method == "influence":
        return {"method": method, "influence": block_influence(model, blocks)}
    left_out = least_missed_layers(model, len(decoder_layers(model)) - fewest, blocks[:1])
    return {"method": method, "left_out": [{"layer": number, "loss": loss} for number, loss in left_out]}


def layers_kept(measured: Mapping[str, Any], total: int, count: int) -> list[int]:
    """Which `count` of `total` layers to keep, by their numbers from 1, given what was measured."""
    if measured["method"] == "even":
        return even_layers(total, count)
    if measured["method"] == "influence":
        by_influence = sorted(range(1, total + 1), key=lambda number: -measured["influence"][number - 1])
        return sorted(by_influence[:count])
    gone = {step["layer"] for step in measured["left_out"][: total - count]}
    return [number for number in range(1, total + 1) if number not in gone]


def require_count(count: int, total: int) -> None:
    """Raises ValueError for more layers than there are, or none."""
    if not 1 <= count <= total:
        raise ValueError(f"{count} layers cannot be kept: the model has {total}.")


def even_layers(total: int, count: int) -> list[int]:
    """The first, the last and those between at equal steps, by their numbers from 1."""
    return [1 + round(step) for step in torch.linspace(0, total - 1, count, dtype=torch.float64).tolist()]


@torch.no_grad()
def block_influence(model: PreTrainedModel, blocks: Blocks) -> list[float]:
    """Of each layer 1 − cos(what goes in, what comes out), the mean over all tokens: 0 of one that changes nothing."""
    layers, head = decoder_layers(model), LMHead.of(model)
    sums = dict.fromkeys(layers, 0.0)

    def add(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        after = output[0] if isinstance(output, tuple | list) else output
        cosines = torch.cosine_similarity(_input_of(inputs, named).float(), after.float(), dim=-1)
        sums[layer] += float((1 - cosines).double().sum())

    hooks = [layer.register_forward_hook(add, with_kwargs=True) for layer in layers]
    try:
        for ids in tqdm(blocks, desc="Influence of layers", unit=" batches", leave=False):
            mean_loss(model, [ids], head)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = sum(ids.numel() for ids in blocks)
    return [sums[layer] / tokens for layer in layers]


def least_missed_layers(model: PreTrainedModel, count: int, blocks: Blocks) -> list[tuple[int, float]]:
    """`count` times the layer without which, the earlier ones left out too, the loss is lowest, with that loss.

    What goes into each layer is kept, so that a layer costs the forward of those behind it.
    """
    head, beside = LMHead.of(model), outputs_beside(model)
    left, gone = list(range(1, len(beside) + 1)), list[tuple[int, float]]()
    tries = sum(len(left) - done for done in range(count))
    with tqdm(total=tries, desc="Loss without a layer", unit=" layers", leave=False) as bar:
        for _ in range(count):
            passed: dict[int, Tensor | None] = {number: None for number, _ in gone}
            sums = dict.fromkeys(left, 0.0)
            for ids in blocks:
                with passed_by(model, beside, passed):
                    inputs = _inputs_of_layers(model, left, ids, head)
                for number in left:
                    before = {earlier: None for earlier in left if earlier < number}
                    with passed_by(model, beside, passed | before | {number: inputs[number]}):
                        sums[number] += mean_loss(model, [ids], head) * ids[:, 1:].numel()
            bar.update(len(left))
            least = min(left, key=lambda number: sums[number])
            left.remove(least)
            gone.append((least, sums[least] / sum(ids[:, 1:].numel() for ids in blocks)))
    return gone


def mean_loss(model: PreTrainedModel, blocks: Blocks, head: LMHead | None = None) -> float:
    """Cross-entropy with the texts, in nats per token."""
    head = head or LMHead.of(model)
    scores = [part for ids in blocks for part in token_log_likelihoods(model, head, ids.tolist())]
    return -float(torch.cat(scores).mean())


def _inputs_of_layers(
    model: PreTrainedModel, numbers: Sequence[int], ids: Int[Tensor, "batch time"], head: LMHead
) -> dict[int, Tensor]:
    """What goes into some layers, by their numbers."""
    inputs: dict[int, Tensor] = {}

    def keep_input(number: int) -> Any:
        def hook(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            inputs[number] = _input_of(given, named)

        return hook

    layers = decoder_layers(model)
    hooks = [layers[number - 1].register_forward_pre_hook(keep_input(number), with_kwargs=True) for number in numbers]
    try:
        mean_loss(model, [ids], head)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def _input_of(given: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    return given[0] if given else named["hidden_states"]
