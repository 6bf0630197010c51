"""Sums of two numbers, as a task with answers that can be checked."""

from __future__ import annotations

from llm_distill.data.sums import is_right, split_sums, tokenizer_of_digits


def test_what_is_decoded_can_be_read_again_and_is_right() -> None:
    tokenizer = tokenizer_of_digits()
    for row in split_sums(taught=20)["taught"]:
        ids = tokenizer(row["completion"])["input_ids"]
        written = tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True)
        assert tokenizer(written)["input_ids"] == ids
        assert is_right(row["prompt"], written, row)
    assert not is_right("12+34=", "047", {})
