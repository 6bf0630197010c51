"""Models and tokenizers from the Hub or a folder: whole, or refused in words.

transformers draws weights that a checkpoint lacks at random and goes on. Here that is an error.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from peft import PeftConfig, PeftModel, load_peft_weights
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import cached_file, find_adapter_config_file

HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "subfolder", "token")
"""Those of `from_pretrained` that say where a model lies, and so its configuration and tokenizer too."""
NO_TOKENS = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "decoder")) | {
    "version": "1.0",
    "added_tokens": [],
    "model": {"type": "BPE", "vocab": {}, "merges": []},
}
"""A tokenizer of nothing, as `tokenizers` writes it: its parts are read as parts of one."""
LOADING_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError),
    *(ImportError, UserWarning, SafetensorError, StrictDataclassError),
)
"""What libraries raise at files that are missing, broken or of another kind."""


def load_model(
    name_or_path: str,
    *,
    load: Callable[..., Any] = AutoModelForCausalLM.from_pretrained,
    is_trainable: bool = False,
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """A causal LM with each of its weights from the checkpoint; of a folder of adapters, a `PeftModel`.

    Args:
        name_or_path: on the Hub or in a folder.
        load: what is called with the name and the options.
        is_trainable: whether adapters are trained on.
        options: of `from_pretrained`.

    Raises:
        ValueError: nothing loadable is there, or weights are missing or of another shape.
    """
    if find_adapters(name_or_path, **options) is not None:
        return _load_adapted(name_or_path, load, is_trainable, options)
    find_config(name_or_path, **hub_options(options))
    with errors_of_loading(f"the model {name_or_path!r}"):
        model, info = load(name_or_path, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    lacking = sorted(info["missing_keys"])
    lacking += [f"{name} {tuple(there)} for {tuple(wanted)}" for name, there, wanted in sorted(info["mismatched_keys"])]
    if lacking:
        raise ValueError(
            f"the model {name_or_path!r} lacks {len(lacking):,} weights of a {type(model).__name__} ({lacking[0]}, …): "
            "they would be random numbers. Does its config.json belong to its files, and are they all there?"
        )
    return model


def _load_adapted(
    name_or_path: str, load: Callable[..., Any], is_trainable: bool, options: dict[str, Any]
) -> PeftModel:
    """As PEFT's `AutoPeftModelForCausalLM`, but whole. A `revision` is of the adapters."""
    hub = hub_options(options)
    of_base = {name: value for name, value in options.items() if name not in ("revision", "subfolder")}
    with errors_of_loading(f"the adapters {name_or_path!r}"):
        config = PeftConfig.from_pretrained(name_or_path, **hub)
    try:
        base = load_model(config.base_model_name_or_path, load=load, revision=config.revision, **of_base)
    except ValueError as error:
        raise ValueError(f"the adapters {name_or_path!r} are of a model that cannot be had: {error}") from error
    with errors_of_loading(f"the adapters {name_or_path!r}"):
        weights = load_peft_weights(name_or_path, device="cpu", **hub)
    embedding = base.get_input_embeddings().weight
    name = next(name for name, weight in base.named_parameters() if weight is embedding)
    saved = weights.get(f"base_model.model.{name}")
    tokenizer = find_tokenizer(name_or_path, trust_remote_code=options.get("trust_remote_code", False), **hub)
    rows = max(len(embedding), len(tokenizer or ())) if saved is None else len(saved)
    if rows != len(embedding):  # it was resized before it was trained
        base.resize_token_embeddings(rows, mean_resizing=False)
    with errors_of_loading(f"the adapters {name_or_path!r}"), warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found missing adapter keys")
        return PeftModel.from_pretrained(base, name_or_path, is_trainable=is_trainable, config=config, **hub)


def merge_adapters(model: PeftModel) -> PreTrainedModel:
    """Raises ValueError for adapters that are no change of weights."""
    if not hasattr(model.base_model, "merge_and_unload"):
        kind = model.active_peft_config.peft_type.value
        raise ValueError(f"adapters of the kind {kind} are no change of weights, so they cannot be merged.")
    return model.merge_and_unload(safe_merge=True)


def find_adapters(name_or_path: str, **options: Any) -> str | None:
    """The `adapter_config.json` of a folder or repository that holds adapters; None where there is none."""
    with suppress(OSError, HFValidationError):  # what is neither a folder nor a repository, find_config says better
        return find_adapter_config_file(name_or_path, **hub_options(options))
    return None


def find_config(name_or_path: str, **hub: Any) -> str:
    """The `config.json` of a model, fetched if it must be; of adapters, theirs.

    Raises:
        ValueError: nothing loadable is there.
    """
    try:
        return find_adapters(name_or_path, **hub) or cached_file(name_or_path, "config.json", **hub)
    except OSError as error:
        raise ValueError(
            f"the model {name_or_path!r} cannot be loaded: it is neither a folder with a model nor a repository "
            f"that can be reached. Check the name, HF_TOKEN for a gated one, HF_HUB_OFFLINE. ({error})"
        ) from error


def load_config(name_or_path: str, trust_remote_code: bool = False, **hub: Any) -> PreTrainedConfig:
    """The configuration of a model; of adapters, that of the model they are of.

    Raises:
        ValueError: nothing loadable is there.
    """
    find_config(name_or_path, **hub)
    with errors_of_loading(f"the configuration of {name_or_path!r}"):
        if find_adapters(name_or_path, **hub) is not None:
            adapters = PeftConfig.from_pretrained(name_or_path, **hub)
            return load_config(adapters.base_model_name_or_path, trust_remote_code, revision=adapters.revision)
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=trust_remote_code, **hub)


def load_tokenizer(name_or_path: str, **options: Any) -> PreTrainedTokenizerBase:
    """Raises ValueError where there is none."""
    with errors_of_loading(f"the tokenizer of {name_or_path!r}"):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **options)
    end_no_text(tokenizer)
    return tokenizer


def find_tokenizer(name_or_path: str, **options: Any) -> PreTrainedTokenizerBase | None:
    """The one that lies beside weights; None where there is none. Raises ValueError for one that is broken."""
    try:
        return load_tokenizer(name_or_path, **options)
    except ValueError:
        if Path(name_or_path, "tokenizer.json").is_file():
            raise
        return None


def tokenizer_in(processing_class: Any, what: str) -> PreTrainedTokenizerBase:
    """The tokenizer that is given, or that of a processor. Raises TypeError, naming `what` was given, for all else."""
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(
            f"{what} must be a tokenizer of transformers, or a processor that has one, got "
            f"{type(processing_class).__name__}: AutoTokenizer.from_pretrained(...) loads one."
        )
    end_no_text(tokenizer)
    return tokenizer


def end_no_text(tokenizer: PreTrainedTokenizerBase) -> None:
    """Keeps a tokenizer from ending texts with EOS, as some do by themselves: after the end of a prompt nobody goes on,
    and TRL ends the texts that are learned. The student's goes without it from then on.

    Raises:
        ValueError: it cannot be kept from it.
    """
    if not _ends_texts(tokenizer):
        return
    if getattr(tokenizer, "add_eos_token", False):
        tokenizer.add_eos_token = False  # type: ignore[attr-defined]
    elif tokenizer.is_fast:
        backend: Any = tokenizer.backend_tokenizer  # type: ignore[attr-defined]
        processor = _without_end(tokenizer.eos_token, json.loads(backend.to_str())["post_processor"])
        only_that = json.dumps(NO_TOKENS | {"post_processor": processor})
        backend.post_processor = Tokenizer.from_str(only_that).post_processor
    if _ends_texts(tokenizer):
        raise ValueError(
            f"the tokenizer ({type(tokenizer).__name__}) ends every text with {tokenizer.eos_token!r}, and so every "
            "prompt: save it with add_eos_token=False, or with a post_processor that does not."
        )


def _ends_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    end, special = tokenizer.eos_token_id, {*tokenizer.all_special_ids}
    word = tokenizer.decode([next(token for token in range(len(tokenizer)) if token not in special)])
    last, last_of_text = (tokenizer(word, add_special_tokens=added)["input_ids"][-1:] for added in (True, False))
    return end is not None and last == [end] != last_of_text


def _without_end(token: Any, processor: dict[str, Any]) -> dict[str, Any]:
    """A post-processor, as `tokenizers` writes it, that puts no special token behind texts any more."""

    def cut(pieces: list[dict[str, Any]]) -> list[dict[str, Any]]:
        first = next(i for i, piece in enumerate(pieces) if "Sequence" in piece)
        return pieces[:first] + [piece for piece in pieces[first:] if piece.get("SpecialToken", {}).get("id") != token]

    changed: dict[str, Any] = {name: cut(processor[name]) for name in ("single", "pair") if name in processor}
    if "processors" in processor:
        changed["processors"] = [_without_end(token, part) for part in processor["processors"]]
    return processor | changed


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those that say where a model lies."""
    return {name: options[name] for name in HUB_OPTIONS if options.get(name) is not None}


@contextmanager
def errors_of_loading(what: str) -> Iterator[None]:
    """Turns what libraries raise inside into a ValueError that names `what` cannot be loaded."""
    try:
        yield
    except LOADING_ERRORS as error:
        reason = " ".join(str(error).split())
        kind = "" if isinstance(error, OSError | ValueError) and reason else f"{type(error).__name__}: "
        raise ValueError(f"{what} cannot be loaded: {kind}{reason}") from error


def bits_and_bytes(bits: int) -> BitsAndBytesConfig:
    """4 bits (nf4) or 8, by bitsandbytes."""
    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32,
    )
