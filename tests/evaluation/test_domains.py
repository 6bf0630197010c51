"""Texts of a domain."""

from __future__ import annotations

import copy

import pytest
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from llm_distill.evaluation.domains import split_into_windows


@pytest.mark.parametrize("starts", [False, True])
def test_a_long_text_is_read_to_its_end_each_token_once(tokenizer: PreTrainedTokenizerBase, starts: bool) -> None:
    text = "".join(f"x{i} = {i}\n" for i in range(30))
    tokenizer = copy.deepcopy(tokenizer)
    if starts:
        tokenizer.bos_token = "!"
        start = TemplateProcessing(single="! $A", special_tokens=[("!", tokenizer.bos_token_id)])
        tokenizer._tokenizer.post_processor = start
    rows = split_into_windows(Dataset.from_dict({"text": ["", text]}), tokenizer, 16)
    of_text = [row["input_ids"] for row in rows if row["text_index"] == 1]
    assert max(map(len, of_text)) == 16
    predicted = [token for row in of_text for token in row[1:]]
    whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert predicted == whole[1:]
    assert all(row[0] == tokenizer.bos_token_id for row in of_text) == starts
