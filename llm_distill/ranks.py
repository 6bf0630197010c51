"""The processes of this run, before any trainer has set them up, and the machine on which they run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

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
