"""The end of a run is rehearsed at its start, and what was trained can be loaded as one model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from runs import save
from tiny import VOCAB, make_config, tiny_llama
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from llm_distill import DistillationTrainer, LiveTeacher
from llm_distill.check.checks import check_disk
from llm_distill.publish.adapters import load_merged
from llm_distill.students.saving import disk_needs, require_savable


@pytest.mark.parametrize(
    ("published", "samples", "temperature"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, True, 0.6),
        ({"do_sample": False, "temperature": 0.6, "top_k": 7}, False, None),
        ({"do_sample": True, "temperature": 0.6}, True, 0.6),
        ({}, None, None),
    ],
)
def test_a_published_generation_config_is_set_right(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, published: dict[str, Any], samples: bool, temperature: float
) -> None:
    model = tiny_llama(1)
    model.generation_config = GenerationConfig.from_dict(published)
    require_savable(model, tokenizer)
    model.generation_config.eos_token_id = 1  # as Trainer aligns it
    model.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert (saved.do_sample, saved.temperature) == (samples, temperature)


def test_what_cannot_be_saved_is_named_before_training(tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_llama(1)
    model.generation_config.max_new_tokens = -1
    with pytest.raises(ValueError, match=r"the student's generation config could not be saved.*max_new_tokens"):
        require_savable(model, tokenizer)


def test_the_disk_must_hold_the_student(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_llama(1, hidden=16)
    size = 4 * student.num_parameters()
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 9, "save_total_limit": 2}
    trainer = DistillationTrainer(
        student,
        LiveTeacher(tiny_llama(2), tokenizer),
        make_config(tmp_path / "new" / "out", **options),
        train_dataset=Dataset.from_dict({"text": ["first = 1\n"]}),
        processing_class=tokenizer,
    )
    needs = disk_needs(trainer.model, trainer.args)
    assert (needs.student, needs.checkpoints) == (size, 3 * 3 * size)
    for free, level in ((10 * size, "green"), (9 * size, "amber"), (size - 1, "red")):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert check_disk(trainer).level == level
    with pytest.raises(ValueError, match=r"cannot hold the student.*another output_dir"):
        trainer.train()


@pytest.mark.parametrize("rows", [VOCAB - 2, VOCAB + 64])
def test_adapters_of_a_resized_vocabulary_are_merged(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rows: int
) -> None:
    base = save(tiny_llama(1, hidden=16, vocab_size=rows), tmp_path / "base")
    student = AutoModelForCausalLM.from_pretrained(base)
    student.resize_token_embeddings(VOCAB)
    trainer = DistillationTrainer(
        student,
        LiveTeacher(tiny_llama(2), tokenizer),
        make_config(tmp_path / "out", max_steps=1),
        train_dataset=Dataset.from_dict({"text": ["first = 1\n", "second = 2\n"]}),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected, merged = (m.eval()(input_ids=ids).logits for m in (trainer.model, load_merged(tmp_path / "out")))
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-5)


def test_single_tokens_of_a_tied_head_are_refused_with_the_way_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match=r"tied to its embedding.*chat_template_path=FILE\.jinja.*without adapters"):
        DistillationTrainer(
            tiny_llama(1, hidden=16, tie_word_embeddings=True),
            LiveTeacher(tiny_llama(2), tokenizer),
            make_config(tmp_path / "out"),
            train_dataset=Dataset.from_dict({"text": ["first = 1\n"]}),
            processing_class=tokenizer,
            peft_config=LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]}),
        )
