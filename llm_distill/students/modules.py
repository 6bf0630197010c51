"""What terms of the objective train beside the student: in it while it trains, and no part of it when it is saved."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_distill.heads import LMHead, base_of
from llm_distill.losses.features import ChosenDimensions
from llm_distill.losses.in_forward import MODULES
from llm_distill.losses.objective import Objective
from llm_distill.models import evaluating, kept_of
from llm_distill.ranks import SHARDED
from llm_distill.rows import View
from llm_distill.signals import HiddenSignal
from llm_distill.teachers import Teacher

TOKENS = 4
"""With which terms are tried."""
TEXTS = 64
"""By which dimensions are chosen."""
FILE = f"{MODULES}.safetensors"


def add_modules(model: nn.Module, objective: Objective, teacher: Teacher, accelerator: Accelerator) -> None:
    """Makes what its terms train a part of the model, so that an engine that wraps it shards and synchronises it as the
    rest, and tries the terms on a few tokens where the model is still whole.

    Raises:
        ValueError: a term cannot be between these two models.
    """
    if not objective.terms:
        return
    base = base_of(model)
    width = teacher.width or model_of(teacher, model).config.get_text_config().hidden_size
    modules = objective.make_modules(base, width)
    if len(modules):
        base.add_module(MODULES, modules.to(base.device, torch.promote_types(base.dtype, torch.float32)))
    is_whole = accelerator.distributed_type not in SHARDED
    if is_whole and "hidden" in teacher.can:  # what is stored knows other tokens alone
        _try_terms(model, objective, teacher, modules, accelerator)


@torch.no_grad()
def choose_dimensions(
    model: nn.Module, objective: Objective, teacher: Teacher, batches: Iterable[Any], accelerator: Accelerator
) -> None:
    """Lets terms choose dimensions of the teacher by gradient, on a few batches of the train dataset, the same ones on
    every rank.

    Raises:
        ValueError: no token of them counts, or the teacher is sharded.
    """
    modules = getattr(base_of(model), MODULES, {}).values()
    choosing = [module for module in modules if isinstance(module, ChosenDimensions)]
    if not choosing:
        return
    if accelerator.distributed_type in SHARDED:
        raise ValueError("hidden: dimensions=by_gradient cannot be chosen where models are sharded: train under DDP.")
    for batch in batches:
        view = View.of_teacher(batch).to(accelerator.device)
        with accelerator.autocast():
            signal = teacher.score(view, objective.teacher_needs)
        assert isinstance(signal, HiddenSignal), "the objective needs what goes into the head"
        for module in choosing:
            module.add_importance(signal, view.positions.targets)
    for module in choosing:
        module.choose()


def model_of(teacher: Teacher, student: nn.Module) -> PreTrainedModel:
    """The model in memory whose layers a teacher tells of: the student's own base, if it is a state of the student."""
    return teacher.models[0].model if teacher.models else base_of(student)


@torch.no_grad()
def _try_terms(
    model: nn.Module, objective: Objective, teacher: Teacher, modules: nn.ModuleDict, accelerator: Accelerator
) -> None:
    ids = torch.arange(1, 1 + TOKENS).expand(2, -1)
    view = View.of({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}).to(accelerator.device)
    with evaluating(model), accelerator.autocast():
        signal = teacher.score(view, objective.teacher_needs)
        kept = kept_of(model, LMHead.of(model), view, objective.student_needs)
        objective.values_of_terms(kept, signal, view.positions, modules)


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
