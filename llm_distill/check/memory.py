"""What a training step takes of each rank's memory, from configurations alone: no weights, no device.

The models are made of tensors without storage (`FakeTensorMode`), and run forward and backward on a batch of the size
that training has, while what is alive is counted. So every family, attention, adapter and mixed precision is counted by
its own code; only the loss, whose buffers `fused_head_loss` chooses, the optimizer and sharding are arithmetic.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed as hf_deepspeed
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from llm_distill.config import DistillationConfig
from llm_distill.generation.engines.transformers import PROMPTS_AT_A_TIME
from llm_distill.heads import intercepted, output_projection
from llm_distill.loading import errors_of_loading
from llm_distill.losses.fused.head_loss import chunk_rows
from llm_distill.losses.layers import CHUNK_NUMBERS
from llm_distill.losses.objective import Objective
from llm_distill.models import ATTENTION, LAST

STATES = {"sgd": 0, "adafactor": 0, "lion": 1, "rmsprop": 1, "adagrad": 1}
"""Numbers that an optimizer keeps for each weight; Adam and its kin keep two."""
MATRICES_OF_PAIRS = 8
"""Of tokens by tokens, that are there at a time in a term on layers: scores, their softmax, logarithm and gradient, of
both models.
"""
PACKED_BYTES = {4: 0.5 + 4 / 64, 8: 1.0}
"""Of a weight; NF4 has a float32 scale for each 64."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each rank. They are not all there at once, so `total` is the highest moment and not their sum."""

    weights: int
    """The student's, adapters included; sharded, with the layers that are gathered at a time."""
    gradients: int
    optimizer: int
    activations: int
    """What forward keeps and backward takes beside it; in mixed precision, the 16-bit copies of weights too."""
    teacher_weights: int
    teacher_activations: int
    """The most that its forward takes, without logits."""
    loss_buffers: int
    """Logits of a chunk of rows, what the teacher says of the batch, the gradients of hidden states and head, and what
    terms on layers make of both models' layers.
    """
    writing: int
    """Keys and values of the texts that the student writes at a time, and what it gathers of its shards for that."""
    total: int

    def __str__(self) -> str:
        parts = {f.name.replace("_", " "): getattr(self, f.name) for f in fields(self) if f.name != "total"}
        listed = ", ".join(f"{name} {size(value)}" for name, value in parts.items() if value >= 2**19)
        return size(self.total) + (f" ({listed})" if listed else "")


def size(count: float) -> str:
    """A number of bytes in words."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


def estimate_memory(
    student: PreTrainedConfig,
    teacher: PreTrainedConfig | None,
    args: DistillationConfig,
    *,
    peft_config: PeftConfig | None = None,
    dtype: torch.dtype | str = "float32",
    bits: int | None = None,
    teacher_dtype: torch.dtype | str = "auto",
    teacher_bits: int | None = None,
    ranks: int = 1,
    sharded: bool = False,
    device: str = "cuda",
    length: int | None = None,
    teacher_length: int | None = None,
    written_length: int | None = None,
) -> MemoryEstimate:
    """The peak of a training step on each rank, for the student and the teacher of these configurations.

    Args:
        student: of its model. Batch, checkpointing, mixed precision, optimizer and loss are those of `args`.
        teacher: None where none is in memory: stored, behind a server, the student's own base, not there.
        peft_config: the student's adapters.
        dtype: of the student's weights, "auto" for the checkpoint's. Unless told otherwise, TRL loads it in float32.
        bits: 4 or 8 for a quantised student (QLoRA). bitsandbytes packs linear layers alone, not the head, and not the
            experts of a mixture where transformers fuses them.
        teacher_dtype: as `dtype`; a teacher has its checkpoint's unless told otherwise.
        teacher_bits: as `bits`; such a teacher stays whole on every rank.
        ranks: processes in all.
        sharded: whether they share out weights, gradients and optimizer, as FSDP 2 and ZeRO-3 do.
        device: "cuda" or "cpu", which decides how the loss is computed.
        length: tokens of the longest sequence (default: `args.max_length`, or what the student can read).
        teacher_length: of the longest that the teacher reads, if that is another.
        written_length: of the longest that the student writes, with its prompt.

    Raises:
        ValueError: a family whose forward depends on the values of its tensors: it cannot be known without running it.
    """
    share = 1 / ranks if sharded else 1.0
    batch, weights_dtype = _batch_shape(student, args, length), _as_dtype(dtype, student)
    mixed = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    ours = _traced(student, args, batch, weights_dtype, mixed, bits, share, peft_config)
    theirs = None
    if teacher is not None:
        teachers_dtype = _as_dtype(teacher_dtype, teacher)
        whole = 1.0 if teacher_bits else share
        read = _batch_shape(student, args, teacher_length or length)
        theirs = _traced(teacher, None, read, teachers_dtype, mixed, teacher_bits, whole)

    rows, states = batch[0] * batch[1], _optimizer_bytes(args, ours)
    d_head = ours.head_bytes * max(1, 4 // weights_dtype.itemsize) if ours.trains_head else 0  # summed in float32
    signal = 0 if theirs is None else rows * theirs.hidden_bytes
    buffers = _buffer_bytes(args, ours, theirs is not None, rows, mixed or weights_dtype, torch.device(device))
    loss = buffers + signal + rows * ours.hidden_bytes + d_head
    loss += _bytes_of_terms(args, student, teacher or student, batch, (mixed or weights_dtype).itemsize)
    gradients = ours.gradients * share

    accumulates = args.gradient_accumulation_steps > 1
    before = gradients if accumulates else 0.0
    in_backward = ours.peak + gradients if accumulates else ours.peak_with_gradients
    if device == "cpu":
        in_backward += buffers  # kept for the next step
    in_backward += d_head if ours.is_tied else d_head * share  # of a tied one, until the embedding has its own
    always = ours.weights + states * share + (0.0 if theirs is None else theirs.weights)
    writing = 0.0
    if written_length is not None:
        writing = _writing_bytes(student, args, written_length, weights_dtype, mixed, gathers=sharded)
    highest = max(before + (0 if theirs is None else theirs.peak), before + ours.kept + loss, in_backward, writing)
    return MemoryEstimate(
        weights=int(ours.weights),
        gradients=int(gradients),
        optimizer=int(states * share),
        activations=int(ours.peak),
        teacher_weights=0 if theirs is None else int(theirs.weights),
        teacher_activations=0 if theirs is None else int(theirs.peak),
        loss_buffers=int(loss),
        writing=int(writing),
        total=int(always + highest),
    )


@dataclass
class _Trace:
    """Bytes, of one model and one batch."""

    weights: float
    """On this rank, with what is gathered of the others."""
    gradients: int
    """Of all trained weights, unsharded."""
    trained: int
    """How many they are."""
    kept: int
    """Alive when forward comes to the head."""
    peak: int
    peak_with_gradients: float
    hidden_bytes: int
    """Of a row that goes into the head."""
    head_bytes: int
    vocab_size: int
    trains_head: bool
    is_tied: bool


class _Alive(TorchDispatchMode):
    """Counts the bytes of what operations made and nothing has released."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.gradients = self.peak_with_gradients = 0.0
        self._known = {_storage(tensor)._cdata for tensor in (*model.parameters(), *model.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # Without storage, the product of a mixture's experts is known in bfloat16 alone.
            result = func(*(a.bfloat16() if i < 2 else a for i, a in enumerate(args)), **(kwargs or {})).to(args[0])
        else:
            result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(_storage(tensor))
        return result

    def _add(self, storage: Any) -> None:
        key, count = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        weakref.finalize(storage, self._remove, key, count)
        self.now += count
        self.peak = max(self.peak, self.now)
        self.peak_with_gradients = max(self.peak_with_gradients, self.now + self.gradients)

    def _remove(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.now -= count


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()


def _traced(
    config: PreTrainedConfig,
    args: DistillationConfig | None,
    batch: tuple[int, int],
    dtype: torch.dtype,
    mixed: torch.dtype | None,
    bits: int | None,
    share: float,
    peft_config: PeftConfig | None = None,
) -> _Trace:
    """A forward and, with `args`, a backward. Raises ValueError as `estimate_memory`."""
    config = copy.deepcopy(config)  # building a model writes into it
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # its bits are counted, its kernels cannot run here
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None  # PyTorch's own, which keeps what the other fused ones keep
    with errors_of_loading("a model of this configuration"), torch.device("meta"), _unpartitioned():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = _weight_bytes(model, bits, share, mixed or dtype)
    if bits or args is None:
        model.requires_grad_(False)
    learner: nn.Module = model
    if peft_config is not None:
        learner = get_peft_model(model, copy.deepcopy(peft_config), low_cpu_mem_usage=True)
        weights += sum(_bytes(p) for p in learner.parameters() if p.requires_grad) * share
    own_dtype = None
    if share != 1 and mixed is not None:  # gathered in it: nothing is left for autocast to copy
        own_dtype = dtype
        learner.to(mixed)
    try:
        return _trace(model, learner, args, batch, mixed, weights, share, own_dtype)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        if config.get_text_config() is not config:  # of images and text: only the text is taught
            return _traced(config.get_text_config(), args, batch, dtype, mixed, bits, share, peft_config)
        raise ValueError(
            f"the memory of a {config.model_type} cannot be estimated: its forward depends on values ({error})."
        ) from error


def _trace(
    model: PreTrainedModel,
    learner: nn.Module,
    args: DistillationConfig | None,
    batch: tuple[int, int],
    mixed: torch.dtype | None,
    weights: float,
    share: float,
    own_dtype: torch.dtype | None,
) -> _Trace:
    """`learner` is `model` or has it inside, with adapters; its gradients are in its weights' dtype or `own_dtype`."""
    if args is not None and args.gradient_checkpointing:
        checkpoint_activations(model, args)
        if learner is not model:
            model.enable_input_require_grads()
    learner.train(args is not None)
    head, at_head = output_projection(model), []
    with FakeTensorMode(allow_non_fake_inputs=True):
        _to_cpu_without_storage(learner)
        alive = _Alive(learner)
        trained = [p for p in learner.parameters() if p.requires_grad]

        def keep(hidden: Tensor) -> Tensor:
            at_head.append((alive.now, hidden.shape[-1] * hidden.element_size()))
            return hidden[..., :0]

        def gradient_bytes(parameter: Tensor) -> int:
            return parameter.numel() * (own_dtype or parameter.dtype).itemsize

        def release(parameter: Tensor) -> None:
            assert parameter.grad is not None
            alive.gradients += gradient_bytes(parameter) * share
            parameter.grad = None

        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(release)
        ids = torch.zeros(batch, dtype=torch.long)
        with torch.set_grad_enabled(args is not None), alive, intercepted(head, keep):
            with torch.autocast("cpu", mixed, enabled=mixed is not None):
                logits = learner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            if args is not None:
                logits.sum().backward()
    kept, hidden_bytes = at_head[0]
    embedding = model.get_input_embeddings()
    return _Trace(
        weights=weights,
        gradients=sum(map(gradient_bytes, trained)),
        trained=sum(p.numel() for p in trained),
        kept=kept,
        peak=alive.peak,
        peak_with_gradients=alive.peak_with_gradients,
        hidden_bytes=hidden_bytes,
        head_bytes=_bytes(head.weight),
        vocab_size=head.weight.shape[0],
        trains_head=head.weight.requires_grad,
        is_tied=embedding is not None and embedding.weight is head.weight,
    )


def _writing_bytes(
    config: PreTrainedConfig,
    args: DistillationConfig,
    length: int,
    dtype: torch.dtype,
    mixed: torch.dtype | None,
    *,
    gathers: bool,
) -> float:
    """Of what is written at a time, when it is longest."""
    config = copy.deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    with errors_of_loading("a model of this configuration"), torch.device("meta"), _unpartitioned():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    texts = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.steps_per_generation
    with FakeTensorMode(allow_non_fake_inputs=True):
        _to_cpu_without_storage(model)
        alive, ids = _Alive(model), torch.zeros(min(texts, PROMPTS_AT_A_TIME), length, dtype=torch.long)
        with torch.no_grad(), alive, torch.autocast("cpu", mixed, enabled=mixed is not None):
            cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
        kept = alive.now
        del cache
    return kept + (sum(p.numel() for p in model.parameters()) * (mixed or dtype).itemsize if gathers else 0)


def checkpoint_activations(model: PreTrainedModel | PeftModel, args: DistillationConfig) -> None:
    """As `Trainer.train` does."""
    options = dict(args.activation_checkpointing_kwargs or {})
    how = {name: options.pop(name) for name in ("every_n_layers", "offload") if name in options}
    model.activation_checkpointing_enable(options or None, **how)


def _to_cpu_without_storage(model: nn.Module) -> None:
    """From the meta device, which knows neither autocast nor fused attention; what is shared stays so."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for name, old in [*module._parameters.items(), *module._buffers.items()]:
            if old is None:
                continue
            new = made.setdefault(id(old), torch.empty_like(old, device="cpu"))
            if isinstance(old, nn.Parameter):
                new = made[id(old)] = new if isinstance(new, nn.Parameter) else nn.Parameter(new, old.requires_grad)
            module.__dict__["_buffers" if name in module._buffers else "_parameters"][name] = new


@contextmanager
def _unpartitioned() -> Iterator[None]:
    """ZeRO-3 would take the weights of every model that is made in its run."""
    config = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = config


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _weight_bytes(model: PreTrainedModel, bits: int | None, share: float, compute: torch.dtype) -> float:
    """On a rank: all of a model, or a share of it and what is gathered of the others at a time."""
    if bits:
        keep = get_keys_to_not_convert(model)
        linear = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and should_convert_module(n, keep)}
        packed = {id(m.weight): m.weight.numel() for m in linear.values()}
        return sum(packed[id(p)] * PACKED_BYTES[bits] if id(p) in packed else _bytes(p) for p in model.parameters())
    whole = sum(map(_bytes, model.parameters()))
    if share == 1:
        return whole
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    rest = sum(p.numel() for p in model.parameters()) - sum(sizes)  # embeddings and head stay until backward is over
    return whole * share + (rest + 2 * max(sizes, default=0)) * compute.itemsize  # a layer, and the next one ahead


def _as_dtype(dtype: torch.dtype | str | None, config: PreTrainedConfig) -> torch.dtype:
    if dtype in ("auto", None):
        dtype = config.dtype or config.get_text_config().dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _batch_shape(config: PreTrainedConfig, args: DistillationConfig, length: int | None) -> tuple[int, int]:
    """Texts and tokens; packed texts are one sequence."""
    length = length or args.max_length or getattr(config.get_text_config(), "max_position_embeddings", None) or 1024
    size = args.per_device_train_batch_size
    return (1, size * length) if args.packing or args.padding_free else (size, length)


def _optimizer_bytes(args: DistillationConfig, traced: _Trace) -> float:
    name = str(getattr(args.optim, "value", args.optim))
    states = next((count for start, count in STATES.items() if name.removeprefix("paged_").startswith(start)), 2)
    for bits in (4, 8):
        if f"{bits}bit" in name:
            return states * traced.trained * bits / 8
    return states * traced.gradients


def _buffer_bytes(
    args: DistillationConfig, student: _Trace, has_teacher: bool, rows: int, compute: torch.dtype, device: torch.device
) -> int:
    """As `fused_head_loss` chooses them, where an accelerator's product of 16-bit matrices gives float32."""
    logits = compute if device.type == "cpu" else torch.promote_types(compute, torch.float32)
    dtypes = [logits] * (1 + has_teacher) + ([compute] if logits != compute else [])
    chunk = min(chunk_rows(student.vocab_size, dtypes, device, args.loss_buffer_mib), -(-rows // 64) * 64)
    copy_of_head = student.head_bytes // 2 if compute.itemsize == 2 and student.trains_head else 0
    return chunk * student.vocab_size * sum(dtype.itemsize for dtype in dtypes) + copy_of_head


def _bytes_of_terms(
    args: DistillationConfig,
    student: PreTrainedConfig,
    teacher: PreTrainedConfig,
    batch: tuple[int, int],
    itemsize: int,
) -> int:
    """What is kept of the teacher's layers, its difference from the student's in float32, and a chunk of pairs of
    tokens. What is kept of the student's is there anyway, but in 16 bits for a copy.
    """
    objective = Objective.of(args)
    if not objective.terms:
        return 0
    objective = objective.fit(student, teacher)
    ours, theirs = (
        sum(_width(config, kind) * (kind == LAST or len(layers)) for kind, layers in needs.items())
        for config, needs in ((student, objective.student_needs), (teacher, objective.teacher_needs))
    )
    rows, heads = batch[0] * batch[1], max(c.get_text_config().num_attention_heads for c in (student, teacher))
    pairs = min(CHUNK_NUMBERS, heads * batch[1] ** 2)
    return rows * (theirs * (itemsize + 4) + ours * (4 if itemsize < 4 else 0)) + MATRICES_OF_PAIRS * pairs * 4


def _width(config: PreTrainedConfig, kind: str) -> int:
    """Of what is kept of a layer, for each token."""
    text = config.get_text_config()
    if kind not in ATTENTION:
        return text.hidden_size
    heads = text.num_attention_heads
    groups = heads if kind == "query" else getattr(text, "num_key_value_heads", None) or heads
    return groups * (getattr(text, "head_dim", None) or text.hidden_size // heads)
