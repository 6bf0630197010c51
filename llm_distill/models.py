"""A causal language model: its weights, its tokenizer, its head, who it is, and what it keeps where it speaks.

Teachers, writers, evaluation and the student itself are made of it. It neither freezes nor trains.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from jaxtyping import Float
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import extract_commit_hash

from llm_distill.heads import LMHead, base_of, intercepted
from llm_distill.loading import (
    bits_and_bytes,
    errors_of_loading,
    find_config,
    find_tokenizer,
    hub_options,
    load_config,
    load_model,
    merge_adapters,
    tokenizer_in,
)
from llm_distill.rows import Positions, View

FILLER = re.compile(r"<extra_id_\d+>")
TEXTS = (
    "The import of THE café costs 1,234.50 € in 2024:\n\n\tdef f(x):  return x_1 != 'don't'\n",
    "Ünïcödé, naïve e\u0301 ﬁ: 你好世界, Здравствуй, مرحبا 🙂",
)
"""What tokenizers cut, normalise and lower in their own ways."""
SAMPLES, FILE_SAMPLES = 64, 4
"""Places at which a weight in memory, or on the disk, is looked at: any training changes them all."""


Needs = Mapping[str, Sequence[int]]
"""What is wanted of a model: kinds, such as "head", "hidden" or "query", each with the layers of which it is wanted
(layer k is the k-th of the model, from 1)."""
ATTENTION = ("query", "key", "value")
"""The kinds that are kept of a layer's attention."""
LAST = "last"
"""The kind that is only what goes into the head: whoever tells that tells hidden states, and no distribution alone."""
LAYERS = frozenset({LAST, "hidden", *ATTENTION})
"""The kinds that a model in memory can give beside the head."""
HEAD: Needs = {"head": ()}
"""What goes into the head, which is all of a next-token distribution."""


class Kept(NamedTuple):
    """What one forward kept at N positions."""

    hidden: Float[Tensor, "rows hidden"]
    """What goes into the head."""
    head: LMHead
    layers: Mapping[str, Mapping[int, Tensor]] = {}
    """By kind and number: "hidden", what comes out of a layer [rows, width]; "query", "key" and "value", as attention
    gets them, with their rotary positions, at all tokens [batch, time, heads, size]: query · key / √size is its score.
    """


class LanguageModel:
    """A causal LM of transformers with its tokenizer: dense, mixture of experts, quantised."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Without a `tokenizer`, the model's own folder or repository is asked for one."""
        self.model = model
        self.tokenizer = own_tokenizer(model) if tokenizer is None else tokenizer_in(tokenizer, "tokenizer")
        self.head = LMHead.of(model)
        self._description = describe_model(model, self.tokenizer)

    @classmethod
    def load(
        cls,
        name_or_path: str,
        *,
        revision: str | None = None,
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        trust_remote_code: bool = False,
        **init_kwargs: Any,
    ) -> LanguageModel:
        """From the Hub or a folder, in the checkpoint's own dtype unless `dtype` says otherwise. Adapters are merged
        into what they are of.

        Raises:
            ValueError: nothing loadable is there, or not all of its weights.
        """
        if load_in_4bit + load_in_8bit + ("quantization_config" in init_kwargs) > 1:
            raise ValueError("a model is loaded in 4 bits, in 8 bits or with a quantization_config: choose one.")
        init_kwargs = {"dtype": "auto", "trust_remote_code": trust_remote_code, "revision": revision, **init_kwargs}
        if load_in_4bit or load_in_8bit:
            init_kwargs["quantization_config"] = bits_and_bytes(4 if load_in_4bit else 8)
        if "quantization_config" in init_kwargs:
            init_kwargs.setdefault("device_map", {"": PartialState().device})  # what is packed is not moved later
        hub = hub_options(init_kwargs)
        config_file = find_config(name_or_path, **hub)
        with _whole_on_every_rank():
            model = load_model(name_or_path, **init_kwargs)
        if isinstance(model, PeftModel):
            model = merge_adapters(model)
            model.config._name_or_path = name_or_path
        model.config._commit_hash = extract_commit_hash(config_file, None)  # no longer kept by every transformers
        loaded = cls(model, own_tokenizer(model, trust_remote_code=init_kwargs["trust_remote_code"], **hub))
        loaded._description |= files_hash(config_file)
        return loaded

    @property
    def max_length(self) -> int | None:
        """The longest sequence that it can read, in tokens; None if there is no limit."""
        return context_length(self.model)

    def require_tokenizer(self, role: str) -> PreTrainedTokenizerBase:
        """Raises ValueError, naming its `role`, if it came without one."""
        if self.tokenizer is None:
            raise ValueError(f"the {role} came without a tokenizer: save one beside its weights, or pass it.")
        return self.tokenizer

    def fit_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Lets its head end with the tokens of another tokenizer, whose ids must be its own.

        Raises:
            ValueError: a token has another id here, or none.
        """
        if self.tokenizer is not None:
            require_same_ids(self.tokenizer, tokenizer)
        self.head = LMHead.of(self.model, vocab_size=vocabulary_size(tokenizer))

    def keep(self, view: View, needs: Needs = HEAD, wrapped: nn.Module | None = None) -> Kept:
        """What it keeps of a view, from one forward (of its engine's wrapper, if it has one)."""
        refuse_past_context(view.length, self.max_length, "the batch")
        return kept_of(wrapped or self.model, self.head, view, needs)

    def describe(self) -> dict[str, Any]:
        """Who it is, as JSON and without a local path: as it was when it was made."""
        return self._description


def kept_of(model: nn.Module, head: LMHead, view: View, needs: Needs = HEAD) -> Kept:
    """What a model keeps of a view, from one forward that makes no logits and no cache."""
    kept: list[Kept] = []

    def keep(hidden: Float[Tensor, "batch time hidden"]) -> Tensor:
        kept.append(keep_rows(hidden, head, outputs, view.positions, view.inputs["input_ids"].shape[1]))
        return hidden[..., :0]

    with intercepted(head.module, keep), tapped(model, needs) as outputs:
        model(**view.inputs, use_cache=False)
    (only,) = kept  # LMHead.of has seen that the projection is called
    return only


@torch.no_grad()
def kept_in_evaluation(model: nn.Module, head: LMHead, view: View, needs: Needs = HEAD) -> Kept:
    """As `kept_of`, without gradients and dropout, and without a router's loss."""
    if hasattr(base_of(model).config.get_text_config(), "output_router_logits"):
        view = view._replace(inputs={**view.inputs, "output_router_logits": False})
    with evaluating(model):
        return kept_of(model, head, view, needs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, a model is as in evaluation, and afterwards as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class Tap(NamedTuple):
    """What a layer left in a forward, and what it is to be multiplied by."""

    states: Tensor
    """[batch, time, width], or of attention [batch, heads, time, size]."""
    factor: float = 1.0


Taps = Mapping[str, dict[int, Tap]]
"""By kind and number of the layer."""


def keep_rows(
    hidden: Float[Tensor, "batch time hidden"], head: LMHead, taps: Taps, positions: Positions, time: int
) -> Kept:
    """What goes into the head and what came out of some layers, at N positions and on their device: a model that is
    spread over devices ends on another one.

    Args:
        time: the length of the labels. Hidden states may be longer, by the virtual tokens of a learned prompt in front.
    """

    def rows_of(states: Tensor) -> Tensor:
        device = states.device
        rows = states[:, -time:][positions.sample.to(device), positions.position.to(device)]
        return rows.to(positions.sample.device)

    def tokens_of(tap: Tap) -> Tensor:
        states = tap.states.transpose(1, 2)[:, -time:].to(positions.sample.device)
        return states if tap.factor == 1.0 else states * tap.factor

    layers = {
        kind: {number: rows_of(tap.states) if kind == "hidden" else tokens_of(tap) for number, tap in of_kind.items()}
        for kind, of_kind in taps.items()
    }
    return Kept(rows_of(hidden), head, layers)


@contextmanager
def tapped(model: nn.Module, needs: Needs) -> Iterator[Taps]:
    """Inside, a forward leaves here what comes out of some layers, and what attention gets in them.

    Nothing is computed here: with activation checkpointing, what is computed within a layer must be the same when it
    is computed again without the taps.
    """
    taps: dict[str, dict[int, Tap]] = {kind: {} for kind, numbers in needs.items() if numbers}
    if not taps:
        yield taps
        return
    layers = decoder_layers(model)

    def keep_output(number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            taps["hidden"][number] = Tap(output[0] if isinstance(output, tuple) else output)

        return hook

    hooks = [layers[number - 1].register_forward_hook(keep_output(number)) for number in needs.get("hidden", ())]
    with _attention_tapped(model, layers, needs, taps) if taps.keys() & {*ATTENTION} else nullcontext():
        try:
            yield taps
        finally:
            for hook in hooks:
                hook.remove()
    for kind, numbers in needs.items():
        if missing := [number for number in numbers if kind in ATTENTION and number not in taps[kind]]:
            raise no_attention(model, missing[0])


@contextmanager
def _attention_tapped(model: nn.Module, layers: nn.ModuleList, needs: Needs, taps: Taps) -> Iterator[None]:
    """Inside, whichever function computes attention (eager, sdpa, FlashAttention) is handed its queries, keys and
    values by way of here. It computes what it always does, so that no mask and no layout has to be known.
    """
    number_of = {id(module): number for number, layer in enumerate(layers, 1) for module in layer.modules()}
    name = unwrapped(model).config.get_text_config()._attn_implementation
    registered = ALL_ATTENTION_FUNCTIONS.get(name)

    def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        number, scaling = number_of.get(id(module)), kwargs.get("scaling")
        if number is not None:
            size = query.shape[-1]
            factor = 1.0 if scaling is None or math.isclose(scaling, size**-0.5) else scaling * size**0.5
            for kind, tap in {"query": Tap(query, factor), "key": Tap(key), "value": Tap(value)}.items():
                if number in needs.get(kind, ()):
                    taps[kind][number] = tap
        return (registered or _own_eager(module))(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS[name] = attend
    try:
        yield
    finally:
        if registered is None:
            del ALL_ATTENTION_FUNCTIONS[name]
        else:
            ALL_ATTENTION_FUNCTIONS[name] = registered


def _own_eager(module: nn.Module) -> Any:
    """The plain attention of a family, beside its code: it is not in the table of transformers."""
    files: Any = (sys.modules[kind.__module__] for kind in type(module).__mro__)
    return next(file.eager_attention_forward for file in files if hasattr(file, "eager_attention_forward"))


def no_attention(model: nn.Module, number: int) -> ValueError:
    """To be raised."""
    return ValueError(
        f"layer {number} of a {type(unwrapped(model)).__name__} has no attention of transformers' own kind, whose "
        "queries, keys and values could be kept: choose another layer, or a term on hidden states."
    )


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The model itself, however an engine or PEFT has wrapped it."""
    return next(module for module in model.modules() if isinstance(module, PreTrainedModel))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The layers of a causal LM, however an engine or PEFT has wrapped it.

    Raises:
        ValueError: they do not lie in one list.
    """
    base: Any = unwrapped(model)
    count = base.config.get_text_config().num_hidden_layers
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else base
    parts = (*decoder.modules(), *base.modules())  # some families call their output projection the decoder
    lists = [part for part in parts if isinstance(part, nn.ModuleList) and len(part) == count]
    if not lists:
        raise ValueError(
            f"the {count} layers of a {type(base).__name__} do not lie in one list: they cannot be tapped."
        )
    return lists[0]


def millions(count: int) -> str:
    """A number of parameters in words."""
    return f"{count / 1e9:,.2f} B" if count >= 1e9 else f"{count / 1e6:,.2f} M"


def bits_of(model: PreTrainedModel) -> int | None:
    """In how many bits bitsandbytes has packed it."""
    if getattr(model, "is_loaded_in_4bit", False):
        return 4
    return 8 if getattr(model, "is_loaded_in_8bit", False) else None


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """How many rows of an output matrix a tokenizer can use. Matrices are often padded past it.

    A placeholder for pictures or sound at its end needs none, as nobody writes it: Gemma 3's tokenizer has one token
    more than the family's text models have rows. Nor do the tokens with which TRL, where it clones a chat template,
    fills up a vocabulary to a multiple of 64.
    """
    unused = {getattr(tokenizer, f"{kind}_token", None) for kind in ("image", "video", "audio")}
    vocabulary = tokenizer.get_vocab()
    return max(i for token, i in vocabulary.items() if token not in unused and not FILLER.fullmatch(token)) + 1


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
    hub = hub_options(options)
    config_file = find_config(name_or_path, **hub)
    config = load_config(name_or_path, options.get("trust_remote_code", False), **hub).get_text_config()
    dtype = config.dtype if dtype == "auto" else dtype
    description = {
        "model": public_name(name_or_path),
        "revision": extract_commit_hash(config_file, None),
        "bits": 4 if load_in_4bit else 8 if load_in_8bit else None,
        **({"dtype": str(dtype).removeprefix("torch.")} if dtype else {}),
    }
    if "quantization_config" in options or getattr(config, "quantization_config", None):
        del description["bits"]
    return description | files_hash(config_file)


def files_hash(config_file: str) -> dict[str, str]:
    """`{"files": hash}` of what is beside a `config.json`: of each weight its name, shape and a few samples, however
    they are called or cut into files. Nothing where there are none.
    """
    folder, digest, weights = Path(config_file).parent, hashlib.sha256(), {}
    for path in (*folder.glob("model*.safetensors"), *folder.glob("adapter_model*.safetensors")):
        with errors_of_loading(f"{path}"), safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                weights[name] = _sampled(file.get_tensor(name), FILE_SAMPLES)
    for name in sorted(weights):
        digest.update(name.encode() + weights[name])
    files = sorted(folder.glob("pytorch_model*.bin"))
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as pickled:
            for place in range(0, size, max(1, size // SAMPLES)):
                pickled.seek(place)
                digest.update(pickled.read(4096))
    return {"files": digest.hexdigest()[:16]} if weights or files else {}


def without_places(stored: dict[str, Any], wanted: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Two descriptions of models, or of ensembles, as they are to be compared: where the weights are the same, without
    what they were called, at which revision and in which files; what only one of them knows of its weights is left out.
    """
    pairs = list(zip(stored.get("ensemble", ()), wanted.get("ensemble", ()), strict=False))
    if len(pairs) == len(stored.get("ensemble", ())) == len(wanted.get("ensemble", ())) > 0:
        members = [without_places(*pair) for pair in pairs]
        stored = stored | {"ensemble": [member for member, _ in members]}
        wanted = wanted | {"ensemble": [member for _, member in members]}
    known = [name for name in ("weights", "files") if stored.get(name) and wanted.get(name)]
    if known and stored[known[0]] == wanted[known[0]]:
        left_out = {"model", "revision", "weights", "files"}
    else:
        left_out = {"weights", "files"} - set(known)
    first, second = (
        {name: value for name, value in description.items() if name not in left_out} for description in (stored, wanted)
    )
    return first, second


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
        digest.update(name.encode() + _sampled(weight.detach(), SAMPLES))
    return {"weights": digest.hexdigest()[:16]}


def _sampled(weight: Tensor, samples: int) -> bytes:
    """The shape of a weight, and some of its numbers from all over it."""
    flat = weight.flatten()
    numbers = flat[:: max(1, len(flat) // samples)].contiguous().cpu()
    return f" {tuple(weight.shape)} {weight.dtype}".encode() + numbers.view(torch.uint8).numpy().tobytes()


def public_name(name_or_path: str) -> str | None:
    """As it is recorded: of a folder its last part."""
    is_local = os.path.isdir(name_or_path) or os.path.isabs(name_or_path)
    return os.path.basename(name_or_path.rstrip("/")) if is_local else name_or_path or None


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def _whole_on_every_rank() -> Iterator[None]:
    """In some versions of transformers, FSDP's cpu_ram_efficient_loading leaves all ranks but the first empty, and
    accelerate then fills up the student alone.
    """
    name = "FSDP_CPU_RAM_EFFICIENT_LOADING"
    was = os.environ.pop(name, None)
    try:
        yield
    finally:
        if was is not None:
            os.environ[name] = was


def own_tokenizer(model: PreTrainedModel, **options: Any) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside the weights; None for a model made from a config."""
    name = model.config._name_or_path
    options["revision"] = getattr(model.config, "_commit_hash", None)  # a folder has none
    return find_tokenizer(name, **options) if name else None


def require_same_ids(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if an ordinary token of the student has another id in the teacher's vocabulary, or one of a few
    texts has other ids there: equal vocabularies prove little, as merges and normalisers make the ids of a text.

    Tokens that were added to the student's vocabulary may differ where the data does not use them: see
    `unshared_tokens`.
    """
    different = [token for token in _unshared(teacher, student) if token not in student.added_tokens_encoder]
    if different:
        of_student, of_teacher = student.get_vocab(), teacher.get_vocab()
        pairs = [f"{token!r}: {of_student[token]} against {of_teacher.get(token)}" for token in different[:3]]
        raise different_ids(_size(teacher), student, f"{len(different):,} tokens ({', '.join(pairs)})")
    for text in TEXTS:
        require_same_ids_of(text, teacher, student)


def require_same_ids_of(text: str, teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> None:
    """Raises ValueError if a text has other ids for the teacher. How it begins is left out: a space in front, or none,
    is a habit of tokenizers.
    """
    ids, ids_of_student = _ids_of(text, teacher), _ids_of(text, student)
    count = min(len(ids), len(ids_of_student)) - 1
    if count > 0 and ids[-count:] != ids_of_student[-count:]:
        raise different_ids(_size(teacher), student, f"the text {text[:40]!r} ({ids[:6]} against {ids_of_student[:6]})")


def _ids_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """No ids where the text has a letter that the vocabulary lacks, and no token stands for what it lacks."""
    try:
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    except Exception as error:  # `tokenizers` has no class of its own
        if "UNK" in str(error):
            return []
        raise


def unshared_tokens(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens that were added to the student's vocabulary and have another id in the teacher's, or none."""
    return {token: student.added_tokens_encoder[token] for token in _unshared(teacher, student)}


def _unshared(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> list[str]:
    of_teacher, size = teacher.get_vocab(), vocabulary_size(student)
    return [token for token, i in student.get_vocab().items() if i < size and of_teacher.get(token) != i]


def _size(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"{len(tokenizer.get_vocab()):,} tokens, {type(tokenizer).__name__}"


def different_ids(teachers: str, student: PreTrainedTokenizerBase, what: str) -> ValueError:
    """To be raised. `teachers` follows "the teacher's tokenizer", and `what` names what has other ids."""
    return ValueError(
        f"the teacher's tokenizer ({teachers}) and the student's ({len(student.get_vocab()):,} tokens, "
        f"{type(student).__name__}) give different ids for {what}, so their distributions cannot be compared token by "
        "token. A teacher in memory is aligned by its bytes (teacher_alignment: auto); otherwise distil from the "
        "teacher's text (sequence-level distillation), or give both the same tokenizer."
    )


def context_length(model: PreTrainedModel | PeftModel) -> int | None:
    """The longest sequence that a model can read beside a learned prompt, in tokens; None if there is no limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    return limit - getattr(getattr(model, "active_peft_config", None), "num_virtual_tokens", 0)


def refuse_past_context(length: int, max_length: int | None, where: str, role: str = "teacher") -> None:
    """Raises ValueError if a sequence is longer than the model in that role can read."""
    if max_length is not None and length > max_length:
        raise ValueError(
            f"{where} has a sequence of {length:,} tokens, longer than the {role}'s context of {max_length:,}. Set "
            f"max_length={max_length} or less."
        )
