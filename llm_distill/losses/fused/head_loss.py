"""The distillation loss and its gradients in one forward pass over chunks of rows.

Per chunk: the student's and the teacher's logits into two buffers that are used again, the divergence and the
hard-label term on the same logits, the gradient over the student's, and at once those on hidden states and head. So
there are three student products (logits, dX, dW), one teacher product, no `[rows, vocab]` tensor, and nothing is
computed again in backward. A frozen head costs no dW; under `no_grad` only the value is computed.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_distill.divergences import Divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused import cpp_backend, torch_backend
from llm_distill.losses.fused.cpp_backend import Kernels
from llm_distill.losses.fused.products import WeightGradient, chunk_buffers, logits_dtype, multiply
from llm_distill.losses.fused.sparse import sparse
from llm_distill.losses.fused.task import Backend, Chunk, HeadLossTask, Projection, statistics_dtype
from llm_distill.losses.options import KD_ROW_WEIGHTS
from llm_distill.signals import Signal, SparseSignal, TokenSignal

BUFFER_MIB = {"cpu": 256, "accelerator": 1024}
"""What the buffers of a chunk may take, where that is more than MIN_CHUNK_ROWS rows."""
MIN_CHUNK_ROWS, MAX_CHUNK_ROWS = 128, {"cpu": 2048, "accelerator": 4096}
"""The more rows, the more seldom the head's weight and its gradient are read. Beyond the maximum that saves nothing."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def fused_head_loss(
    student_hidden: Float[Tensor, "rows hidden"],
    student_head: LMHead,
    signal: Signal | None,
    divergence: Divergence,
    *,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    targets: Int[Tensor, " rows"] | None = None,
    row_weights: Float[Tensor, " rows"] | None = None,
    num_rows: Tensor | int | None = None,
    squared_temperature: bool = True,
    kd_row_weights: str = "equal",
    buffer_mib: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " rows"]]]:
    """Σ_rows (kd_weight · T² · D(p‖q at T) + ce_weight · CE at 1) / num_rows, and what it was made of.

    Where the student's output matrix has rows past the vocabulary, as most padded ones do, the divergence is that over
    the vocabulary, and each term has −log (1 − m) beside it, with m the student's mass on those rows at temperature 1:
    what the vocabulary lacks because of them. So they learn to get none, and the cross-entropy is the usual one over
    all rows. A teacher's own such rows are ignored.

    Args:
        student_hidden: what goes into the student's output projection.
        student_head: the student's head; its weight and bias get gradients if they require them.
        signal: what the teacher says about these rows; None for the cross-entropy alone.
        divergence: from `llm_distill.divergences`.
        temperature: T > 0, divides both logits in the divergence, not in the cross-entropy.
        targets: the next tokens; needed for the cross-entropy, whose value is then reported even at weight 0.
        row_weights: what each row's loss and gradient are multiplied by (default: 1).
        num_rows: what the sum is divided by (default: the rows at hand, or the sum of their weights). A trainer passes
            those of the whole step over micro-batches and ranks, so that the loss does not depend on how they are
            arranged.
        squared_temperature: multiply the divergence by T², which keeps its gradient's size (Hinton et al., 2015).
        kd_row_weights: the divergence is multiplied in each row by 1 (`equal`), by 1 − H / log V with the teacher's
            entropy H (`entropy`), or by its probability of the text's token over that of its likeliest (`correctness`);
            `num_rows` is what it was.
        buffer_mib: the memory for logits, in MiB (default: BUFFER_MIB). Less is slower: the head is read more often.

    Returns:
        The loss, a scalar to call `backward` on, and detached values per row, in nats unless said otherwise:
        `kd` (the divergence as it enters the loss, before its weight but with `kd_row_weight`, that of its row; of a
        `TokenSignal`, the estimate log q − log p of the reverse KL, beside which stands the policy gradient), `entropy`
        (the student's); with targets `ce` and
        `correct` (0 or 1, whether the likeliest token came next); with rows past the vocabulary `outside_mass` (m) and
        `outside_loss` (−log (1 − m), which `ce` includes); and where the signal knows them `kl` (forward KL at
        temperature 1), `teacher_ce`, `teacher_correct`, `top1_agreement` (0 or 1), `acceptance` (Σ min(p, q), the share
        of tokens that speculative decoding would accept; arXiv:2211.17192), `confidence` and `teacher_confidence` (the
        probability of the likeliest token).

    Raises:
        ValueError: shapes, devices or vocabularies that do not fit; a signal that cannot serve the divergence.
    """
    _check(student_hidden, student_head, signal, divergence, temperature, ce_weight, targets)
    _check_row_weights(signal, kd_row_weights, targets)
    with ExitStack() as opened:
        weight, bias, student = opened_student(student_head, student_hidden, opened)
        task = HeadLossTask(
            student=student,
            signal=signal,
            teachers=opened_teachers(signal, statistics_dtype(student.hidden.dtype), opened),
            divergence=divergence,
            temperature=temperature,
            kd_weight=kd_weight,
            squared=temperature**2 if squared_temperature else 1.0,
            ce_weight=ce_weight,
            targets=targets,
            row_weights=None if row_weights is None else row_weights.to(student.hidden.device),
            kd_row_weights=kd_row_weights,
        )
        num_rows = weight_of_rows(len(student_hidden), row_weights) if num_rows is None else num_rows
        loss = _FusedHeadLoss.apply(student_hidden, weight, bias, task, num_rows, buffer_mib, torch.is_grad_enabled())
    return loss, task.metrics


def weight_of_rows(rows: int, row_weights: Float[Tensor, " rows"] | None) -> Tensor | int:
    """What a loss over these rows alone is divided by."""
    return max(rows, 1) if row_weights is None else row_weights.sum()


class MadeGradients(torch.autograd.Function):
    """Gradients of the sum over rows on hidden states, weight and bias, its first inputs, which forward has made;
    backward divides them, once float16's loss scale is in.
    """

    @staticmethod
    def keep(ctx: Any, inputs: tuple[Tensor | None, ...], made: tuple[Tensor | None, ...], num_rows: Any) -> None:
        """What backward will give."""
        ctx.gradients, ctx.num_rows = made, num_rows
        ctx.dtypes = tuple(None if value is None else value.dtype for value in inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the first backward has given the gradients away: compute the loss again for a second.")
        factor = grad / ctx.num_rows
        result = [g if g is None else g.mul_(factor).to(d) for g, d in zip(ctx.gradients, ctx.dtypes, strict=True)]
        ctx.gradients = None  # free them with this call, not with the graph
        return *result, *[None] * (len(ctx.needs_input_grad) - len(result))


class _FusedHeadLoss(MadeGradients):
    """Chunk by chunk; see the top of this file."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        task: HeadLossTask,
        num_rows: Tensor | int,
        buffer_mib: int | None,
        wants_gradients: bool,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = (wants_gradients and needs for needs in ctx.needs_input_grad[:3])
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight: WeightGradient | None = None
        d_bias = None
        if needs_bias:
            assert bias is not None
            d_bias = torch.zeros_like(bias, dtype=statistics_dtype(bias.dtype))
        backend = choose_backend(task)
        with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
            for rows, d_logits in _chunks(task, backend, buffer_mib, needs_hidden or needs_weight or needs_bias):
                if d_logits is None:
                    continue
                hidden_rows, weights = task.student.hidden[rows], task.row_weights
                if weights is not None:  # on what is as wide as the hidden states, never on the vocabulary
                    hidden_rows = hidden_rows * weights[rows, None].to(hidden_rows.dtype)
                if d_bias is not None and weights is None:
                    d_bias += d_logits.sum(0, dtype=d_bias.dtype)
                elif d_bias is not None and weights is not None:
                    d_bias += (weights[rows].to(d_logits.dtype) @ d_logits).to(d_bias.dtype)
                if d_hidden is not None:
                    product = d_logits @ task.student.weight
                    d_hidden[rows] = product if weights is None else product * weights[rows, None].to(product.dtype)
                if needs_weight:
                    if d_weight is None:
                        kernels = backend if isinstance(backend, Kernels) else None
                        num_chunks = -(-len(hidden) // len(d_logits))
                        d_weight = WeightGradient(weight, task.student.hidden.dtype, num_chunks, kernels)
                    d_weight.add(d_logits, hidden_rows)
        no_rows = torch.zeros_like(weight) if needs_weight and d_weight is None else None
        made = (d_hidden, d_weight.total if d_weight else no_rows, d_bias)
        MadeGradients.keep(ctx, (hidden, weight, bias), made, num_rows)
        return task.loss() / num_rows


def _chunks(
    task: HeadLossTask, backend: Backend, buffer_mib: int | None, wants_gradients: bool
) -> Iterator[tuple[slice, Tensor | None]]:
    """Fills the task's metrics, chunk by chunk; gives the rows of each and the gradient on the student's product."""
    student, vocab_size = task.student, task.student.head.vocab_size
    device, compute = student.hidden.device, student.hidden.dtype
    columns = [(len(side.weight), logits_dtype(side.hidden.dtype, device)) for side in (student, *task.teachers)]
    in_place = columns[0][1] == compute
    if not in_place:
        columns.append((len(student.weight), compute))  # of the gradient
    total = len(student.hidden)
    most = chunk_rows(len(student.weight), [dtype for _, dtype in columns], device, buffer_mib)
    chunks, tile = max(-(-total // most), 1), _tile(most, device)
    size = min(-(-total // (tile * chunks)) * tile, most, total)  # all of about the same size: a small one is slow
    with chunk_buffers(size, columns, device) as buffers:
        for start in range(0, total, max(size, 1)):
            rows = slice(start, min(start + size, total))
            product, *others = (buffer[: rows.stop - start] for buffer in buffers)
            multiply(student.hidden[rows], student.weight.T, out=product)
            for teacher, out in zip(task.teachers, others, strict=False):
                multiply(teacher.hidden[rows], teacher.weight.T, out=out)
            gradient = None if not wants_gradients else product if in_place else others[-1]
            chunk = Chunk(
                rows=rows,
                raw=product[:, :vocab_size],
                teacher_raw=others[: len(task.teachers)],
                gradient=None if gradient is None else gradient[:, :vocab_size],
                log_outside=torch_backend.log_outside(task, product[:, vocab_size:]) if student.has_outside else None,
            )
            if task.teachers:
                (backend if task.kd_row_weights == "equal" else torch_backend).dense(task, chunk)
            else:
                sparse(backend, task, chunk)
            if student.has_outside and gradient is not None:
                torch_backend.outside_gradient(task, rows, product[:, vocab_size:], gradient[:, vocab_size:])
            yield rows, gradient


def choose_backend(task: HeadLossTask) -> Backend:
    """What the passes over rows run in: compiled where it can be, torch otherwise (and for mixtures)."""
    device = task.student.hidden.device
    if device.type == "cuda" and len(task.teachers) <= 1 and triton_is_available():
        from llm_distill.losses.fused import triton_backend

        return triton_backend if triton_backend.can_run(task.divergence, device) else torch_backend
    return cpp_backend.kernels_of(task) or torch_backend


@functools.cache
def triton_is_available() -> bool:
    return importlib.util.find_spec("triton") is not None


def chunk_rows(vocab_size: int, dtypes: list[torch.dtype], device: torch.device, buffer_mib: int | None) -> int:
    """How many rows of all buffers fit."""
    kind = "cpu" if device.type == "cpu" else "accelerator"
    rows = (buffer_mib or BUFFER_MIB[kind]) * 2**20 // (vocab_size * sum(dtype.itemsize for dtype in dtypes))
    if buffer_mib is not None:
        return max(1, min(MAX_CHUNK_ROWS[kind], rows))
    tile = _tile(rows, device)
    return max(MIN_CHUNK_ROWS, min(MAX_CHUNK_ROWS[kind], rows // tile * tile))


def _tile(rows: int, device: torch.device) -> int:
    """What a chunk is a multiple of. In bfloat16 on a CPU other multiples of 64 take up to 8 % longer, odd ones 30."""
    return 256 if rows >= 256 and device.type == "cpu" else 64


def opened_projection(
    head: LMHead, hidden: Tensor, weight: Tensor, bias: Tensor | None, statistics: torch.dtype | None = None
) -> Projection:
    compute = _compute_dtype(hidden, weight)
    bias = None if bias is None else bias.detach().to(hidden.device, statistics or statistics_dtype(compute))
    return Projection(head, hidden.to(compute), weight.to(hidden.device, compute), bias)


def opened_student(
    head: LMHead, hidden: Float[Tensor, "rows hidden"], stack: ExitStack
) -> tuple[Tensor, Tensor | None, Projection]:
    """Weight and bias of the student's head, through which gradients flow, and the projection without them."""
    weight, bias = stack.enter_context(head.weights(past_vocabulary=True))
    weight, bias = weight.to(hidden.device), None if bias is None else bias.to(hidden.device)
    return weight, bias, opened_projection(head, hidden.detach(), weight.detach(), bias)


@torch.no_grad()
def opened_teachers(signal: Signal | None, statistics: torch.dtype, stack: ExitStack) -> list[Projection]:
    """The heads of a signal's members, opened once for all rows."""
    opened = []
    for member in () if signal is None else signal.members:
        weight, bias = stack.enter_context(member.head.weights())
        opened.append(opened_projection(member.head, member.hidden, weight, bias, statistics))
    return opened


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the products run in: autocast's choice where it is on, otherwise the wider of the two."""
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
    is_summed_in_16_bits = dtype == torch.float16 and not hidden.is_cuda  # where sums over rows would overflow
    return torch.float32 if is_summed_in_16_bits else dtype


def _check(
    hidden: Tensor,
    head: LMHead,
    signal: Signal | None,
    divergence: Divergence,
    temperature: float,
    ce_weight: float,
    targets: Tensor | None,
) -> None:
    if not temperature > 0:
        raise ValueError(f"the loss temperature must be positive, got {temperature}.")
    if targets is None and ce_weight:
        raise ValueError(f"ce_weight={ce_weight} needs the targets.")
    if targets is not None:
        if targets.shape != hidden.shape[:1]:
            raise ValueError(f"student_hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)} differ in rows.")
        if targets.dtype != torch.int64:
            raise ValueError(f"targets must be int64, got {targets.dtype}.")
        if targets.device.type == "cpu" and targets.numel():  # elsewhere the look would wait for the device
            lowest, highest = targets.min().item(), targets.max().item()
            if not 0 <= lowest <= highest < head.vocab_size:
                raise ValueError(
                    f"targets run from {lowest} to {highest}, outside the student's {head.vocab_size:,} tokens."
                )
    if signal is None:
        return
    if len(signal) != len(hidden):
        raise ValueError(f"student_hidden {tuple(hidden.shape)} and a signal of {len(signal)} rows do not match.")
    if signal.vocab_size != head.vocab_size:
        raise ValueError(
            f"the student's head has {head.vocab_size:,} tokens and the signal {signal.vocab_size:,}. Give both the "
            "tokenizer's: LMHead.of(model, vocab_size=len(tokenizer))."
        )
    if isinstance(signal, TokenSignal) and targets is None:
        raise ValueError("the teacher's log-probabilities are those of the targets, and there are none.")
    if isinstance(signal, SparseSignal | TokenSignal):
        tensors = [signal.log_probs]
    else:
        tensors = [member.hidden for member in signal.members]
    if any(tensor.device != hidden.device for tensor in tensors):
        raise ValueError(f"student_hidden is on {hidden.device}, the signal on {[str(t.device) for t in tensors]}.")
    signal.check(divergence, temperature)


def _check_row_weights(signal: Signal | None, kd_row_weights: str, targets: Tensor | None) -> None:
    if kd_row_weights == "equal" or signal is None:
        return
    if kd_row_weights not in KD_ROW_WEIGHTS:
        raise ValueError(f"kd_row_weights must be one of {', '.join(KD_ROW_WEIGHTS)}, got {kd_row_weights!r}.")
    if kd_row_weights == "correctness" and targets is None:
        raise ValueError("kd_row_weights='correctness' needs the targets.")
    is_told = not isinstance(signal, TokenSignal)
    if isinstance(signal, SparseSignal) and signal.log_tail is None:
        is_told = kd_row_weights == "entropy" and signal.entropy is not None
    if not is_told:
        raise ValueError(
            f"kd_row_weights={kd_row_weights!r} needs what the teacher thinks of a row, and it tells draws or single "
            "tokens: use a teacher that tells its top tokens or everything."
        )
