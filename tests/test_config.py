"""What a configuration takes from the machine where nobody has chosen: the device, bfloat16, checkpointing."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import logged
from tiny import make_config, tiny_llama
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig

from llm_distill import DistillationConfig, DistillationTrainer, LiveTeacher
from llm_distill import config as module


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes this machine's processor one with bfloat16, or without."""
    return lambda has: monkeypatch.setattr(module, "has_fast_bfloat16", lambda: has)


def test_without_an_accelerator_the_cpu_is_used(tmp_path: Path) -> None:
    for options in ({"bf16": True}, {"bf16": False}, {}):
        config = DistillationConfig(output_dir=str(tmp_path), **options)
        assert config.use_cpu
        assert config.device.type == "cpu"
    assert config.chosen == {"output_dir"}, "what follows from the machine is nobody's choice"


@pytest.mark.parametrize(
    ("has", "options", "expected"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"use_cpu": True}, True),
        (True, {"bf16": False}, False),
        (True, {"fp16": True}, False),
        (False, {"bf16": True}, True),
    ],
)
def test_bfloat16_is_on_where_the_processor_has_it(
    tmp_path: Path, processor: Any, has: bool, options: dict[str, Any], expected: bool
) -> None:
    processor(has)
    assert DistillationConfig(output_dir=str(tmp_path), **options).bf16 is expected


def test_bfloat16_trains_weights_in_float32_as_float32_does(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    losses = []
    for bf16 in (True, False):
        trainer = DistillationTrainer(
            model=tiny_llama(1, hidden=16),
            teacher=LiveTeacher(tiny_llama(2), tokenizer),
            args=make_config(tmp_path / "out", bf16=bf16, use_cpu=False),
            train_dataset=Dataset.from_dict({"text": ["def first(x):\n    return x + 1\n"] * 4}),
            processing_class=tokenizer,
        )
        trainer.train()
        assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    assert losses[0] != losses[1]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`")
def test_activations_are_kept_unless_someone_says_otherwise_by_either_name(tmp_path: Path) -> None:
    def checkpoints(**options: Any) -> tuple[bool, bool]:
        config = DistillationConfig(output_dir=str(tmp_path), **options)
        assert replace(config, activation_checkpointing=True).gradient_checkpointing
        return config.activation_checkpointing, config.gradient_checkpointing

    assert checkpoints() == (False, False)
    assert checkpoints(activation_checkpointing=True) == (True, True)
    assert checkpoints(gradient_checkpointing=True) == (True, True)


def test_a_configuration_begins_with_the_fields_of_trl_in_their_order() -> None:
    names = [field.name for field in fields(SFTConfig)]
    assert [field.name for field in fields(DistillationConfig)][: len(names)] == names


def test_what_trackers_log_has_no_token_of_a_model_s_options(tmp_path: Path) -> None:
    kwargs = {"token": "mirror-secret", "attn_implementation": "eager"}
    options = DistillationConfig(str(tmp_path), model_init_kwargs=kwargs, teacher_model_init_kwargs=kwargs).to_dict()
    for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
        assert options[name] == {"attn_implementation": "eager"}
