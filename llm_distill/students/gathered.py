"""A sharded student, whole on each rank for a while: what writes token by token would gather it for every token.

Nothing is sent between ranks while it is whole, so each may write as many texts as it has, of any length, or none.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from trl.models import unwrap_model_for_generation


def require_gatherable(accelerator: Accelerator) -> None:
    """Raises ValueError for a way to shard of which the whole cannot be had."""
    if accelerator.distributed_type == DistributedType.FSDP and not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 is not supported: set fsdp_version: 2 in the accelerate configuration.")


@contextmanager
def gathered(student: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """Gathers the weights of a student that FSDP2 or ZeRO-3 shards, as every rank must do at the same time; leaves any
    other as it is.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        with unwrap_model_for_generation(accelerator.deepspeed_engine_wrapped.engine, accelerator) as whole:
            # A hook of ZeRO-3 stays before the whole model's forward, in which ranks wait for each other.
            hooks, whole._forward_pre_hooks = whole._forward_pre_hooks, OrderedDict()
            try:
                yield
            finally:
                whole._forward_pre_hooks = hooks
    elif accelerator.distributed_type == DistributedType.FSDP:
        with _gathered_by_fsdp2(student, accelerator.device):
            yield
    else:
        yield


@contextmanager
def _gathered_by_fsdp2(student: nn.Module, device: torch.device) -> Iterator[None]:
    with torch.no_grad():  # the first forward must be the whole student's; what is whole after one stays so
        student(input_ids=torch.zeros(1, 1, dtype=torch.long, device=device), use_cache=False)
    sharded = [
        module
        for module in student.modules()
        if isinstance(module, FSDPModule)
        and module is not student
        and any(isinstance(parameter, DTensor) for parameter in module.parameters())
    ]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()
