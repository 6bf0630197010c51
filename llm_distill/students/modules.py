"""What terms of the objective train beside the student: in it while it trains, and no part of it when it is saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llm_distill.heads import base_of
from llm_distill.losses.in_forward import MODULES

FILE = f"{MODULES}.safetensors"


def add_modules(model: nn.Module, modules: nn.ModuleDict) -> None:
    """Makes them a part of the model, so that an engine that wraps it shards and synchronises them as the rest."""
    if len(modules):
        base = base_of(model)
        base.add_module(MODULES, modules.to(base.device, torch.promote_types(base.dtype, torch.float32)))


@contextmanager
def modules_set_aside(model: nn.Module) -> Iterator[nn.ModuleDict | None]:
    """Inside, the model is the student alone, as it is saved and loaded."""
    base = base_of(model)
    modules = base._modules.pop(MODULES, None)
    try:
        yield modules  # type: ignore[misc]
    finally:
        if modules is not None:
            base.add_module(MODULES, modules)


def save_modules(
    modules: nn.ModuleDict | None, folder: str, state_dict: dict[str, Any] | None
) -> dict[str, Any] | None:
    """Writes them into a checkpoint; of a state that an engine has gathered, the student's part."""
    if modules is None:
        return state_dict
    state: dict[str, Tensor] = modules.state_dict()
    if state_dict is not None:
        own = {name: name.partition(f"{MODULES}.")[2] for name in state_dict if f"{MODULES}." in name}
        state = {short: state_dict[name] for name, short in own.items()}
        state_dict = {name: value for name, value in state_dict.items() if name not in own}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, Path(folder, FILE))
    return state_dict


def load_modules(modules: nn.ModuleDict | None, folder: str) -> None:
    """From a checkpoint. What an engine has sharded it loads by itself."""
    path = Path(folder, FILE)
    if modules is not None and path.is_file():
        modules.load_state_dict(load_file(path))
