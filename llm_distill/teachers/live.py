"""Teachers that run beside the student: a model of their own, or the student without its adapters."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import extract_commit_hash
from trl.models import prepare_deepspeed

from llm_distill.heads import LMHead
from llm_distill.models import (
    HUB_OPTIONS,
    bits_and_bytes,
    describe_model,
    files_hash,
    find_config,
    hidden_of_counted_rows,
    own_tokenizer,
    refuse_past_context,
    require_same_ids,
    vocabulary_size,
)
from llm_distill.rows import Batch
from llm_distill.signals import HiddenSignal
from llm_distill.teachers.base import Teacher


class LiveTeacher(Teacher):
    """A causal LM in memory: dense, mixture of experts, quantised; on one device or sharded as the student is.

    It is never trained and never in `train()`: no dropout, no router noise, no auxiliary loss, no gradients.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """`tokenizer` is compared with the student's; without one, the model's own folder or repository is asked."""
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer or own_tokenizer(model)
        self.head = LMHead.of(model)
        self._wrapped: nn.Module | None = None
        self._description = describe_model(model, self.tokenizer)
        if hasattr(model.config.get_text_config(), "output_router_logits"):
            model.config.get_text_config().output_router_logits = False

    @classmethod
    def load(
        cls,
        name_or_path: str,
        *,
        revision: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        trust_remote_code: bool = False,
        **init_kwargs: Any,
    ) -> LiveTeacher:
        """From the Hub or a folder, in the checkpoint's own dtype unless `dtype` says otherwise.

        Raises:
            ValueError: nothing loadable is there.
        """
        if load_in_4bit + load_in_8bit + ("quantization_config" in init_kwargs) > 1:
            raise ValueError("a teacher is loaded in 4 bits, in 8 bits or with a quantization_config: choose one.")
        init_kwargs = {"dtype": "auto", "trust_remote_code": trust_remote_code, "revision": revision, **init_kwargs}
        if load_in_4bit or load_in_8bit:
            init_kwargs["quantization_config"] = bits_and_bytes(4 if load_in_4bit else 8)
        if "quantization_config" in init_kwargs:
            init_kwargs.setdefault("device_map", {"": PartialState().device})  # what is packed is not moved later
        hub = {name: init_kwargs[name] for name in HUB_OPTIONS if name in init_kwargs}
        config_file = find_config(name_or_path, **hub)
        with _whole_on_every_rank():
            model = AutoModelForCausalLM.from_pretrained(name_or_path, **init_kwargs)
        model.config._commit_hash = extract_commit_hash(config_file, None)  # no longer kept by every transformers
        teacher = cls(model, own_tokenizer(model, trust_remote_code=init_kwargs["trust_remote_code"], **hub))
        teacher._description |= files_hash(config_file)
        return teacher

    def fit_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if self.tokenizer is not None:
            require_same_ids(self.tokenizer, tokenizer)
        else:
            warnings.warn(
                "the teacher came without a tokenizer, so only the sizes of the vocabularies could be compared. Pass "
                "LiveTeacher(model, tokenizer) to have the ids compared too.",
                stacklevel=2,
            )
        self.head = LMHead.of(self.model, vocab_size=vocabulary_size(tokenizer))

    @property
    def max_length(self) -> int | None:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) and limit > 0 else None

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        students = {id(parameter) for parameter in student.parameters()}
        if any(id(parameter) in students for parameter in self.model.parameters()):
            raise ValueError(
                "teacher and student share their weights, so the teacher would change with the student. Load it a "
                "second time, or set teacher_adapters_off for a student with adapters."
            )
        if self._wrapped is None:  # once, however many students it teaches
            self._wrapped = _shard_as_the_student(self.model, accelerator)

    @torch.no_grad()
    def score(self, batch: Batch) -> HiddenSignal:
        length = batch.get("max_length_q", batch["input_ids"].shape[1])  # of the longest document, if packed
        refuse_past_context(length, self.max_length, "the batch")
        model = self.model if self._wrapped is None else self._wrapped
        return HiddenSignal(hidden_of_counted_rows(model, self.head, batch), self.head)

    def describe(self) -> dict[str, Any]:
        return self._description


@contextmanager
def _whole_on_every_rank() -> Iterator[None]:
    """In some versions of transformers, FSDP's cpu_ram_efficient_loading leaves all ranks but the first empty, and
    accelerate then fills up the student alone.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    was = os.environ.pop(name, None)
    try:
        yield
    finally:
        if was is not None:
            os.environ[name] = was


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
