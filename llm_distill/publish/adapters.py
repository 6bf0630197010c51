"""A student as one model, whether adapters or weights lie in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from llm_distill.loading import load_model, merge_adapters

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
    model = load_model(str(folder), **{"dtype": "auto", **options})
    return (merge_adapters(model) if isinstance(model, PeftModel) else model).eval()
