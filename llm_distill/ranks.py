"""The processes of this run, before any trainer has set them up, and the machine on which they run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, parse_flag_from_env

Item = TypeVar("Item")
Result = TypeVar("Result")

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
"""Engines that give each rank a part of every weight: until training begins no rank has a model that runs."""
PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others: one may have longer texts to write, or filter what all have written."""


def ranks() -> PartialState:
    """The state of accelerate, which by itself does not see that a launch of several ranks is for CPUs: each would take
    itself for the only one.
    """
    return PartialState(cpu=is_on_cpu(), timeout=PATIENCE)


def is_on_cpu() -> bool:
    """Whether models run on the CPU: accelerate was told so, or there is no accelerator."""
    return parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()


def has_fast_bfloat16() -> bool:
    """Whether the processor multiplies matrices in bfloat16 faster than in float32: it has AVX512-BF16 or AMX."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older releases of torch lack it
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def run_on_first_rank(function: Callable[[], Result]) -> Result:
    """What it returns there, on every rank, or its ValueError. The others wait."""
    outcome: list[Any] = [None]
    if ranks().is_main_process:
        try:
            outcome = [function()]
        except ValueError as error:
            outcome = [error]
    broadcast_object_list(outcome)
    if isinstance(outcome[0], ValueError):
        raise outcome[0]
    return outcome[0]


def map_over_ranks(function: Callable[[Sequence[Item]], Sequence[Result]], items: Sequence[Item]) -> list[Result]:
    """What it makes of each item, in their order: every rank gives it a share of them, and all get the whole."""
    state = ranks()
    places = range(state.process_index, len(items), state.num_processes)
    results = function([items[place] for place in places])
    result_of = dict(gather_object(list(zip(places, results, strict=True))))
    return [result_of[place] for place in range(len(items))]
