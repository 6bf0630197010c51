"""How weights are packed when a model is loaded."""

from __future__ import annotations

import torch
from transformers import BitsAndBytesConfig


def bits_and_bytes(bits: int) -> BitsAndBytesConfig:
    """4 bits (nf4) or 8, by bitsandbytes."""
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
