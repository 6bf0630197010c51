"""The map from hidden states to logits of any Hugging Face causal LM, without running the rest of the model.

Families differ in what they do after the output projection: Gemma caps the logits softly, Cohere scales them, Granite
divides them. `LMHead.of` does not look that up, it measures it: it lets the model's own code post-process numbers that
we choose, reads the scale and the cap off the result, and checks that they explain all of it. So a family that nobody
has heard of yet is either reproduced or refused by name, never approximated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from jaxtyping import Float
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from peft.utils.other import TrainableTokensWrapper
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class LMHead:
    """logits = soft_cap · tanh(scale · (W h + b) / soft_cap), over the first `vocab_size` rows of W."""

    module: nn.Linear
    """The owner of W and b. They are read at each use, because engines that shard a model swap its parameters."""
    vocab_size: int
    """The logits are those of the first so many rows of W."""
    scale: float = 1.0
    soft_cap: float | None = None
    num_logits: int | None = None
    """How many rows of W get a logit in the model's own forward, the vocabulary's and those past it (None: all)."""

    @classmethod
    def of(cls, model: nn.Module, vocab_size: int | None = None) -> LMHead:
        """The head of `model` (a causal LM, with or without PEFT), over `vocab_size` tokens (default: every row).

        Raises:
            ValueError: the family's logits are not an (optionally scaled and softly capped) linear map of its
                hidden states, or it gives fewer logits than `vocab_size`.
        """
        model = base_of(model)
        projection = output_projection(model)
        keep_differentiable(projection)
        head = _measure_post_processing(model, projection)
        if vocab_size is not None and vocab_size > head.vocab_size:
            raise ValueError(
                f"{type(model).__name__} gives {head.vocab_size:,} logits, fewer than the {vocab_size:,} tokens of the "
                "tokenizer. Resize it (model.resize_token_embeddings) or use the tokenizer that belongs to it."
            )
        return replace(head, vocab_size=vocab_size or head.vocab_size)

    def __call__(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows vocab"]:
        with self.weights() as (weight, bias):
            return self.post_process(nn.functional.linear(hidden, weight, bias))

    def post_process(self, raw: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
        """What the family does to W h + b."""
        raw = raw if self.scale == 1.0 else raw * self.scale
        return raw if self.soft_cap is None else self.soft_cap * torch.tanh(raw / self.soft_cap)

    @property
    def is_linear(self) -> bool:
        """Whether the logits are W h + b as they are, as in most families."""
        return self.scale == 1.0 and self.soft_cap is None

    def post_process_slope(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"] | float:
        """∂ logits / ∂(W h + b), from the logits; 0 where they are below what the cap lets through."""
        if self.soft_cap is None:
            return self.scale
        return self.scale * (1 - (logits / self.soft_cap).clamp(min=-1) ** 2)

    @contextmanager
    def weights(self, *, past_vocabulary: bool = False) -> Iterator[tuple[Tensor, Tensor | None]]:
        """W [vocab_size, hidden] and b [vocab_size], whole and unquantised, wherever the engine keeps them.

        Args:
            past_vocabulary: the rows past the vocabulary that get a logit come after them.
        """
        with _gathered(self.module):
            weight = _whole(self.module.weight)
            bias = None if self.module.bias is None else _whole(self.module.bias)
            rows = (self.num_logits or len(weight)) if past_vocabulary else self.vocab_size
            if rows < len(weight):
                weight, bias = weight[:rows], None if bias is None else bias[:rows]
            yield weight, bias


def base_of(model: Any) -> PreTrainedModel:
    """The model itself, without adapters around it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def output_projection(model: PreTrainedModel) -> nn.Linear:
    """The linear module that makes the logits (the trained copy, where PEFT keeps one).

    Raises:
        ValueError: the model has none, or a kind whose output is not W h + b.
    """
    if model.config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is an encoder with a decoder, which reads two texts: take a causal LM."
        )
    module = model.get_output_embeddings()
    if isinstance(module, ModulesToSaveWrapper):
        module = module.original_module if module.disable_adapters else module.modules_to_save[module.active_adapter]
    if module is None:
        raise ValueError(f"{type(model).__name__} has no output embeddings, so it has no next-token distribution.")
    if isinstance(module, TrainableTokensWrapper):
        raise ValueError(
            f"the output projection of {type(model).__name__} is tied to its embedding (tie_word_embeddings), of which "
            "adapters train single tokens: those of trainable_token_indices, or the new tokens of chat_template_path. "
            "Give a template that adds none (chat_template_path=FILE.jinja), or train without adapters."
        )
    if not isinstance(module, nn.Linear) or type(module).__name__ == "Linear8bitLt":
        raise ValueError(
            f"the output projection of {type(model).__name__} is a {type(module).__name__}, and must be an nn.Linear: "
            "no adapter on it or on the embedding that it is tied to (modules_to_save is fine), and in 4 bits at "
            "least, not in 8 (llm_int8_skip_modules leaves it out, as bitsandbytes does by default)."
        )
    return module


def keep_differentiable(module: nn.Module) -> None:
    """Undoes and forbids the layout that bitsandbytes gives to 4-bit weights in `eval()` on CPUs with AVX512-BF16.

    Its kernel has no backward, so one evaluation would silently cut the gradients of every later step, and
    `dequantize_4bit` cannot read it.
    """
    if getattr(module, "support_avx512bf16_for_cpu", False):
        module.state_dict()  # undoes it, in place
        module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


@contextmanager
def intercepted(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, `module(x)` returns `function(x)`. The module's hooks still run, so an engine that shards it
    gathers the weights for `function` and synchronises their gradients as it would for the module itself.
    """
    own = module.__dict__.get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _measure_post_processing(model: PreTrainedModel, projection: nn.Linear) -> LMHead:
    """Lets `model` post-process raw logits of our choice: the scale is the slope at 0, the cap the limit at ∞."""
    rows = projection.out_features
    raw = torch.cat([torch.tensor([1e-6, 1e30]), torch.linspace(-30, 30, 61), torch.zeros(rows)])[:rows]
    logits = _logits_from_raw(model, projection, raw)
    raw = raw[: len(logits)]  # some families drop the rows past the vocabulary themselves
    scale, limit = float(logits[0] / raw[0]), float(logits[1])
    head = LMHead(
        projection,
        vocab_size=len(logits),
        scale=1.0 if abs(scale - 1) < 1e-6 else scale,
        soft_cap=limit if limit < 1e20 else None,
        num_logits=len(logits),
    )
    if raw.shape != logits.shape or not torch.allclose(head.post_process(raw), logits, rtol=1e-5, atol=1e-6):
        raise ValueError(
            f"{type(model).__name__} does something to its logits besides a scale and a soft cap (measured: scale "
            f"{scale:g}, limit {limit:g}, {len(logits)} logits from {rows}), so its head cannot be reproduced. Distil "
            "from its text instead (sequence-level distillation)."
        )
    return head


@torch.no_grad()
def _logits_from_raw(model: PreTrainedModel, projection: nn.Linear, raw: Float[Tensor, " vocab"]) -> Tensor:
    """What the model's own forward makes of `raw` as the output of its projection. The backbone does not run."""
    device = _device_of(projection)
    called = False

    def raw_logits(hidden: Tensor) -> Tensor:
        nonlocal called
        called = True
        return raw.to(hidden.device).expand(*hidden.shape[:-1], -1)

    width = getattr(model.config.get_text_config(), "hidden_size", projection.in_features)
    hidden = torch.zeros(1, 2, width, device=device, dtype=model.dtype)
    tokens = torch.zeros(1, 2, dtype=torch.long, device=device)
    was_training, backbone = model.training, model.base_model
    no_backbone = intercepted(backbone, lambda *args, **kwargs: _OnlyHidden(hidden))
    model.eval()
    try:
        with intercepted(projection, raw_logits), no_backbone if backbone is not model else nullcontext():
            logits = model(input_ids=tokens, use_cache=False, return_dict=True).logits
    finally:
        model.train(was_training)
    if not called:
        raise ValueError(f"{type(model).__name__} does not call its output embeddings as a module: not supported.")
    return logits[0, -1].float().cpu()


def _device_of(module: nn.Linear) -> torch.device:
    """Where it computes."""
    hook: Any = getattr(module, "_hf_hook", None)
    return torch.device(hook.execution_device) if has_offloaded_params(module) else module.weight.device


class _OnlyHidden:
    """A backbone's output that has hidden states and, asked for anything else, None."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> Any:
        return self.last_hidden_state if index == 0 else ()


def _whole(parameter: Tensor) -> Tensor:
    """The parameter as a plain floating-point tensor: gathered if it is sharded, dequantised if it is 4-bit."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    if hasattr(parameter, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(parameter.data, parameter.quant_state)
    return parameter


def _gathered(module: nn.Module) -> AbstractContextManager[None]:
    """Under ZeRO-3, and where accelerate has offloaded them, a module's parameters outside its own forward are empty:
    gather them for the while.
    """
    if has_offloaded_params(module):
        return align_module_device(module)
    if any(parameter.numel() == 0 and hasattr(parameter, "ds_id") for parameter in module.parameters()):
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(module.parameters()))
    return nullcontext()
