"""On-policy for every kind of student, and of teacher that is the student in another state."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny_model
from peft import LoraConfig, PromptTuningConfig
from runs import copied_state, fill_cache, logged, make_trainer, save
from tiny import VOCAB, tiny_llama
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase

from llm_distill import DistillationTrainer, LiveTeacher, Teacher
from llm_distill.cache.methods import TopK
from llm_distill.data.on_policy_rows import prompt_of, rows_of
from llm_distill.rows import View
from llm_distill.signals import HiddenSignal

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
LORA = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
GREEDY = {"on_policy_share": 1.0, "max_completion_length": 5, "sampling_temperature": 0.0}
ENDS = (0, 2)


@pytest.fixture
def build(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Callable[..., DistillationTrainer]:
    def build_trainer(
        student: str | PreTrainedModel, teacher: Teacher | None = None, **options: Any
    ) -> DistillationTrainer:
        return make_trainer(tmp_path, tokenizer, student, teacher, **(GREEDY | {"max_steps": 1} | options))

    return build_trainer


def first_written(trainer: DistillationTrainer, size: int = 8) -> dict[str, Any]:
    batch = trainer.collate([trainer.train_dataset[index] for index in range(size)])
    (written,) = trainer.policy(iter([[batch]]), 0)
    return written


def require_written_alone(trainer: DistillationTrainer, written: dict[str, Any]) -> None:
    """Each row is what the student says after its prompt alone, token for token, without padding or cache."""
    trainer.model.eval()
    for row in rows_of(written):
        ids = prompt_of(row)
        first = len(ids)
        while len(ids) < first + 5 and (len(ids) == first or ids[-1] not in ENDS):
            with torch.no_grad():
                ids = [*ids, int(trainer.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
        assert row["input_ids"] == ids


def test_a_student_of_4_bits_with_adapters_writes_and_learns_from_itself_without_them(
    build: Callable[..., DistillationTrainer], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = save(tiny_llama(1, hidden=64), tmp_path / "student", tokenizer)
    trainer = build(
        str(folder),
        quantization_config=NF4,
        peft_config=LORA,
        teacher_adapters_off=True,
        divergence="reverse_kl",
        learning_rate=1e-3,
        max_steps=8,
        per_device_train_batch_size=8,
    )
    assert trainer.model.get_base_model().is_loaded_in_4bit
    require_written_alone(trainer, first_written(trainer))
    before = copied_state(trainer.model)
    trainer.train()
    kd = logged(trainer, "kd")
    assert 0 < sum(kd[-2:]) < 0.9 * sum(kd[:2])
    changed = {name for name, value in trainer.model.state_dict().items() if not torch.equal(before[name], value)}
    assert changed == {name for name in before if "lora_" in name}


def test_with_its_adapters_off_the_student_teaches_on_policy_as_its_base_would(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    states = []
    for teacher in (None, LiveTeacher(tiny_llama(1).double(), tokenizer)):
        torch.manual_seed(0)
        trainer = build(tiny_llama(1).double(), teacher, peft_config=LORA, teacher_adapters_off=teacher is None)
        trainer.train()
        assert logged(trainer, "kd")[0] > 0
        states.append(copied_state(trainer.model))
    for name, weight in states[0].items():
        torch.testing.assert_close(weight, states[1][name], rtol=1e-12, atol=1e-14)


def test_left_padding_does_not_shift_positions_that_are_learned(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    """RoPE would not notice: GPT-2 has a vector for each place."""
    student = tiny_model("gpt2", seed=1, vocab_size=VOCAB).double()
    torch.nn.init.normal_(student.transformer.wpe.weight)
    trainer = build(student, LiveTeacher(tiny_llama(2).double(), tokenizer))
    written = first_written(trainer)
    assert len({len(prompt_of(row)) for row in rows_of(written)}) > 3
    require_written_alone(trainer, written)


def test_a_step_in_which_all_was_cut_and_left_out_is_a_step_of_nothing(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase
) -> None:
    student = tiny_llama(1, hidden=16).double()
    student.lm_head = torch.nn.Linear(16, VOCAB).double()
    with torch.no_grad():
        student.lm_head.bias.zero_()[list(ENDS)] = -1e3
    before = copied_state(student)
    options = {"mask_truncated_completions": True, "early_token_decay": 2.0, "replay_share": 0.5, "max_steps": 2}
    trainer = build(student, LiveTeacher(tiny_llama(2).double(), tokenizer), **options, log_completions=True)
    with pytest.raises(ValueError, match="nothing was learned in 2 steps"):
        trainer.train()
    assert logged(trainer, "loss") == [0, 0]
    assert all(torch.equal(value, before[name]) for name, value in copied_state(trainer.model).items())


class Short(LiveTeacher):
    """A teacher that reads less than the student, such as a server with a smaller max_model_len."""

    @property
    def max_length(self) -> int:
        return 24

    def score(self, view: View, *needs: Any) -> HiddenSignal:
        raise AssertionError("refused before anything is asked")


def test_who_cannot_write_or_answer_is_refused(
    build: Callable[..., DistillationTrainer], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    teacher = LiveTeacher(tiny_llama(2), tokenizer)
    fill_cache(build(tiny_llama(1), teacher), tmp_path / "cache", TopK(8))
    with pytest.raises(ValueError, match="needs a teacher that reads what the student will write"):
        build(tiny_llama(1), teacher_cache=str(tmp_path / "cache"))
    learned_prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="does not go with a learned prompt"):
        build(tiny_llama(1), teacher, peft_config=learned_prompt)
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens .* more than the teacher's context of 24"):
        build(tiny_llama(1), Short(tiny_llama(2), tokenizer), max_completion_length=12)
