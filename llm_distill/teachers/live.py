"""A teacher that runs beside the student: a model of its own."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.models import prepare_deepspeed

from llm_distill.heads import LMHead
from llm_distill.models import HEAD, LAYERS, LanguageModel, Needs, unshared_tokens
from llm_distill.probes import Collator, require_causal, require_documents_apart
from llm_distill.rows import View
from llm_distill.signals import HiddenSignal
from llm_distill.teachers.base import Teacher


class LiveTeacher(Teacher):
    """A causal LM in memory: dense, mixture of experts, quantised; on one device or sharded as the student is.

    It is never trained and never in `train()`: no dropout, no router noise, no auxiliary loss, no gradients.
    """

    can = frozenset({"head"}) | LAYERS

    def __init__(
        self, model: PreTrainedModel | LanguageModel, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> None:
        """`tokenizer` is compared with the student's; without one, the model's own folder or repository is asked."""
        self.language_model = model if isinstance(model, LanguageModel) else LanguageModel(model, tokenizer)
        config = self.model.eval().requires_grad_(False).config.get_text_config()
        if hasattr(config, "output_router_logits"):
            config.output_router_logits = False
        self._wrapped: nn.Module | None = None

    @classmethod
    def load(cls, name_or_path: str, **options: Any) -> LiveTeacher:
        """From the Hub or a folder: see `LanguageModel.load`."""
        return cls(LanguageModel.load(name_or_path, **options))

    @property
    def model(self) -> PreTrainedModel:
        return self.language_model.model

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        return self.language_model.tokenizer

    @property
    def head(self) -> LMHead:
        return self.language_model.head

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        return (self.language_model,)

    @property
    def max_length(self) -> int | None:
        return self.language_model.max_length

    def fit_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.tokenizer is None:
            warnings.warn(
                "the teacher came without a tokenizer, so only the sizes of the vocabularies could be compared. Pass "
                "LiveTeacher(model, tokenizer) to have the ids compared too.",
                stacklevel=2,
            )
        self.language_model.fit_to(tokenizer)
        if self.tokenizer is not None and (unshared := unshared_tokens(self.tokenizer, tokenizer)):
            warnings.warn(
                f"the teacher has no {', '.join(unshared)} where the student has it: what it says of them is of "
                "other tokens. Texts that have them are refused.",
                stacklevel=2,
            )

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        students = {id(parameter) for parameter in student.parameters()}
        if any(id(parameter) in students for parameter in self.model.parameters()):
            raise ValueError(
                "teacher and student share their weights, so the teacher would change with the student. Load it a "
                "second time, or set teacher_adapters_off for a student with adapters."
            )
        if self._wrapped is None:  # once, however many students it teaches
            self._wrapped = _shard_as_the_student(self.model, accelerator)
            require_causal(self.model, self._hidden, accelerator)
            if isinstance(self._wrapped, FSDPModule):
                self._wrapped.reshard()  # a forward leaves the head whole

    def require_documents_apart(self, collate: Collator, accelerator: Accelerator) -> None:
        require_documents_apart(self.model, self._hidden, collate, accelerator)

    def _hidden(self, view: View) -> Tensor:
        return self.language_model.keep(view, wrapped=self._wrapped).hidden

    @torch.no_grad()
    def score(self, view: View, needs: Needs = HEAD) -> HiddenSignal:
        return HiddenSignal(*self.language_model.keep(view, needs, self._wrapped))

    def describe(self) -> dict[str, Any]:
        return self.language_model.describe()


def _shard_as_the_student(model: PreTrainedModel, accelerator: Accelerator) -> nn.Module:
    """The teacher under the engine that holds the student: FSDP2 and ZeRO-3 shard it, otherwise each rank has it.

    Packed 4-bit and 8-bit weights cannot be sharded and stay whole on every rank, where they were loaded.
    """
    if getattr(model, "is_quantized", False):
        return model
    if accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.state.deepspeed_plugin.zero_stage == 3:
        return prepare_deepspeed(model, accelerator)
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError("FSDP 1 is not supported: set fsdp_version: 2 in the accelerate configuration.")
        plugin = accelerator.state.fsdp_plugin
        mesh = accelerator.torch_device_mesh
        fsdp_mesh = None if mesh is None else mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
        options = {"mesh": fsdp_mesh, "offload_policy": plugin.cpu_offload}
        if plugin.mixed_precision_policy is not None:
            options["mp_policy"] = plugin.mixed_precision_policy
        return shard_layers(model, **{name: value for name, value in options.items() if value is not None})
    if getattr(model, "hf_device_map", None) is None:
        model.to(accelerator.device)
    return model


def shard_layers(model: PreTrainedModel, **options: Any) -> nn.Module:
    """FSDP2 on each transformer layer and on what remains; the head stays whole after a forward, for the loss."""
    layers = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    if not layers:
        raise ValueError(f"{type(model).__name__} does not name its layers (_no_split_modules): FSDP cannot shard it.")
    for layer in layers:
        fully_shard(layer, **options)
    return fully_shard(model, reshard_after_forward=False, **options)
