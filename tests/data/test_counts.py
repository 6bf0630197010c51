"""Rows of which nothing is left to learn are counted, and everybody who looks is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tiny import tiny_llama
from transformers import PreTrainedTokenizerBase

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.data.counts import RowCounts
from llm_distill.data.prepare import prepare

LONG, SHORT = "def f(x): return x + 1\n" * 20, "hi"
PAIRS = [(LONG, "x = 1")] * 3 + [(SHORT, "x = 1" * 40)] * 2 + [(SHORT, "x = 1")]
DATA = Dataset.from_list([{"prompt": prompt, "completion": completion} for prompt, completion in PAIRS])


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, RowCounts(6, 3, 2)),
        ({"packing": True}, RowCounts(6, 3, 5)),
        ({"packing": True, "packing_strategy": "wrapped"}, None),
        ({"packing": True, "packing_strategy": "bfd_split"}, None),
        ({"max_length": None}, RowCounts(6, 0, 0)),
    ],
)
def test_rows_are_counted_before_and_after(
    config: Callable[..., DistillationConfig],
    tokenizer: PreTrainedTokenizerBase,
    options: dict[str, Any],
    counts: RowCounts | None,
) -> None:
    args = config(**({"max_length": 32} | options))
    prepared = prepare(tokenizer, args, DATA, {"mail": DATA.select([0, 5])})
    assert prepared.row_counts.get("train") == counts
    assert counts is None or prepared.row_counts["mail"].lost == bool(counts.lost)
    assert prepare(tokenizer, args, DATA.to_iterable_dataset()).row_counts == {}


def test_short_rows_that_are_wrapped_into_fewer_blocks_are_not_lost(
    config: Callable[..., DistillationConfig], tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = Dataset.from_list([{"text": "import os"}] * 3)
    args = config(packing=True, packing_strategy="wrapped")
    assert prepare(tokenizer, args, texts, texts).row_counts == {}
    assert prepare(tokenizer, config(), texts).row_counts == {"train": RowCounts(3, 0, 0)}


def test_rows_that_are_lost_are_in_the_log_the_check_the_record_and_the_card(
    config: Callable[..., DistillationConfig],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = DistillationTrainer(
        model=tiny_llama(1),
        teacher=LiveTeacher(tiny_llama(2), tokenizer),
        args=config(max_length=32),
        train_dataset=DATA,
        processing_class=tokenizer,
    )
    words = "nothing is left to learn in 3 of 6 rows, and 2 fill max_length"
    assert caplog.text.count(words) == 1
    (finding,) = (finding for finding in trainer.check().findings if finding.what == "rows")
    assert (finding.level, finding.text) == ("amber", words)
    trainer.save_model()
    trainer.create_model_card(dataset_name="somebody/pairs")
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert (record["data.texts"], record["data.texts_lost"], record["data.texts_cut"]) == (6, 3, 2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "6 texts (nothing was left to learn in 3 of them), 2 cut at max_length" in card


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_a_stream_are_counted_as_they_come(
    config: Callable[..., DistillationConfig],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    workers: int,
) -> None:
    trainer = DistillationTrainer(
        model=tiny_llama(1),
        teacher=LiveTeacher(tiny_llama(2), tokenizer),
        args=config(max_length=32, max_steps=2, dataloader_num_workers=workers),
        train_dataset=DATA.to_iterable_dataset(num_shards=2),
        processing_class=tokenizer,
    )
    words = "nothing is left to learn in 3 of 6 rows, and 2 fill max_length"
    (finding,) = (finding for finding in trainer.check().findings if finding.what == "rows")
    assert (finding.level, finding.text) == ("amber", words)
    assert words not in caplog.text
    trainer.train()
    assert caplog.text.count("of the stream so far: nothing is left to learn in ") == 1
    trainer.save_model()
    record = json.loads((tmp_path / "out" / "distillation.json").read_text())
    assert record["run.texts"] - record["run.texts_lost"] >= 3, "two steps of two rows read at least three"
    assert record["run.texts_lost"] >= 3
    trainer.create_model_card(dataset_name="somebody/pairs")
    assert (
        f"(nothing was left to learn in {record['run.texts_lost']} of them)" in (tmp_path / "out/README.md").read_text()
    )
