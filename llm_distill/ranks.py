"""The processes of this run, before any trainer has set them up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object, parse_flag_from_env

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others: one may have longer texts to write, or filter what all have written."""


def ranks() -> PartialState:
    """The state of accelerate, which by itself does not see that a launch of several ranks is for CPUs: each would take
    itself for the only one.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=PATIENCE)


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
