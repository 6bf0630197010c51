"""A few texts as blocks of tokens: what a model is run over to see what of it matters."""

from __future__ import annotations

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_distill.config import DistillationConfig
from llm_distill.data.prepare import prepare, spread_rows
from llm_distill.ranks import ranks

BATCH = 8
"""Blocks of a batch."""


def calibration_blocks(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, count: int, length: int
) -> list[Int[Tensor, "batch time"]]:
    """Up to `count` blocks of `length` tokens from all over a dataset (text, prompt/completion or chat), in batches and
    mixed, so that the first batch stands for all. Shorter texts share a block; if all of them together are shorter,
    there is one short block.

    Raises:
        ValueError: there is no text in it.
    """
    args = DistillationConfig(
        output_dir="unused",
        max_length=length,
        packing=True,
        packing_strategy="wrapped",
        bf16=False,
        report_to="none",
        use_cpu=ranks().device.type == "cpu",
    )
    rows = Dataset.from_list(spread_rows(dataset, count))
    blocks = [ids for ids in prepare(tokenizer, args, rows).train["input_ids"] if len(ids) > 1]
    whole = [ids for ids in blocks if len(ids) == length] or blocks[:1]
    if not whole:
        raise ValueError(
            "there is no text to calibrate on: give texts like those that the student will read, a few thousand words."
        )
    mixed = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))[:count].tolist()
    chosen = torch.tensor([whole[place] for place in mixed])
    return list(chosen.split(BATCH))
