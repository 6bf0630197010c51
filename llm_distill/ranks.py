"""The processes of this run, before any trainer has set them up."""

from __future__ import annotations

from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

PATIENCE = timedelta(hours=2)
"""How long a rank waits for the others: one may have longer texts to write, or filter what all have written."""


def ranks() -> PartialState:
    """The state of accelerate, which by itself does not see that a launch of several ranks is for CPUs: each would take
    itself for the only one.
    """
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=PATIENCE)
