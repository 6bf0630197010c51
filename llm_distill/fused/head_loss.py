"""The distillation loss and its gradients in one forward pass over chunks of rows.

Per chunk: the student's and the teacher's logits, the divergence and the hard-label term on the same logits, the
gradient on the student's logits, and from it at once those on hidden states and head. So there are three student
products (logits, dX, dW), one teacher product, no `[rows, vocab]` tensor, and nothing is computed again in backward. A
frozen head costs no dW; under `no_grad` only the value is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_distill.divergences import Divergence
from llm_distill.fused.sparse import sparse_divergence
from llm_distill.heads import LMHead
from llm_distill.signals import HiddenSignal, MixtureSignal, Signal, SparseSignal

CHUNK_ELEMENTS = {"cpu": 2**20, "accelerator": 2**25}
"""Logits a chunk, where that is more than MIN_CHUNK_ROWS rows: on a CPU they should fit into its caches."""
MIN_CHUNK_ROWS = 128
"""With fewer rows, reading the head's weight costs more than the product."""


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
    num_rows: Tensor | int | None = None,
    squared_temperature: bool = True,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " rows"]]]:
    """Σ_rows (kd_weight · T² · D(p‖q at T) + ce_weight · CE at 1) / num_rows, and what it was made of.

    Args:
        student_hidden: what goes into the student's output projection.
        student_head: the student's head; its weight and bias get gradients if they require them.
        signal: what the teacher says about these rows; None for the cross-entropy alone.
        divergence: from `llm_distill.divergences`.
        temperature: T > 0, divides both logits in the divergence, not in the cross-entropy.
        targets: the next tokens; needed for the cross-entropy, whose value is then reported even at weight 0.
        num_rows: what the sum is divided by (default: the rows at hand). A trainer passes the rows of the whole step
            over micro-batches and ranks, so that the loss does not depend on how they are arranged.
        squared_temperature: multiply the divergence by T², which keeps its gradient's size (Hinton et al., 2015).

    Returns:
        The loss, a scalar to call `backward` on, and detached values per row, in nats unless said otherwise:
        `kd` (the divergence as it enters the loss, before its weight), `ce`, `entropy` (the student's) and, where the
        signal knows them, `kl` (forward KL at temperature 1), `teacher_ce`, `top1_agreement` (0 or 1) and `acceptance`
        (Σ min(p, q), the share of tokens that speculative decoding would accept; arXiv:2211.17192).

    Raises:
        ValueError: shapes, devices or vocabularies that do not fit; a signal that cannot serve the divergence.
    """
    _check(student_hidden, student_head, signal, divergence, temperature, ce_weight, targets)
    with student_head.weights() as (weight, bias), _teacher_logits(signal) as teacher_logits:
        weight, bias = weight.to(student_hidden.device), None if bias is None else bias.to(student_hidden.device)
        job = _Job(
            head=student_head,
            signal=signal,
            teacher_logits=teacher_logits,
            divergence=divergence,
            temperature=temperature,
            kd_factor=kd_weight,
            squared=temperature**2 if squared_temperature else 1.0,
            ce_factor=ce_weight,
            targets=targets,
            num_rows=max(len(student_hidden), 1) if num_rows is None else num_rows,
            wants_gradients=torch.is_grad_enabled(),
        )
        loss = _FusedHeadLoss.apply(student_hidden, weight, bias, job)
    return loss, job.metrics


@dataclass
class _Job:
    """Everything about one call that is not differentiated; `metrics` is filled on the way."""

    head: LMHead
    signal: Signal | None
    teacher_logits: Callable[[slice], list[Tensor]]
    divergence: Divergence
    temperature: float
    kd_factor: float
    squared: float
    ce_factor: float
    targets: Tensor | None
    num_rows: Tensor | int
    wants_gradients: bool

    def __post_init__(self) -> None:
        self.metrics: dict[str, Tensor] = {}

    def record(self, rows: slice, total: int, **values: Tensor) -> None:
        for name, value in values.items():
            if name not in self.metrics:
                self.metrics[name] = value.new_empty(total)
            self.metrics[name][rows] = value


class _FusedHeadLoss(torch.autograd.Function):
    """Gradients of the sum over rows, made in forward; backward divides them, once float16's loss scale is in."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job) -> Tensor:
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        d_hidden = _accumulator(hidden) if job.wants_gradients and needs_hidden else None
        d_weight = _accumulator(weight) if job.wants_gradients and needs_weight else None
        d_bias = _accumulator(bias) if job.wants_gradients and needs_bias and bias is not None else None
        compute = _compute_dtype(hidden, weight)
        x_all, w = hidden.to(compute), weight.to(compute)
        b = None if bias is None else bias.to(_statistics_dtype(compute))

        loss = torch.zeros((), dtype=_statistics_dtype(compute), device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in _chunks(len(hidden), job.head.vocab_size, hidden.device):
                x = x_all[rows]
                logits = _matmul(x, w.T)
                if b is not None:
                    logits += b
                logits = job.head.post_process(logits)
                row_loss, d_logits = _rows_loss(job, logits, rows, len(hidden))
                loss += row_loss.sum()
                if not job.wants_gradients:
                    continue
                if not job.head.is_linear:
                    d_logits *= job.head.post_process_slope(logits)
                if d_bias is not None:
                    d_bias += d_logits.sum(0)
                d_logits = d_logits.to(compute)
                if d_hidden is not None:
                    d_hidden[rows] = _matmul(d_logits, w)
                if d_weight is not None:
                    d_weight += _matmul(d_logits.T, x)

        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.num_rows = job.num_rows
        return loss / job.num_rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        factor = grad / ctx.num_rows
        result = [g if g is None else g.mul_(factor).to(d) for g, d in zip(ctx.gradients, ctx.dtypes, strict=True)]
        ctx.gradients = None  # free them with this call, not with the graph
        return *result, None


def _accumulator(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=_statistics_dtype(like.dtype))


def _rows_loss(job: _Job, logits: Tensor, rows: slice, total: int) -> tuple[Tensor, Tensor]:
    """The weighted loss of each row of a chunk, and its gradient on the logits."""
    log_q = logits.log_softmax(-1)
    q = log_q.exp()
    loss, d_logits = log_q.new_zeros(len(logits)), torch.zeros_like(logits)
    job.record(rows, total, entropy=-(q * log_q).sum(-1))

    if job.targets is not None:
        targets = job.targets[rows, None]
        ce = -log_q.gather(-1, targets)[:, 0]
        job.record(rows, total, ce=ce)
        if job.ce_factor:
            loss += job.ce_factor * ce
            d_logits += job.ce_factor * q
            d_logits.scatter_add_(-1, targets, torch.full_like(targets, -job.ce_factor, dtype=q.dtype))

    if job.signal is not None:
        T = job.temperature
        log_q_T = log_q if T == 1 else (logits / T).log_softmax(-1)
        q_T = q if T == 1 else log_q_T.exp()
        if isinstance(job.signal, SparseSignal):
            ids, log_p, log_tail = job.signal.ids[rows], job.signal.log_probs[rows], job.signal.log_tail
            log_tail = None if log_tail is None else log_tail[rows]
            value, d_scaled = sparse_divergence(job.divergence, ids, log_p, log_tail, log_q_T)
            if log_tail is not None:
                top = ids.gather(-1, log_p.argmax(-1, keepdim=True))[:, 0]
                job.record(rows, total, top1_agreement=(top == logits.argmax(-1)).to(q.dtype))
        else:
            parts = job.teacher_logits(rows)
            log_p = _log_mixture(job.signal, parts, 1.0)
            log_p_T = log_p if T == 1 else _log_mixture(job.signal, parts, T)
            phi, psi = job.divergence.terms(log_p_T, log_q_T)
            value, d_scaled = phi.sum(-1), psi - q_T * psi.sum(-1, keepdim=True)
            _record_likeness(job, rows, total, log_p, log_q, q)
        value = job.squared * value
        job.record(rows, total, kd=value)
        loss += job.kd_factor * value
        d_logits += (job.kd_factor * job.squared / T) * d_scaled
    return loss, d_logits


def _record_likeness(job: _Job, rows: slice, total: int, log_p: Tensor, log_q: Tensor, q: Tensor) -> None:
    """How alike the two full distributions are at temperature 1, whatever is being minimised."""
    p = log_p.exp()
    job.record(
        rows,
        total,
        kl=(p * (log_p - log_q)).sum(-1),
        acceptance=torch.minimum(p, q).sum(-1),
        top1_agreement=(log_p.argmax(-1) == log_q.argmax(-1)).to(q.dtype),
    )
    if job.targets is not None:
        job.record(rows, total, teacher_ce=-log_p.gather(-1, job.targets[rows, None])[:, 0])


@contextmanager
def _teacher_logits(signal: Signal | None) -> Iterator[Callable[[slice], list[Tensor]]]:
    """A function from rows to the logits [chunk, vocab] of each member of the signal, heads opened once for all."""
    members: tuple[HiddenSignal, ...] = ()
    if isinstance(signal, HiddenSignal):
        members = (signal,)
    elif isinstance(signal, MixtureSignal):
        members = signal.signals
    with ExitStack() as stack:
        opened = []
        with torch.no_grad():
            for member in members:
                weight, bias = stack.enter_context(member.head.weights())
                compute = _compute_dtype(member.hidden, weight)
                device = member.hidden.device  # a teacher spread over devices may have its head on another one
                bias = None if bias is None else bias.to(device)
                opened.append((member, member.hidden.to(compute), weight.to(device, compute), bias))

        def logits(rows: slice) -> list[Tensor]:
            result = []
            for member, hidden, weight, bias in opened:
                raw = _matmul(hidden[rows], weight.T)
                result.append(member.head.post_process(raw if bias is None else raw + bias))
            return result

        yield logits


def _log_mixture(signal: HiddenSignal | MixtureSignal, parts: list[Tensor], temperature: float) -> Tensor:
    """The mixture's log-probabilities: log p = log Σ wᵢ softmax(zᵢ / T)."""
    if isinstance(signal, HiddenSignal):
        return (parts[0] / temperature if temperature != 1 else parts[0]).log_softmax(-1)
    log_weights = torch.tensor(signal.weights, dtype=parts[0].dtype, device=parts[0].device).log()
    pairs = zip(parts, log_weights, strict=True)
    return torch.stack([(z / temperature).log_softmax(-1) + log_w for z, log_w in pairs]).logsumexp(0)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product in float32 at least; of 16-bit inputs off CUDA, rounded to 16 bits on the way."""
    if a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else (a @ b).float()
    return a @ b


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """What the products run in: autocast's choice where it is on, otherwise the wider of the two."""
    if torch.is_autocast_enabled(hidden.device.type):
        return torch.get_autocast_dtype(hidden.device.type)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _chunks(num_rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    elements = CHUNK_ELEMENTS["cpu" if device.type == "cpu" else "accelerator"]
    size = max(MIN_CHUNK_ROWS, elements // vocab_size)
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


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
    if targets is not None and targets.shape != hidden.shape[:1]:
        raise ValueError(f"student_hidden {tuple(hidden.shape)} and targets {tuple(targets.shape)} differ in rows.")
    if signal is None:
        return
    if len(signal) != len(hidden):
        raise ValueError(f"student_hidden {tuple(hidden.shape)} and a signal of {len(signal)} rows do not match.")
    if signal.vocab_size != head.vocab_size:
        raise ValueError(
            f"the student's head has {head.vocab_size:,} tokens and the signal {signal.vocab_size:,}. Give both the "
            "tokenizer's: LMHead.of(model, vocab_size=len(tokenizer))."
        )
    tensors = [signal.ids] if isinstance(signal, SparseSignal) else []
    tensors += [s.hidden for s in ((signal,) if isinstance(signal, HiddenSignal) else getattr(signal, "signals", ()))]
    if any(tensor.device != hidden.device for tensor in tensors):
        raise ValueError(f"student_hidden is on {hidden.device}, the signal on {[str(t.device) for t in tensors]}.")
    signal.check(divergence, temperature)
