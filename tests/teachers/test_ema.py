"""A teacher that is the student's exponential average: what it says, how it is kept, and that the student stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from runs import copied_state, counted_logits, first_batch, make_trainer
from tiny import tiny_llama
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainerCallback

from llm_distill import DistillationTrainer, EMATeacher
from llm_distill.cli.build import build_capture
from llm_distill.rows import View
from llm_distill.teachers.ema import FILE

DECAY = 0.7
AVERAGED = {"teacher_ema_decay": DECAY, "ce_weight": 1.0, "max_steps": 3, "save_steps": 2}
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=["lm_head"])


class KeepStates(TrainerCallback):
    """The student's state before training and after each step."""

    def __init__(self, model: nn.Module) -> None:
        self.states = [copied_state(model)]

    def on_step_end(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        self.states.append(copied_state(model))


def make(folder: Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> DistillationTrainer:
    student = tiny_llama(1, hidden=16, tie_word_embeddings=options.pop("tied", False)).double()
    return make_trainer(folder, tokenizer, student, **(AVERAGED | options))


@pytest.mark.parametrize("options", [{}, {"tied": True}, {"peft_config": LORA}], ids=["full", "tied", "lora"])
def test_it_says_what_a_model_of_the_averages_says_and_leaves_the_student(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> None:
    trainer = make(tmp_path, tokenizer, **options)
    keep = KeepStates(trainer.model)
    trainer.add_callback(keep)
    trainer.train()
    averages = keep.states[0]
    for state in keep.states[1:]:
        averages = {name: DECAY * averages[name] + (1 - DECAY) * value for name, value in state.items()}

    batch, own = first_batch(trainer), copied_state(trainer.model)
    signal = trainer.teacher.score(View.of(batch))
    assert all(torch.equal(value, own[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.model.training
    said = signal.head(signal.hidden)  # after the student has its own weights again
    students = counted_logits(trainer.model.eval(), batch)
    trainer.model.load_state_dict(averages)
    torch.testing.assert_close(said, counted_logits(trainer.model, batch))
    assert (said - students).abs().max() > 0.01
    log = trainer.state.log_history
    assert log[0]["kd"] == pytest.approx(0, abs=1e-12), "the average begins as the student"
    assert log[2]["kd"] > 1e-6


def test_a_resumed_run_goes_on_with_the_average_bit_for_bit(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    whole, first, resumed = (
        make(tmp_path / name, tokenizer, save_strategy="steps", **options)
        for name, options in (("a", {"max_steps": 4}), ("b", {"max_steps": 2}), ("b", {"max_steps": 4}))
    )
    whole.train()
    first.train()
    checkpoint = tmp_path / "b" / "out" / "checkpoint-2"
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for name, expected in whole.teacher._averages.items():
        assert torch.equal(resumed.teacher._averages[name], expected), name
    for name, expected in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], expected), name
    assert not (tmp_path / "a" / "out" / FILE).exists(), "the student that is saved at the end has none"
    (checkpoint / FILE).unlink()
    with pytest.raises(ValueError, match="a checkpoint of a run without teacher_ema_decay"):
        make(tmp_path / "b", tokenizer, max_steps=4).train(resume_from_checkpoint=str(checkpoint))


def test_averages_of_16_bits_are_kept_in_32(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    trainer = make_trainer(tmp_path, tokenizer, tiny_llama(1).bfloat16(), **AVERAGED)
    trainer.train()
    assert {average.dtype for average in trainer.teacher._averages.values()} == {torch.float32}
    signal = trainer.teacher.score(View.of(first_batch(trainer)))
    assert signal.head.module.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_ema_decay": 1.5}, "from 0 to 1"),
        ({"teacher_ema_decay": -0.5}, "must not be negative"),
        ({"teacher_adapters_off": True}, "teacher_adapters_off names another teacher"),
        ({"teacher_model_name_or_path": "a/b"}, "give no other one"),
        ({"kd_weight": 0.0}, "kd_weight is 0"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tokenizer, **options)


def test_it_is_not_captured(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    args = make(tmp_path, tokenizer).args
    assert EMATeacher(DECAY).is_student
    with pytest.raises(ValueError, match="is not captured"):
        build_capture(None, args, None)  # type: ignore[arg-type]
