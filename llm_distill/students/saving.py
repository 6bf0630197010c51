"""The end of a run rehearsed at its start: whether a student, and what lies beside its weights, can be saved."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from llm_distill.heads import base_of
from llm_distill.loading import LOADING_ERRORS

logger = logging.getLogger(__name__)

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
"""What a generation config says of sampling, and may say only if it samples."""


def require_savable(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError, naming what cannot be saved. A generation config that contradicts itself is set right."""
    base = base_of(model)
    parts = {"configuration": base.config, "tokenizer": tokenizer}
    if base.generation_config is not None:
        _set_right(base.generation_config)
        parts["generation config"] = base.generation_config
    if isinstance(model, PeftModel):
        parts["configuration of adapters"] = model.active_peft_config
    for name, part in parts.items():
        try:
            with TemporaryDirectory(prefix="llm-distill-rehearsal-") as folder:
                part.save_pretrained(folder)
        except LOADING_ERRORS as error:
            raise ValueError(
                f"the student's {name} could not be saved when it is trained: {error} Set it right before training, "
                "in the folder that the student is loaded from or in Python."
            ) from error


class DiskNeeds(NamedTuple):
    """Bytes of the disk that holds the output folder."""

    student: int
    checkpoints: int
    """As many as are there at once, as far as the options tell."""
    free: int

    def __str__(self) -> str:
        parts = (f"the student takes {self.student / 1e9:.3g} GB", f"its checkpoints {self.checkpoints / 1e9:.3g} GB")
        return f"{', '.join(parts)}, of {self.free / 1e9:.3g} GB free"


def disk_needs(model: PreTrainedModel | PeftModel, args: TrainingArguments) -> DiskNeeds:
    """What a run writes, with an optimizer that keeps two numbers for each weight, as Adam does."""
    weights = [
        (getattr(weight, "ds_numel", weight.numel()) * weight.element_size(), weight.requires_grad)
        for weight in model.parameters()
    ]
    trained = sum(size for size, is_trained in weights if is_trained)
    student = trained if isinstance(model, PeftModel) else sum(size for size, _ in weights)
    count = 0
    if args.save_strategy != "no":
        count = int(args.max_steps // args.save_steps) if args.max_steps > 0 and args.save_steps >= 1 else 1
        count = max(1, min(count, (args.save_total_limit or count) + 1))  # the oldest goes when the newest is there
    checkpoint = student + (0 if args.save_only_model else 2 * trained)
    folder = Path(args.output_dir).absolute()
    disk = next(path for path in (folder, *folder.parents) if path.exists())
    return DiskNeeds(student, count * checkpoint, shutil.disk_usage(disk).free)


def require_disk(model: PreTrainedModel | PeftModel, args: TrainingArguments) -> None:
    """Raises ValueError if the student alone is larger than what is free."""
    needs = disk_needs(model, args)
    if needs.student > needs.free:
        raise ValueError(
            f"{args.output_dir} is on a disk that cannot hold the student: {needs}. Free some, or choose another "
            "output_dir."
        )


def _set_right(config: GenerationConfig) -> None:
    """Many a published model has a temperature and does not say that it samples: transformers loads that and, once its
    special tokens are those of the tokenizer, no longer saves it.
    """
    try:
        config.validate(strict=True)
    except ValueError:
        if config.do_sample is None:
            config.do_sample = True
            logger.warning("the student's generation config has options of sampling alone: do_sample is set to True.")
        elif not config.do_sample:
            for name in SAMPLING:
                setattr(config, name, None)
            logger.warning("the student's generation config does not sample: its options of sampling are left out.")
