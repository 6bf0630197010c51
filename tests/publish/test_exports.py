"""`llm-distill export`: read back by code that is not ours, the files say what the student says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import gguf
import onnxruntime
import pytest
import torch
from commands import refused
from families import tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from llm_distill.cli.export import export
from llm_distill.publish import gguf as exports_gguf
from llm_distill.publish import onnx as exports_onnx
from llm_distill.publish.gguf import PRE_TOKENIZERS, export_gguf
from llm_distill.publish.onnx import export_onnx
from llm_distill.publish.verify import TEXTS
from llm_distill.students.cut import cut_layers
from llm_distill.students.prune import prune_widths

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
STUDENTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama, untied": ("llama", {"tie_word_embeddings": False}, "gpt-2"),
    "llama, tied, Llama 3's positions": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
        "llama-bpe",
    ),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}, "smollm"),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}, "qwen2"),
    "qwen3, wide heads": ("qwen3", {"tie_word_embeddings": False, "head_dim": 16}, "qwen2"),
}


@pytest.fixture(scope="module")
def tokenizers(texts: Any) -> dict[str, PreTrainedTokenizerFast]:
    """By what llama.cpp calls their way of cutting text into words."""
    return {name: train_tokenizer(texts["text"], steps, name == "llama-bpe") for name, steps in PRE_TOKENIZERS.items()}


def train_tokenizer(texts: list[str], steps: list[dict[str, Any]], ignore_merges: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    parts = {
        "Split": lambda step: pre_tokenizers.Split(Regex(step["pattern"]["Regex"]), "isolated"),
        "Digits": lambda _: pre_tokenizers.Digits(individual_digits=True),
        "ByteLevel": lambda step: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step["use_regex"]),
    }
    cut = [parts[step["type"]](step) for step in steps]
    tokenizer.pre_tokenizer = cut[0] if len(cut) == 1 else pre_tokenizers.Sequence(cut)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|user|>"]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def save(folder: Path, family: str, tokenizer: PreTrainedTokenizerFast, **config: Any) -> PreTrainedModel:
    """A student with more rows than tokens, and two query heads to a key head."""
    defaults = {"vocab_size": 416, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny_model(family, **(defaults | config))
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def test_a_student_of_some_layers_and_narrower_ones_is_exported(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerFast]
) -> None:
    teacher = save(tmp_path / "teacher", "llama", tokenizers["smollm"], num_hidden_layers=3, tie_word_embeddings=True)
    blocks = [torch.arange(64)[None]]
    sizes = {"intermediate_size": 32, "hidden_size": 16, "num_attention_heads": 2}
    prune_widths(cut_layers(teacher, [1, 3]), sizes, blocks).student.save_pretrained(tmp_path / "student")
    tokenizers["smollm"].save_pretrained(tmp_path / "student")
    assert export_gguf(tmp_path / "student", tmp_path / "s.gguf") == 1


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_gguf_file_has_the_student_s_logits_and_tokens(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerFast], kind: str
) -> None:
    family, config, cut = STUDENTS[kind]
    model = save(tmp_path / "student", family, tokenizers[cut], **config)
    assert export_gguf(tmp_path / "student", tmp_path / "out" / "s.gguf") == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["s.gguf"]
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="s.gguf", config=model.config)
    ids = torch.arange(100)[None]
    torch.testing.assert_close(back(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    fields = gguf.GGUFReader(tmp_path / "out" / "s.gguf").fields
    assert fields["tokenizer.ggml.pre"].contents() == cut
    assert fields["tokenizer.ggml.eos_token_id"].contents() == tokenizers[cut].eos_token_id
    tensors = {tensor.name for tensor in gguf.GGUFReader(tmp_path / "out" / "s.gguf").tensors}
    assert ("output.weight" in tensors) != model.config.tie_word_embeddings
    assert ("rope_freqs.weight" in tensors) == ("rope_parameters" in config)


@pytest.mark.parametrize(("dtype", "expected"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_gguf_in_half_precision(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerFast], dtype: str, expected: str
) -> None:
    save(tmp_path / "student", "llama", tokenizers["gpt-2"])
    assert export_gguf(tmp_path / "student", tmp_path / "s.gguf", dtype) > 0.9
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "s.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == expected
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def test_adapters_are_merged_first(tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    base = save(tmp_path / "base", "qwen2", tokenizers["qwen2"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "student")
    tokenizers["qwen2"].save_pretrained(tmp_path / "student")
    assert export_gguf(tmp_path / "student", tmp_path / "s.gguf") == 1
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="s.gguf", config=base.config)
    ids = torch.arange(50)[None]
    torch.testing.assert_close(back(ids).logits, adapted.eval()(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_wrong_gguf_file_is_not_left(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "student", "llama", tokenizers["gpt-2"])
    with monkeypatch.context() as broken:
        broken.setattr(exports_gguf, "_interleaved", lambda weight, heads: weight)
        with pytest.raises(ValueError, match=r"is not the student, so it was not left: after \d+ tokens"):
            export_gguf(tmp_path / "student", tmp_path / "s.gguf")
    with monkeypatch.context() as broken:
        broken.setattr(exports_gguf, "_pre_tokenizer", lambda tokenizer: "qwen2")
        with pytest.raises(ValueError, match="the tokenizer in the GGUF file is not the student's"):
            export_gguf(tmp_path / "student", tmp_path / "s.gguf")
    with monkeypatch.context() as broken:
        broken.setattr(
            gguf.GGUFWriter, "add_rope_freq_base", lambda writer, _: writer.add_float32("llama.rope.freq_base", 9)
        )
        with pytest.raises(ValueError, match=r"rope_theta is 9\.0 in the GGUF file and 10000\.0 in the student"):
            export_gguf(tmp_path / "student", tmp_path / "s.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_the_file_that_is_verified_is_the_one_that_was_written(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerFast], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the same name in the working folder, which transformers would prefer, is not looked at."""
    save(tmp_path / "student", "llama", tokenizers["gpt-2"])
    monkeypatch.chdir(tmp_path)
    export_gguf("student", "s.gguf")
    other = AutoModelForCausalLM.from_pretrained("student")
    torch.nn.init.normal_(other.lm_head.weight)
    other.save_pretrained("other")
    tokenizers["gpt-2"].save_pretrained("other")
    assert export_gguf("other", "elsewhere/s.gguf") == 1
    assert export_gguf("other", "s.gguf") == 1, "an earlier export is replaced"
    monkeypatch.setattr(exports_gguf, "_interleaved", lambda weight, heads: weight)
    with pytest.raises(ValueError, match="is not the student, so it was not left"):
        export_gguf("other", "third/s.gguf")


def test_what_cannot_be_exported_is_named(
    tmp_path: Path,
    tokenizers: dict[str, PreTrainedTokenizerFast],
    capsys: pytest.CaptureFixture[str],
) -> None:
    save(tmp_path / "gemma", "gemma2", tokenizers["gpt-2"])
    save(tmp_path / "yarn", "qwen2", tokenizers["qwen2"], rope_parameters=LLAMA3_ROPE)
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a")))
    save(tmp_path / "words", "llama", words)
    save(tmp_path / "student", "llama", tokenizers["gpt-2"])
    weights = (tmp_path / "student" / "model.safetensors").read_bytes()
    (tmp_path / "theirs.gguf").write_bytes(b"GGUF of somebody else")
    (tmp_path / "notes.txt").write_text("notes")
    shutil.copytree(tmp_path / "student", tmp_path / "torn")
    (tmp_path / "torn" / "tokenizer.json").write_text("{}")
    output = str(tmp_path / "out")
    student = (tmp_path / "student", "--format")
    for arguments, message in {
        (*student, "gguf", "--output", tmp_path / "student" / "model.safetensors"): "is no export of llm-distill",
        (*student, "gguf", "--output", tmp_path / "theirs.gguf"): "is no export of llm-distill",
        (*student, "gguf", "--output", tmp_path / "student"): "is a folder: name the file",
        (*student, "onnx", "--output", tmp_path / "student"): "name a folder that is new or empty",
        (*student, "onnx", "--output", tmp_path / "notes.txt"): "name a folder that is new or empty",
    }.items():
        assert message in refused(capsys, export, [str(argument) for argument in arguments])
    assert (tmp_path / "student" / "model.safetensors").read_bytes() == weights
    for arguments, message in {
        (tmp_path / "gemma", "--format", "gguf"): "family gemma2 cannot be exported as GGUF here, only llama",
        (tmp_path / "yarn", "--format", "gguf"): "rope_type=llama3 is not supported",
        (tmp_path / "words", "--format", "gguf"): "the tokenizer is none whose form in GGUF is known",
        (tmp_path / "none", "--format", "gguf"): "cannot be loaded",
        (tmp_path / "torn", "--format", "gguf"): "the tokenizer of",
        (tmp_path / "gemma", "--format", "ggml"): "invalid choice: 'ggml'",
        (tmp_path / "gemma", "--format", "onnx", "--dtype", "float16"): "without effect here, so refused: dtype",
        (tmp_path / "words", "--format", "gguf", "--dtype", "int8"): "tokenizer",
        (tmp_path / "gemma", "--formats", "onnx"): "Did you mean 'format'",
    }.items():
        line = refused(capsys, export, [*(str(argument) for argument in arguments), "--output", output])
        assert message in line
    assert not Path(output).exists()


@pytest.mark.parametrize("kind", ["llama, tied, Llama 3's positions", "qwen3, wide heads"])
def test_an_onnx_graph_goes_on_as_the_student_does(
    tmp_path: Path, tokenizers: dict[str, PreTrainedTokenizerFast], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    family, config, cut = STUDENTS[kind]
    model = save(tmp_path / "student", family, tokenizers[cut], **config)
    export([str(tmp_path / "student"), "--format", "onnx", "--output", str(tmp_path / "onnx")])
    assert "the same next tokens as the student, at 100.0%" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(tmp_path / "onnx" / "model.onnx")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "onnx")
    ids = tokenizer(TEXTS[1], return_tensors="pt").input_ids
    torch.testing.assert_close(exports_onnx._logits(session, model, ids), model(ids).logits, atol=1e-4, rtol=1e-4)
    for path in (tmp_path / "onnx").iterdir():
        assert str(Path(torch.__file__).parent).encode() not in path.read_bytes(), path.name
    with pytest.raises(ValueError, match="is there already"):
        export_onnx(tmp_path / "student", tmp_path / "onnx")
