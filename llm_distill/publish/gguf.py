"""GGUF, for llama.cpp and all that is built on it: names of tensors and file by `gguf`, llama.cpp's own library.

What llama.cpp's converter does beside is done here for the families below: the rows of Llama's queries and keys lie in
another order, scaled rotary frequencies become a tensor, and the tokenizer becomes metadata. The file is read back by
transformers, which undoes all of this by code of its own, and compared with the student before it is left.
"""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from llm_distill.loading import load_tokenizer
from llm_distill.publish.adapters import load_merged
from llm_distill.publish.verify import EXACT, ROUNDED, TEXTS, require_same_next_tokens

FAMILIES = ("llama", "qwen2", "qwen3")
"""By `model_type`, which is the name of the architecture in GGUF too."""
MARK = "llm_distill.version"
"""In a file's metadata: by it an export of ours is known, which the next may replace."""
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False}
PRE_TOKENIZERS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [BYTES | {"use_regex": True}],
    "smollm": [{"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": GPT4_SPLIT % "{1,3}"}, "behavior": "Isolated", "invert": False},
        BYTES | {"use_regex": False},
    ],
    "qwen2": [
        {"type": "Split", "pattern": {"Regex": GPT4_SPLIT % ""}, "behavior": "Isolated", "invert": False},
        BYTES | {"use_regex": False},
    ],
}
"""How llama.cpp calls a way of cutting text into words before bytes are merged."""


def export_gguf(folder: str | Path, output: str | Path, dtype: str = "auto") -> float:
    """Writes a student, adapters merged, as one file with its tokenizer, and verifies it.

    Args:
        folder: of a student.
        output: the file.
        dtype: float32, float16 or bfloat16; by default that of the weights. Vectors are always float32.

    Returns:
        The share of positions at which the file's next token is the student's: 1, but for ties and rounding.

    Raises:
        ValueError: no student there, a family or tokenizer that is not supported, a file that is not the student, or
            something else than an earlier export in its place.
        ImportError: gguf is not installed.
    """
    import gguf

    output = Path(output)
    _require_place(output)
    student, tokenizer = load_merged(folder), load_tokenizer(str(folder))
    _require_supported(student)
    pre_tokenizer = _pre_tokenizer(tokenizer)
    held = str(student.dtype).removeprefix("torch.")
    dtype = held if dtype == "auto" else dtype
    if dtype not in TYPES:
        raise ValueError(f"dtype must be auto, {', '.join(TYPES)}, got {dtype!r}.")
    output.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=output.parent.resolve(), prefix=".gguf-") as temporary:
        path = Path(temporary, output.name)  # whole, or transformers would prefer a file of this name that lies here
        writer = gguf.GGUFWriter(path, student.config.model_type, use_temp_file=True)
        writer.add_string(MARK, version("llm-distill"))
        _write_settings(writer, student, output.stem, dtype)
        _write_tokenizer(writer, student, tokenizer, pre_tokenizer, Path(temporary))
        _write_tensors(writer, student, dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _require_same_tokens(path, tokenizer, pre_tokenizer)
        _require_same_settings(path, student)
        back = AutoModelForCausalLM.from_pretrained(
            temporary, gguf_file=str(path), config=student.config, dtype=torch.float32
        ).eval()
        is_exact = dtype in ("float32", held)
        share = require_same_next_tokens(
            student.float(),
            tokenizer,
            lambda ids: back(ids).logits,
            f"the GGUF file of {folder}",
            tolerance=EXACT if is_exact else ROUNDED,
        )
        os.replace(path, output)
    return share


def _require_place(output: Path) -> None:
    if output.is_dir():
        raise ValueError(f"{output} is a folder: name the file, such as {output / 'student.gguf'}.")
    if output.exists():
        with output.open("rb") as file:
            head = file.read(1024)
        if not head.startswith(b"GGUF") or MARK.encode() not in head:
            raise ValueError(f"{output} is there already and is no export of llm-distill: name another file.")


def _require_supported(student: PreTrainedModel) -> None:
    config = student.config
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"students of the family {config.model_type} cannot be exported as GGUF here, only {', '.join(FAMILIES)}: "
            "use llama.cpp's convert_hf_to_gguf.py, and --format onnx for all."
        )
    refused = {
        f"hidden_act={config.hidden_act}": config.hidden_act != "silu",
        "sliding window attention": "sliding_attention" in (getattr(config, "layer_types", None) or []),
        f"rope_type={_rope(student)['rope_type']}": _rope(student)["rope_type"] not in _rope_types(config.model_type),
    }
    if unsupported := [name for name, is_there in refused.items() if is_there]:
        raise ValueError(f"a {config.model_type} with {' and '.join(unsupported)} is not supported in GGUF here.")


def _rope_types(family: str) -> tuple[str, ...]:
    """Those that are a factor for each frequency, which llama.cpp reads for Llama alone."""
    return ("default", "linear", "llama3") if family == "llama" else ("default",)


def _rope(student: PreTrainedModel) -> dict[str, Any]:
    return {"rope_type": "default", **(student.config.rope_parameters or {})}


def _head_size(student: PreTrainedModel) -> int:
    config = student.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _write_settings(writer: Any, student: PreTrainedModel, name: str, dtype: str) -> None:
    import gguf

    config = student.config
    types = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType[types[dtype]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(student))
    writer.add_value_length(_head_size(student))
    writer.add_rope_dimension_count(_head_size(student))
    writer.add_rope_freq_base(_rope(student)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _write_tensors(writer: Any, student: PreTrainedModel, dtype: str) -> None:
    import gguf

    config = student.config
    architecture = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}[config.model_type]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    is_tied = student.get_output_embeddings().weight is student.get_input_embeddings().weight
    for name, weight in student.state_dict().items():
        if is_tied and name == "lm_head.weight":
            continue  # llama.cpp takes the embeddings where there is no output matrix
        target = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise ValueError(
                f"GGUF has no name for {name} of a {config.model_type}, so the student cannot be exported."
            )
        if config.model_type == "llama" and ".attn_q." in target:
            weight = _interleaved(weight, config.num_attention_heads)
        elif config.model_type == "llama" and ".attn_k." in target:
            weight = _interleaved(weight, config.num_key_value_heads)
        values = weight.detach().float().cpu().numpy()
        kind = gguf.GGMLQuantizationType[TYPES[dtype] if values.ndim > 1 else "F32"]
        writer.add_tensor(target, gguf.quants.quantize(values, kind), raw_dtype=kind)
    if _rope(student)["rope_type"] != "default":
        writer.add_tensor("rope_freqs.weight", _rope_factors(student))


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows [heads, 2, half] as [heads, half, 2]: llama.cpp turns pairs of neighbours, transformers the two halves."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def _rope_factors(student: PreTrainedModel) -> np.ndarray[Any, Any]:
    """By what each rotary frequency is divided."""
    size, rope = _head_size(student), _rope(student)
    plain = rope["rope_theta"] ** -(torch.arange(0, size, 2).float() / size)
    scaled, _ = ROPE_INIT_FUNCTIONS[rope["rope_type"]](student.config, torch.device("cpu"))
    return (plain / scaled).numpy().astype(np.float32)


def _pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """llama.cpp's name for it. Raises ValueError if it has none that is known here."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = {"model": {"type": type(tokenizer).__name__}} if backend is None else json.loads(backend.to_str())
    if content["model"]["type"] == "BPE" and content["pre_tokenizer"]:
        own_steps = content["pre_tokenizer"].get("pretokenizers", [content["pre_tokenizer"]])
        normalizer = (content["normalizer"] or {"type": None})["type"]
        for name, steps in PRE_TOKENIZERS.items():
            is_same = len(own_steps) == len(steps) and all(
                own | step == own for own, step in zip(own_steps, steps, strict=True)
            )
            if is_same and normalizer in (None, "NFC"):
                return name
    raise ValueError(
        "the tokenizer is none whose form in GGUF is known here: byte-level BPE that cuts text as GPT-2, SmolLM, Llama "
        "3 or Qwen 2 do. llama.cpp's convert_hf_to_gguf.py knows more."
    )


def _write_tokenizer(
    writer: Any, student: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pre_tokenizer: str, temporary: Path
) -> None:
    import gguf

    words = {index: word for word, index in tokenizer.get_vocab().items()}
    if max(words) >= student.config.vocab_size:
        raise ValueError(
            f"the tokenizer has ids up to {max(words)}, the student only {student.config.vocab_size} rows."
        )
    added = tokenizer.added_tokens_decoder
    size = range(student.config.vocab_size)
    kinds = [
        gguf.TokenType.UNUSED
        if index not in words
        else gguf.TokenType.NORMAL
        if index not in added
        else gguf.TokenType.CONTROL
        if added[index].special
        else gguf.TokenType.USER_DEFINED
        for index in size
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list([words.get(index, f"[PAD{index}]") for index in size])
    writer.add_token_types(kinds)
    tokenizer.save_pretrained(temporary / "tokenizer")
    special = gguf.SpecialVocab(temporary / "tokenizer", load_merges=True, n_vocab=student.config.vocab_size)
    ids = tokenizer("a").input_ids
    special.add_special_token = {
        "bos": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id is not None and ids[-1] == tokenizer.eos_token_id,
    }
    special.add_to_gguf(writer, quiet=True)


def _require_same_tokens(path: Path, tokenizer: PreTrainedTokenizerBase, pre_tokenizer: str) -> None:
    back = AutoTokenizer.from_pretrained(path.parent, gguf_file=str(path))
    if pre_tokenizer == "smollm":  # transformers reads such a file without it; llama.cpp does not
        back.backend_tokenizer.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    texts = [*TEXTS, "".join(token.content for token in tokenizer.added_tokens_decoder.values())]
    for text in texts:
        ids, ids_of_file = tokenizer(text).input_ids, back(text).input_ids
        if ids != ids_of_file:
            raise ValueError(
                f"the tokenizer in the GGUF file is not the student's, so it was not left: {text!r} is {ids} here and "
                f"{ids_of_file} there."
            )


def _require_same_settings(path: Path, student: PreTrainedModel) -> None:
    """Each number that transformers reads of the file's metadata."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = student.config
    read = load_gguf_checkpoint(str(path), return_tensors=False)["config"]
    expected = {"rope_theta": _rope(student)["rope_theta"], "head_dim": _head_size(student)}
    for name in read.keys() & {*config.to_dict(), *expected}:
        if name.endswith("_token_id"):
            continue  # of the tokenizer
        value: Any = expected.get(name, getattr(config, name, None))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number and abs(read[name] - value) > 1e-6 * abs(value):
            raise ValueError(f"{name} is {read[name]} in the GGUF file and {value} in the student, so it was not left.")
