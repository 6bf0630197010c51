"""The processes of this run, before any trainer has set them up."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def ranks() -> PartialState:
    """The state of accelerate, which by itself does not see that a launch of several ranks is for CPUs: each would take
    itself for the only one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
