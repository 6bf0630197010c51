"""What is measured of a model: whether it is causal, and whether it keeps the documents of a packed row apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from families import tiny_model
from runs import make_trainer
from tiny import VOCAB, make_config, tiny_llama
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_distill import EnsembleTeacher, LiveTeacher
from llm_distill.capture.run import prepare_teacher
from llm_distill.data.prepare import prepare
from llm_distill.heads import LMHead
from llm_distill.probes import require_causal, require_documents_apart, student_forward

APART = ["llama", "qwen2", "gemma3_text", "mixtral", "glm4_moe", "gpt2"]
TOGETHER = ["gpt_oss", "opt", "bloom", "falcon", "mamba2", "jamba", "lfm3"]
"""Of the ways in which documents see each other: attention, positions from a mask, ALiBi, a state, a convolution."""


def check_packing(model: PreTrainedModel, dtype: torch.dtype) -> None:
    model = model.to(dtype)
    forward, accelerator = student_forward(model, LMHead.of(model)), Accelerator(cpu=True)
    require_causal(model, forward, accelerator)
    require_documents_apart(model, forward, DataCollatorForLanguageModeling(0, padding_free=True), accelerator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", APART)
def test_families_that_keep_documents_apart_may_pack(family: str, dtype: torch.dtype) -> None:
    check_packing(tiny_model(family), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", TOGETHER)
def test_families_whose_documents_see_each_other_may_not(family: str, dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=rf"model type {family}\) does not keep the documents .* Set packing=False"):
        check_packing(tiny_model(family), dtype)


def test_families_that_cannot_read_packed_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"Qwen3NextForCausalLM .* cannot read packed rows \(set packing=False"):
        check_packing(tiny_model("qwen3_next"), torch.float32)


def leaky(**options: Any) -> PreTrainedModel:
    return tiny_model("opt", vocab_size=VOCAB, **options)


def test_packing_is_refused_for_such_a_student_and_such_a_teacher(
    tmp_path: Path, texts: Dataset, tokenizer: PreTrainedTokenizerBase
) -> None:
    sound = tiny_llama(1, hidden=16)
    for student, teacher in (
        (sound, LiveTeacher(leaky(), tokenizer)),
        (sound, EnsembleTeacher([LiveTeacher(tiny_llama(2), tokenizer), LiveTeacher(leaky(), tokenizer)])),
        (leaky(), LiveTeacher(tiny_llama(2), tokenizer)),
    ):
        make_trainer(tmp_path, tokenizer, student, teacher)
        with pytest.raises(ValueError, match="model type opt"):
            make_trainer(tmp_path, tokenizer, student, teacher, packing=True)
    args = make_config(tmp_path / "out", packing=True)
    with pytest.raises(ValueError, match="model type opt"):  # a capture of packed rows
        prepare_teacher(LiveTeacher(leaky(), tokenizer), prepare(tokenizer, args, texts.select(range(4))))


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_that_is_not_causal_is_refused(role: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    models = {"student": tiny_llama(1, hidden=16), "teacher": tiny_llama(2)}
    models[role] = tiny_model("bert", vocab_size=VOCAB, is_decoder=False)
    with pytest.raises(ValueError, match=r"BertLMHeadModel \(model type bert\) is not causal"):
        make_trainer(tmp_path, tokenizer, models["student"], LiveTeacher(models["teacher"], tokenizer))


def test_a_student_is_measured_as_in_evaluation_and_left_as_it_was() -> None:
    model = tiny_model("gpt2", embd_pdrop=0.5).train()
    forward = student_forward(model, LMHead.of(model))
    require_causal(model, forward, Accelerator(cpu=True))
    assert model.training


def test_the_rounding_of_a_deep_model_in_16_bits_is_not_taken_for_another_document() -> None:
    check_packing(tiny_llama(1, num_hidden_layers=48, hidden=64), torch.bfloat16)
