"""Data prepared without a trainer are those that a trainer reads, row by row and batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kinds_of_data import CHAT_TEMPLATE, DATA
from tiny import tiny_llama
from transformers import PreTrainedTokenizerBase

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill.data.prepare import prepare


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("text", {}),
        ("text", {"packing": True}),
        ("text", {"packing": True, "packing_strategy": "wrapped"}),
        ("prompt and completion", {}),
        ("prompt and completion", {"completion_only_loss": False, "max_length": 8}),
        ("chat", {"assistant_only_loss": True}),
    ],
)
def test_prepared_data_are_a_trainers(
    config: Callable[..., DistillationConfig],
    tokenizer: PreTrainedTokenizerBase,
    caplog: pytest.LogCaptureFixture,
    kind: str,
    options: dict[str, Any],
) -> None:
    of_chats = copy.deepcopy(tokenizer)
    of_chats.chat_template = CHAT_TEMPLATE
    data = {"train_dataset": DATA[kind], "eval_dataset": {"a": DATA[kind].select(range(3))}}
    args = config(**({"max_length": 48} | options))
    args.model_init_kwargs = {"revision": "main"}  # of a student that preparation does not load
    prepared = prepare(copy.deepcopy(of_chats), args, *data.values())
    assert not Path(args.output_dir).exists()
    assert "model_init_kwargs" not in caplog.text
    args.model_init_kwargs = None
    teacher = LiveTeacher(tiny_llama(2), of_chats)
    trainer = DistillationTrainer(tiny_llama(1), teacher, args, processing_class=of_chats, **data)
    assert prepared.datasets.keys() == trainer.data.datasets.keys() == {"train", "a"}
    for name, dataset in trainer.data.datasets.items():
        assert prepared.datasets[name].to_dict() == dataset.to_dict()
        rows = [dataset[index] for index in range(min(2, len(dataset)))]
        for key, value in trainer.collate(rows).items():
            assert torch.equal(torch.as_tensor(prepared.collate(rows)[key]), torch.as_tensor(value)), key


def test_data_are_prepared_without_a_repository_or_a_folder(
    config: Callable[..., DistillationConfig], tokenizer: PreTrainedTokenizerBase
) -> None:
    args = config()
    args.push_to_hub, args.hub_model_id = True, "nobody/has-asked-for-this"
    assert len(prepare(tokenizer, args, DATA["text"]).train) == len(DATA["text"])
    assert args.push_to_hub
