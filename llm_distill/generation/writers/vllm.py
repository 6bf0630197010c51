"""vLLM writes as the student: TRL's `VLLMGeneration`, which is given the student's weights when they have changed.

They are given by vLLM's own `reload_weights`, or to its server by TRL's client, and not by TRL's `sync_weights`. That
merges adapters into the student itself and subtracts them afterwards, which in bfloat16 does not give back the weights
that were there; and it writes into vLLM's parameters, which a CPU has packed into others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_distill.generation.engines.base import Completion, Sampling
from llm_distill.generation.options import VLLMOptions
from llm_distill.generation.writers.base import Writer
from llm_distill.heads import base_of
from llm_distill.loading import LOADING_ERRORS
from llm_distill.models import bits_of
from llm_distill.students.gathered import gathered
from llm_distill.students.modules import modules_set_aside

ADAPTED = (BaseTunerLayer, ModulesToSaveWrapper)
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Of as many bytes as a number has."""


class VLLMWriter(Writer):
    """vLLM on the student's own devices, a copy of the student for each rank or group of ranks, or behind a server.

    Raises:
        ValueError: a quantised student, one that is not of the shape of what it was loaded from, a server without CUDA,
            ranks that do not divide into groups.
    """

    def __init__(
        self,
        student: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        accelerator: Accelerator,
        options: VLLMOptions,
    ) -> None:
        super().__init__(student, tokenizer, sampling, accelerator)
        self._ranks_of_group, self._limit = options.vllm_tensor_parallel_size, options.vllm_max_model_length
        self._is_server = options.vllm_mode == "server"
        self._require_possible()
        from trl.generation.vllm_generation import VLLMGeneration  # imports vLLM: seconds

        with seeded(0, accelerator.device):  # vLLM seeds what is everybody's
            self.vllm = VLLMGeneration(
                student,
                accelerator,
                tokenizer,
                mode=options.vllm_mode,
                server_base_url=options.vllm_server_base_url,
                server_host=options.vllm_server_host,
                server_port=options.vllm_server_port,
                server_timeout=options.vllm_server_timeout,
                group_port=options.vllm_group_port,
                tensor_parallel_size=options.vllm_tensor_parallel_size,
                gpu_memory_utilization=options.vllm_gpu_memory_utilization,
                max_model_length=options.vllm_max_model_length,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=sampling.top_k,
                repetition_penalty=sampling.repetition_penalty,
                max_completion_length=sampling.max_new_tokens,
                logprobs=None,
            )
        self._sent: list[int] | None = None
        self._metadata: list[tuple[str, str, list[int]]] = []

    @property
    def max_length(self) -> int | None:
        return min(filter(None, (self._limit, super().max_length)), default=None)

    @property
    def group(self) -> int:
        return 0 if self._is_server else self.accelerator.process_index // self._ranks_of_group

    def write(self, prompts: list[list[int]], seed: int) -> list[Completion]:
        self.send_weights()
        count = len(prompts)
        if self._is_server or self._ranks_of_group > 1:  # what came back is divided evenly between ranks
            counts = self.accelerator.gather(torch.tensor([count], device=self.accelerator.device))
            prompts = prompts + [[min(self.ends, default=0)]] * (int(counts.max()) - count)
        if not prompts:
            return []
        self.vllm.generation_kwargs = {"stop_token_ids": sorted(self.ends)}
        with seeded(seed, self.accelerator.device):
            _, written, _, _ = self.vllm.generate(prompts, None, num_generations=1)
        return [self.engine.cut_after_end(list(ids)) for ids in written[:count]]

    @torch.no_grad()
    def send_weights(self) -> None:
        """Gives vLLM the student's weights if they are others than it was given last."""
        with gathered(self.student, self.accelerator), modules_set_aside(self.student):
            sums = sums_of_bits(self.student)
            if sums == self._sent:
                return
            if not self._is_server:
                weights = {"weights_iterator": merged_weights(self.student)}
                self.vllm.llm.collective_rpc("reload_weights", kwargs=weights)
                self.vllm.llm.reset_prefix_cache()
            elif self.accelerator.is_main_process:
                self._metadata = self._metadata or [
                    (name, str(weight.dtype).removeprefix("torch."), list(weight.shape))
                    for name, weight in merged_weights(self.student)
                ]
                self.vllm.vllm_client.update_named_params(self._metadata, merged_weights(self.student))
                self.vllm.vllm_client.reset_prefix_cache()
        self._sent = sums

    def _require_possible(self) -> None:
        ranks, base = self.accelerator.num_processes, base_of(self.student)
        if bits_of(base) is not None:
            raise ValueError(
                "use_vllm does not go with a quantised student: leave it out, or load the student as it is."
            )
        if self._is_server and self.accelerator.device.type != "cuda":
            raise ValueError(
                f"vllm_mode=server sends the student's weights through NCCL, which needs CUDA, and the student is on "
                f"{self.accelerator.device}: set vllm_mode=colocate, or leave use_vllm out."
            )
        matrices = (base.get_input_embeddings(), base.get_output_embeddings())
        if base.config.get_text_config().tie_word_embeddings and any(
            isinstance(module, ADAPTED) for module in matrices
        ):
            raise ValueError("use_vllm ties the student's two embeddings, and adapters untie them: adapt neither.")
        if ranks % self._ranks_of_group:
            raise ValueError(f"vllm_tensor_parallel_size={self._ranks_of_group} must divide the {ranks} ranks.")
        if not self._is_server:
            require_shape_on_disk(base)


def require_shape_on_disk(model: PreTrainedModel) -> None:
    """Raises ValueError where a model has another shape than what it was loaded from, as with layers cut in memory."""
    place, own = model.name_or_path, model.config
    try:
        config = AutoConfig.from_pretrained(place) if place else None
    except LOADING_ERRORS:
        config = None
    if config is None or (type(config) is type(own) and shapes_of(model, config) != shapes_of(model, own)):
        raise ValueError(
            f"vLLM reads the student's shape from where it was loaded from, and {place or 'that is nowhere'!r} has "
            f"{'no model' if config is None else 'another shape'}: save the student, and name the folder as the model."
        )


def shapes_of(model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, torch.Size]:
    """The shapes of the parameters of a model of this configuration."""
    with torch.device("meta"):
        twin = type(model)(type(config).from_dict(config.to_dict()))
    return {name: parameter.shape for name, parameter in twin.named_parameters()}


def sums_of_bits(model: nn.Module) -> list[int]:
    """Of each tensor that is trained, the sum of its numbers' bits: another if but one of them has changed."""
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    sums = [weight.view(INTEGERS[weight.element_size()]).sum(dtype=torch.int64) for weight in trained]
    return torch.stack(sums).tolist() if sums else []


def merged_weights(student: PreTrainedModel | PeftModel) -> Iterator[tuple[str, Tensor]]:
    """A student's weights under the names of its checkpoint, with adapters merged into a copy of one layer at a time:
    its own stay what they are, to the bit. Tied weights come once.
    """
    return _merged(base_of(student), "", set())


def _merged(module: nn.Module, prefix: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    original = module
    if isinstance(module, BaseTunerLayer):
        copied: Any = copy.deepcopy(module)
        copied.merge()
        original, module = module.get_base_layer(), copied.get_base_layer()
    elif isinstance(module, ModulesToSaveWrapper):
        original = module = module.modules_to_save[module.active_adapters[0]]
    own = original.named_parameters(recurse=False)
    for (name, parameter), weight in zip(own, module.parameters(recurse=False), strict=True):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            yield prefix + name, weight.detach()
    for name, child in module.named_children():
        yield from _merged(child, f"{prefix}{name}.", seen)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Inside, what is random depends on the seed alone. Outside, nothing notices."""
    numpys = np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpys)
