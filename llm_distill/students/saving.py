"""The end of a run rehearsed at its start: whether what lies beside the weights of a student can be saved."""

from __future__ import annotations

import logging
from tempfile import TemporaryDirectory

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

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
