"""A language model: who it is, as JSON and without a local path, and what goes into its head where it speaks."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file, extract_commit_hash

from llm_distill.heads import LMHead, intercepted
from llm_distill.rows import SIGNAL, Batch, counted_rows

HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
"""Those of `from_pretrained` that say where a model lies, and so its configuration and tokenizer too."""
SAMPLES = 64
"""Places at which a weight, or a file of weights, is looked at: any training changes them all."""


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows of an output matrix a tokenizer can use. Matrices are often padded past it.

    A placeholder for pictures or sound at its end needs none, as nobody writes it: Gemma 3's tokenizer has one token
    more than the family's text models have rows.
    """
    placeholders = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "video", "audio")}
    return max(token_id for token, token_id in tokenizer.get_vocab().items() if token not in placeholders) + 1


def describe_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Of a model in memory. `weights` is a hash of samples of all of them, as they are now."""
    quantization: Any = getattr(model.config, "quantization_config", None) or {}
    quantization = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
    return {
        "model": public_name(model.config._name_or_path),
        "revision": getattr(model.config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization": quantization.get("quant_method"),
        "bits": 4 if quantization.get("load_in_4bit") else 8 if quantization.get("load_in_8bit") else None,
        **_weights_hash(model),
        "tokenizer": None if tokenizer is None else describe_tokenizer(tokenizer)["vocabulary"],
    }


def describe_checkpoint(
    name_or_path: str, *, load_in_4bit: bool = False, load_in_8bit: bool = False, dtype: Any = "auto", **options: Any
) -> dict[str, Any]:
    """What can be said of a model without loading its weights, in the words of `describe_model`.

    Raises:
        ValueError: nothing loadable is there.
    """
    hub = {name: options[name] for name in HUB_OPTIONS if name in options}
    config_file = find_config(name_or_path, **hub)
    config = AutoConfig.from_pretrained(
        name_or_path, trust_remote_code=options.get("trust_remote_code", False), **hub
    ).get_text_config()
    dtype = config.dtype if dtype == "auto" else dtype
    said = {
        "model": public_name(name_or_path),
        "revision": extract_commit_hash(config_file, None),
        "bits": 4 if load_in_4bit else 8 if load_in_8bit else None,
        **({"dtype": str(dtype).removeprefix("torch.")} if dtype else {}),
    }
    if "quantization_config" in options or getattr(config, "quantization_config", None):
        del said["bits"]
    return said | files_hash(config_file)


def find_config(name_or_path: str, **hub: Any) -> str:
    """The `config.json` of a model, fetched if it must be.

    Raises:
        ValueError: nothing loadable is there.
    """
    try:
        return cached_file(name_or_path, "config.json", **hub)
    except OSError as error:
        raise ValueError(
            f"the model {name_or_path!r} cannot be loaded: it is neither a folder with a model nor a repository "
            f"that can be reached. Check the name, HF_TOKEN for a gated one, HF_HUB_OFFLINE. ({error})"
        ) from error


def files_hash(config_file: str) -> dict[str, str]:
    """`{"files": hash}` of sizes and samples of the weight files beside a `config.json`. Nothing where there are none,
    or where a commit of the Hub says it all.
    """
    folder = Path(config_file).parent
    files = sorted([*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin")])
    if not files or extract_commit_hash(config_file, None):
        return {}
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            for place in range(0, size, max(1, size // SAMPLES)):
                file.seek(place)
                digest.update(file.read(4096))
    return {"files": digest.hexdigest()[:16]}


def describe_tokenizer(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the ids mean, and how a chat becomes text."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    template = tokenizer.chat_template and json.dumps(tokenizer.chat_template, sort_keys=True)
    return {"vocabulary": _short_hash(vocabulary), "chat_template": template and _short_hash(template)}


def _weights_hash(model: PreTrainedModel) -> dict[str, str]:
    """`{"weights": hash}`; nothing where they are not in memory, or not whole. Adapters do not count."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict(keep_vars=True).items():
        if weight.is_meta or hasattr(weight, "ds_id"):
            return {}
        if "lora_" in name:
            continue
        flat = weight.detach().flatten()
        samples = flat[:: max(1, len(flat) // SAMPLES)].contiguous().cpu()
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        digest.update(samples.view(torch.uint8).numpy().tobytes())
    return {"weights": digest.hexdigest()[:16]}


def public_name(name_or_path: str) -> str | None:
    """As it is recorded: of a folder its last part."""
    is_local = os.path.isdir(name_or_path) or os.path.isabs(name_or_path)
    return os.path.basename(name_or_path.rstrip("/")) if is_local else name_or_path or None


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hidden_of_counted_rows(model: nn.Module, head: LMHead, batch: Batch) -> Float[Tensor, "rows hidden"]:
    """What goes into `head` at the rows that count, from one forward of `model` that makes no logits and no cache."""
    rows = counted_rows(batch["labels"])
    inputs = {name: value for name, value in batch.items() if name not in ("labels", SIGNAL)}
    kept: Tensor | None = None

    def keep(hidden: Float[Tensor, "batch time hidden"]) -> Tensor:
        nonlocal kept
        kept = hidden[rows.sample.to(hidden.device), rows.position.to(hidden.device)]
        return hidden[..., :0]

    with intercepted(head.module, keep):
        model(**inputs, use_cache=False)
    assert kept is not None, "LMHead.of has seen that the projection is called"
    return kept.to(batch["labels"].device)


def own_tokenizer(model: PreTrainedModel, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside the weights; None for a model made from a config."""
    if not model.config._name_or_path:
        return None
    try:
        options.setdefault("trust_remote_code", False)
        options["revision"] = getattr(model.config, "_commit_hash", None)  # a folder has none
        return AutoTokenizer.from_pretrained(model.config._name_or_path, **options)
    except (OSError, ValueError, KeyError):
        return None


def require_same_ids(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Equal sizes prove nothing: every token of the student must have the same id in the teacher's vocabulary."""
    theirs, ours = teacher.get_vocab(), student.get_vocab()
    different = [token for token, token_id in ours.items() if theirs.get(token) != token_id]
    if different:
        examples = ", ".join(f"{token!r}: {ours[token]} against {theirs.get(token)}" for token in different[:3])
        said = f"{len(theirs):,} tokens, {type(teacher).__name__}"
        raise different_ids(said, student, f"{len(different):,} tokens ({examples})")


def different_ids(teachers: str, student: PreTrainedTokenizerBase, what: str) -> ValueError:
    """To be raised. `teachers` follows "the teacher's tokenizer", and `what` names what has other ids."""
    return ValueError(
        f"the teacher's tokenizer ({teachers}) and the student's ({len(student.get_vocab()):,} tokens, "
        f"{type(student).__name__}) give different ids for {what}, so their distributions cannot be compared token by "
        "token. Distil from the teacher's text instead (sequence-level distillation), or give both the same tokenizer."
    )


def refuse_past_context(length: int, max_length: int | None, where: str) -> None:
    """Raises ValueError if a sequence is longer than the teacher can read."""
    if max_length is not None and length > max_length:
        raise ValueError(
            f"{where} has a sequence of {length:,} tokens, longer than the teacher's context of {max_length:,}. Set "
            f"max_length={max_length} or less."
        )


def bits_and_bytes(bits: int) -> BitsAndBytesConfig:
    """4 bits (nf4) or 8, by bitsandbytes."""
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
