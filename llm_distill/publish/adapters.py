"""A student as one model, whether adapters or weights lie in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

ADAPTER_CONFIG = "adapter_config.json"


def load_merged(folder: str | Path, **options: Any) -> PreTrainedModel:
    """The student in evaluation mode, its adapters merged into the weights of their model: in that model's own
    precision, also if it was trained upon in 4 or 8 bits.

    Args:
        folder: of a student.
        options: further ones for `from_pretrained`.

    Raises:
        ValueError: nothing loadable is there, or adapters that are no change of weights.
    """
    options = {"dtype": "auto", **options}
    try:
        if not Path(folder, ADAPTER_CONFIG).is_file():
            return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
        config = PeftConfig.from_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path, revision=config.revision, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"the student in {folder} cannot be loaded. ({error})") from error
    model = PeftModel.from_pretrained(base, folder)
    if not hasattr(model, "merge_and_unload") or not hasattr(model.base_model, "merge_and_unload"):
        raise ValueError(
            f"adapters of the kind {config.peft_type.value} are no change of weights, so they cannot be merged."
        )
    return model.merge_and_unload(safe_merge=True).eval()
