"""What a causal LM must not see, measured on the model at hand: later tokens, and the other documents of a packed row.

Families differ in whether their code keeps the documents of a row apart, and some models are causal in name only. As
with the head, nothing is looked up: a few tokens go through the model, and what it says of them tells.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor, nn
from transformers import TrainerCallback

from llm_distill.heads import LMHead, base_of, output_projection
from llm_distill.models import evaluating, kept_of
from llm_distill.rows import View

LENGTH = 8
"""Tokens of a document: more than a convolution reaches."""
EXACT, ROUNDED = 0.002, 0.03
"""What may change, in 32 bits and in 16, though nothing should: the median over positions of |difference| / |hidden
state|. Of forwards of one shape, rounding is the same but for a near tie of experts, which moves few positions.
"""
RESHAPED = 0.25
"""The same in 16 bits between forwards of two shapes: deep models add up to percents of rounding."""

Forward = Callable[[View], Float[Tensor, "rows hidden"]]
"""From what a model reads to what goes into its head."""
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


class MeasureOnceSharded(TrainerCallback):
    """Measures a student that an engine shards, before its first step: earlier it is not whole, or not there."""

    def __init__(self, measure: Callable[[], None]) -> None:
        self.measure = measure

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.measure()


def require_causal_lm(
    model: nn.Module, wrapped: nn.Module, head: LMHead, collate: Collator | None, accelerator: Accelerator
) -> None:
    """Raises ValueError if a student, `wrapped` by the engine that trains it, sees later tokens or, with a `collate`
    that packs rows, other documents.
    """
    forward = student_forward(wrapped, head)
    require_causal(model, forward, accelerator)
    if collate is not None:
        require_documents_apart(model, forward, collate, accelerator)


def student_forward(model: nn.Module, head: LMHead) -> Forward:
    """That of a student, as in evaluation."""

    def forward(view: View) -> Float[Tensor, "rows hidden"]:
        with evaluating(model):
            return kept_of(model, head, view).hidden

    return forward


def require_causal(model: nn.Module, forward: Forward, accelerator: Accelerator) -> None:
    """Raises ValueError if a later token changes what `model` says at an earlier position."""
    first, second, _ = _documents(model)
    half = LENGTH // 2
    rows = torch.tensor([first, first[:half] + second[half:]])
    batch = {"input_ids": rows, "attention_mask": torch.ones_like(rows), "labels": rows}
    before, after = _read(model, forward, batch, accelerator)
    if _differ(before[:half], after[:half], accelerator):
        raise ValueError(
            f"{_name(model)} is not causal: a later token changes what it says at an earlier position, so it cannot "
            "tell the next token. Take a causal LM: a decoder (is_decoder=true in a config.json that has it)."
        )


def require_documents_apart(model: nn.Module, forward: Forward, collate: Collator, accelerator: Accelerator) -> None:
    """Raises ValueError if the documents of a row that `collate` packs change each other in `model`."""
    first, second, other = ({"input_ids": ids, "labels": list(ids)} for ids in _documents(model))
    packed = _read(model, forward, collate([first, second]), accelerator)
    after_other = _read(model, forward, collate([other, second]), accelerator)[1]
    alone = [_read(model, forward, collate([document]), accelerator)[0] for document in (first, second)]
    moved = any(_differ(*pair, accelerator, rounded=RESHAPED) for pair in zip(packed, alone, strict=True))
    if moved or _differ(after_other, packed[1], accelerator):
        raise ValueError(
            f"{_name(model)} does not keep the documents of a packed row apart: each would be read as going on from "
            "the ones before it. Set packing=False and padding_free=False, or take a model of another family."
        )


@torch.no_grad()
def _read(
    model: nn.Module, forward: Forward, batch: Mapping[str, Any], accelerator: Accelerator
) -> list[Float[Tensor, "rows hidden"]]:
    """What goes into the head, for each document of the batch."""
    try:
        with accelerator.autocast():
            hidden = forward(View.of(batch).to(accelerator.device))
    except (ValueError, RuntimeError, AssertionError) as error:
        kind = "text" if "attention_mask" in batch else "packed rows (set packing=False and padding_free=False)"
        raise ValueError(f"{_name(model)} cannot read {kind}: {type(error).__name__} {error}") from error
    return list(hidden.unflatten(0, (-1, LENGTH - 1)))


def _documents(model: nn.Module) -> tuple[list[int], list[int], list[int]]:
    """Three texts without a token in common, from the middle of the vocabulary: special tokens lie at its ends."""
    size = output_projection(base_of(model)).out_features
    ids = torch.linspace(size / 4, 3 * size / 4, 3 * LENGTH).long().tolist()
    return ids[::3], ids[1::3], ids[2::3]


def _differ(
    hidden: Float[Tensor, "rows hidden"],
    expected: Float[Tensor, "rows hidden"],
    accelerator: Accelerator,
    rounded: float = ROUNDED,
) -> bool:
    is_rounded = accelerator.mixed_precision in ("bf16", "fp16") or torch.finfo(hidden.dtype).bits == 16
    change = (hidden.double() - expected.double()).norm(dim=-1) / expected.double().norm(dim=-1).clamp(min=1e-30)
    return bool(change.median() > (rounded if is_rounded else EXACT))


def _name(model: nn.Module) -> str:
    base = base_of(model)
    return f"{type(base).__name__} (model type {base.config.model_type})"
