"""What is loaded is whole, whoever loads it, or is refused in words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from runs import make_trainer, save
from safetensors.torch import load_file, save_file
from tiny import tiny_llama
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    PreTrainedTokenizerBase,
    T5Config,
    T5ForConditionalGeneration,
)

from llm_distill import LiveTeacher
from llm_distill.loading import load_model
from llm_distill.publish.adapters import load_merged


def with_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def one_layer_more(folder: Path) -> None:
    with_config(folder, num_hidden_layers=3)


def head_untied(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def another_width(folder: Path) -> None:
    with_config(folder, intermediate_size=48)


def of_an_encoder(folder: Path) -> None:
    config = BertConfig(vocab_size=320, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    BertModel(config).save_pretrained(folder)


LACKING: dict[Callable[[Path], None], str] = {
    one_layer_more: "model.layers.2",
    head_untied: "lm_head.weight",
    another_width: r"down_proj.weight \(32, 64\) for \(32, 48\)",
    of_an_encoder: "cls.predictions",
}


@pytest.mark.parametrize("spoil", LACKING)
@pytest.mark.parametrize("load", [LiveTeacher.load, load_merged], ids=["teacher", "export"])
def test_weights_that_a_checkpoint_lacks_are_not_drawn_at_random(
    load: Callable[[str], Any], spoil: Callable[[Path], None], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    save(tiny_llama(1), tmp_path / "model", tokenizer)
    load(str(tmp_path / "model"))
    spoil(tmp_path / "model")
    with pytest.raises(ValueError, match=f"lacks .* weights of a .*{LACKING[spoil]}.* random"):
        load(str(tmp_path / "model"))


def test_a_student_is_loaded_whole_and_as_trl_loads_it(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save(tiny_llama(1).bfloat16(), tmp_path / "model", tokenizer)
    trainer = make_trainer(
        tmp_path,
        tokenizer,
        str(tmp_path / "model"),
        LiveTeacher(tiny_llama(2), tokenizer),
        model_init_kwargs={"dtype": "bfloat16", "attn_implementation": "eager"},
    )
    assert trainer.model.dtype == torch.bfloat16
    assert trainer.model.config._attn_implementation == "eager"
    assert trainer.args.model_init_kwargs["dtype"] == "bfloat16"
    one_layer_more(tmp_path / "model")
    with pytest.raises(ValueError, match=r"lacks 9 weights of a LlamaForCausalLM \(model.layers.2"):
        make_trainer(tmp_path, tokenizer, str(tmp_path / "model"), LiveTeacher(tiny_llama(2), tokenizer))


def test_tied_weights_are_not_missing(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save(tiny_llama(1, tie_word_embeddings=True), tmp_path / "model", tokenizer)
    assert "lm_head.weight" not in load_file(tmp_path / "model" / "model.safetensors")
    assert load_model(str(tmp_path / "model")).lm_head.weight.shape == (320, 32)


@pytest.fixture
def adapters(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """A folder of adapters that change what their model says."""
    save(tiny_llama(1), tmp_path / "base", tokenizer)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    save(get_peft_model(base, lora), tmp_path / "adapters", tokenizer)
    return str(tmp_path / "adapters")


def test_a_folder_of_adapters_is_a_teacher(adapters: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = LiveTeacher.load(adapters)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        expected = load_model(adapters)(ids).logits
        torch.testing.assert_close(teacher.model(ids).logits, expected)
        assert not torch.allclose(tiny_llama(1)(ids).logits, expected, atol=1e-3)
    assert teacher.describe()["model"] == "adapters"
    assert teacher.tokenizer.get_vocab() == tokenizer.get_vocab()


def test_a_folder_of_adapters_is_a_student_and_its_adapters_are_trained_on(
    adapters: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    teacher = LiveTeacher(tiny_llama(2), tokenizer)
    trainer = make_trainer(tmp_path, tokenizer, adapters, teacher)
    assert isinstance(trainer.model, PeftModel)
    before = load_file(Path(adapters, "adapter_model.safetensors"))
    trainer.train()
    trainer.save_model(str(tmp_path / "student"))
    after = load_file(tmp_path / "student" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(ValueError, match=r"is a folder of adapters.*leave it out"):
        make_trainer(tmp_path, tokenizer, adapters, teacher, peft_config=LoraConfig(task_type="CAUSAL_LM"))


def test_adapters_that_are_not_whole_are_refused(adapters: str) -> None:
    weights = load_file(Path(adapters, "adapter_model.safetensors"))
    weights.popitem()
    save_file(weights, Path(adapters, "adapter_model.safetensors"))
    with pytest.raises(ValueError, match=r"adapters.*missing adapter keys"):
        LiveTeacher.load(adapters)


def torn(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])


def of_no_kind(folder: Path) -> None:
    with_config(folder, model_type="nothing")


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_number(folder: Path) -> None:
    with_config(folder, hidden_size="wide")


def no_heads(folder: Path) -> None:
    with_config(folder, num_attention_heads=0)


def test_a_students_folder_may_name_its_backbone_alone(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    model = tiny_llama(1, tie_word_embeddings=True)
    save(model.model, tmp_path / "student", tokenizer)
    trainer = make_trainer(tmp_path, tokenizer, str(tmp_path / "student"), LiveTeacher(tiny_llama(2), tokenizer))
    assert type(trainer.model) is type(model)
    assert torch.equal(trainer.model.lm_head.weight, model.lm_head.weight)


def test_an_encoder_with_a_decoder_is_no_student(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    config = T5Config(vocab_size=320, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    save(T5ForConditionalGeneration(config), tmp_path / "student", tokenizer)
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder with a decoder"):
        make_trainer(tmp_path, tokenizer, str(tmp_path / "student"), LiveTeacher(tiny_llama(2), tokenizer))


def test_a_tokenizer_that_is_broken_is_not_taken_for_none(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    save(tiny_llama(1), tmp_path / "teacher", tokenizer)
    (tmp_path / "teacher" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer of .*teacher' cannot be loaded"):
        LiveTeacher.load(str(tmp_path / "teacher"))


BROKEN = [torn, of_no_kind, not_json, no_number, no_heads]


@pytest.mark.parametrize("spoil", BROKEN)
def test_what_is_broken_is_refused_by_name(
    spoil: Callable[[Path], None], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    folder = tmp_path / "model"
    save(tiny_llama(1), folder, tokenizer)
    spoil(folder)
    for load in (LiveTeacher.load, load_merged):
        with pytest.raises(ValueError, match=f"'{folder}' cannot be loaded: "):
            load(str(folder))
    with pytest.raises(ValueError, match=f"'{folder}' cannot be loaded: "):
        make_trainer(tmp_path, tokenizer, str(folder), LiveTeacher(tiny_llama(2), tokenizer))
