"""The head's loss where the teacher has other tokens: over groups of tokens that end at the same byte.

Before a group both models have read the same text. What they say there is compared in one of four ways:

| | compares | |
|---|---|---|
| `prefix` | each token that both have with all that begins with it; and the group's text | ours |
| `xtoken` | the teacher's tokens, to which the student's are projected | X-Token's P-KL, arXiv:2605.21699 |
| `alm` | whether the group's text comes or not | approximate likelihood matching, arXiv:2503.20083 |
| `uld` | sorted probabilities, whatever they are of | universal logit distillation, arXiv:2402.12030 |

`prefix` is a divergence between two distributions over the same outcomes. A token that only one side has is in the cell
of the shared token with which it begins, as the other tokenizer cuts it. Where a group has several tokens on a side,
that the text goes on with the group's bytes is one more outcome, cut out of its cell. So a student that says the same
in other tokens has no gradient, nothing is pushed down for want of a counterpart, and with equal tokenizers it is the
plain divergence. It takes any divergence. The others have their own, and are here to be compared with:

- `xtoken`: of a group of several tokens, the mean of the distributions at its positions; the weights of several pieces
  halve from one to the next; the teacher's tokens to which nothing leads are left out of the sum. These three are ours
  where we know no more of the paper. Its hybrid form, H-KL, is not here.
- `alm`: p to the power of 1/τ with τ = 100, and times τ, so that its size does not depend on τ.
- `uld`: at the start of a group, where the paper takes equal positions.

How likely a model finds a text that ends within its tokens: `prefix` and `alm` take for the last token all those that
begin with its bytes. A model that has "returns" gives "return" less than one that has not, though both mean the same;
this is what the papers call the bias of a tokenizer, and so it does not come in.

No `[N, V]` is held: chunks of groups go through both heads, and give their gradient at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_distill.divergences import Divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused.head_loss import (
    MadeGradients,
    chunk_rows,
    opened_student,
    opened_teachers,
    weight_of_rows,
)
from llm_distill.losses.fused.products import WeightGradient
from llm_distill.losses.fused.task import Projection, is_likeliest, statistics_dtype
from llm_distill.losses.options import ALIGNMENTS
from llm_distill.signals import AlignedSignal, MixtureSignal, SharedTokens, Vocabulary

TAU = 100.0
"""ALM's τ."""
TINY = 1e-30
"""What a probability is at least in a logarithm."""


class Side(NamedTuple):
    """What one model says of some groups: its rows, of which each group has one or several after one another."""

    log_probs: Float[Tensor, "rows vocab"]
    """The student's has columns past the vocabulary too, if its matrix has such rows."""
    targets: Int[Tensor, " rows"]
    group: Int[Tensor, " rows"]
    """The number of each row's group; that of the groups where a row is in none."""
    first: Int[Tensor, " groups"]
    last: Int[Tensor, " groups"]

    def sums(self, values: Float[Tensor, " rows"]) -> Float[Tensor, " groups"]:
        """Over the rows of each group."""
        return values.new_zeros(len(self.first) + 1).index_add(0, self.group, values)[:-1]

    @property
    def own(self) -> Float[Tensor, " rows"]:
        """Log-probabilities of the targets."""
        return self.log_probs.gather(1, self.targets[:, None])[:, 0]

    def means(self) -> Float[Tensor, "groups vocab"]:
        """The mean distribution of each group."""
        probs = self.log_probs.exp()
        rows = torch.bincount(self.group, minlength=len(self.first) + 1)[:-1, None]
        return probs.new_zeros(len(self.first) + 1, probs.shape[1]).index_add(0, self.group, probs)[:-1] / rows

    def log_ends(self, vocabulary: Vocabulary) -> Float[Tensor, " groups"]:
        """Of the last token of each group and all those that begin with its bytes, together."""
        mask = vocabulary.begins_with(self.targets[self.last])
        return _masked_log_sum(self.log_probs[self.last], mask)

    def log_likelihoods(self, vocabulary: Vocabulary) -> Float[Tensor, " groups"]:
        """Log-probability that the text goes on with the bytes of the group."""
        own = self.own
        return self.sums(own) - own[self.last] + self.log_ends(vocabulary)


def _masked_log_sum(log_probs: Tensor, mask: Bool[Tensor, "groups vocab"]) -> Float[Tensor, " groups"]:
    columns = log_probs[:, : mask.shape[1]]
    return columns.masked_fill(~mask, -torch.inf).logsumexp(1).clamp(max=0.0)


class Outcomes(NamedTuple):
    probs: Float[Tensor, "groups outcomes"]
    log_probs: Float[Tensor, "groups outcomes"]


def cell_probabilities(side: Side, vocabulary: Vocabulary, cells: int, is_split: Bool[Tensor, " groups"]) -> Outcomes:
    """The probability of each cell at the first row of each group, and of the group's text, which is cut out of its
    cell where `is_split`.
    """
    log_probs, tokens = side.log_probs[side.first], side.targets[side.first]
    probs = log_probs.exp()[:, : len(vocabulary.cell)]
    text = probs.new_zeros(len(probs))
    rest = text
    if split := is_split.nonzero()[:, 0].tolist():  # what follows is of those groups alone
        of = torch.tensor(split, device=probs.device)
        is_single = (side.first == side.last)[of]
        mask = vocabulary.begins_with(tokens[of])
        mask &= vocabulary.cell == vocabulary.cell[tokens[of]][:, None]
        alone = torch.zeros_like(mask).scatter_(1, tokens[of][:, None], True)
        mask = torch.where(is_single[:, None], mask, alone)
        begins = (probs[of] * mask).sum(1)
        own = side.own
        ends = side._replace(first=side.first[of], last=side.last[of]).log_ends(vocabulary)
        later = (side.sums(own) - own[side.first] - own[side.last])[of] + ends
        later = torch.where(is_single, torch.zeros_like(later), later.clamp(max=0.0))
        text = text.index_add(0, of, begins * later.exp())
        rest = rest.index_add(0, of, begins * -torch.expm1(later))
        probs = probs.masked_fill(torch.zeros_like(probs, dtype=torch.bool).index_copy_(0, of, mask), 0.0)
    of_cells = probs.new_zeros(len(probs), cells).scatter_add(1, vocabulary.cell.expand(len(probs), -1), probs)
    of_cells = of_cells.scatter_add(1, vocabulary.cell[tokens][:, None], rest[:, None])
    outcomes = torch.cat([of_cells, text[:, None]], 1)
    return Outcomes(outcomes, outcomes.clamp(min=TINY).log())


def prefix(student: Side, teacher: Side, shared: SharedTokens, divergence: Divergence) -> Float[Tensor, " groups"]:
    """D(teacher‖student) over the cells of shared tokens and the group's own text."""
    is_split = (student.first != student.last) | (teacher.first != teacher.last)
    q = cell_probabilities(student, shared.student, shared.cells, is_split)
    p = cell_probabilities(teacher, shared.teacher, shared.cells, is_split)
    with torch.no_grad():
        terms = divergence.terms(p.probs, q.probs, p.log_probs, q.log_probs)
    slope = (terms.psi * q.log_probs).sum(1)
    return terms.phi.sum(1) + (slope - slope.detach())


def xtoken(student: Side, teacher: Side, shared: SharedTokens, divergence: Divergence) -> Float[Tensor, " groups"]:
    """KL(p_T ‖ Wᵀ p_S), over the tokens of the teacher to which W leads."""
    p, q = teacher.means(), student.means()[:, : len(shared.pieces)]
    projected = torch.zeros_like(p)
    for piece in range(shared.pieces.shape[1]):
        ids, weights = shared.pieces[:, piece], shared.weights[:, piece].to(q)
        projected = projected.scatter_add(1, ids.expand(len(q), -1), q * weights)
    is_reached = torch.zeros(p.shape[1], dtype=torch.bool, device=p.device)
    is_reached[shared.pieces[shared.weights > 0]] = True
    p = p.where(is_reached, 0.0)
    return (p * (p.clamp(min=TINY).log() - projected.clamp(min=TINY).log())).sum(1)


def alm(student: Side, teacher: Side, shared: SharedTokens, divergence: Divergence) -> Float[Tensor, " groups"]:
    """τ · KL between (p^{1/τ}, 1 − p^{1/τ}) of the teacher and of the student, p the likelihood of the group."""
    log_p = (teacher.log_likelihoods(shared.teacher) / TAU).clamp(max=-1e-7)
    log_q = (student.log_likelihoods(shared.student) / TAU).clamp(max=-1e-7)
    against = -torch.expm1(log_p)
    otherwise = against.log() - (-torch.expm1(log_q)).log()
    return TAU * (log_p.exp() * (log_p - log_q) + against * otherwise)


def uld(student: Side, teacher: Side, shared: SharedTokens, divergence: Divergence) -> Float[Tensor, " groups"]:
    """Σ |p_(i) − q_(i)| over the i-th largest of each."""
    p, q = (side.log_probs[side.first].exp().sort(1, descending=True).values for side in (teacher, student))
    longest = max(p.shape[1], q.shape[1])
    p, q = (torch.nn.functional.pad(of, (0, longest - of.shape[1])) for of in (p, q))
    return (p - q).abs().sum(1)


METHODS: dict[str, Callable[[Side, Side, SharedTokens, Divergence], Float[Tensor, " groups"]]] = dict(
    zip(ALIGNMENTS, (prefix, xtoken, alm, uld), strict=True)
)


@dataclass
class AlignedTask:
    """What is wanted of the rows. `metrics` is filled on the way: name -> [rows] of the student's."""

    student: Projection
    teachers: list[Projection]
    signal: AlignedSignal
    method: str
    divergence: Divergence
    kd_weight: float
    ce_weight: float
    targets: Int[Tensor, " rows"]
    row_weights: Float[Tensor, " rows"] | None
    buffer_mib: int | None
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        hidden = self.student.hidden
        dtype = statistics_dtype(hidden.dtype)
        self.metrics = {name: hidden.new_zeros(len(hidden), dtype=dtype) for name in ("ce", "entropy", "correct", "kd")}
        self.metrics["teacher_ce"] = hidden.new_full((len(hidden),), torch.nan, dtype=dtype)
        self.shared = self.signal.shared.to(hidden.device)

    def loss_of(self, chunk: Chunk, raw: Tensor) -> Tensor:
        """The sum over the rows of a chunk, from the student's product."""
        log_q = self.student.logits(raw).log_softmax(-1)
        own = log_q.gather(1, self.targets[chunk.rows][:, None])[:, 0]
        student = Side(log_q, self.targets[chunk.rows], *chunk.student)
        metrics, rows = self.metrics, chunk.rows
        with torch.no_grad():
            metrics["ce"][rows] = -own
            metrics["entropy"][rows] = -(log_q.exp() * log_q).sum(-1)
            metrics["correct"][rows] = is_likeliest(own, log_q.amax(-1)).to(own)
        weights = torch.ones_like(own) if self.row_weights is None else self.row_weights[rows].to(own)
        loss = -self.ce_weight * (weights * own).sum()
        if not len(student.first):
            return loss
        with torch.no_grad():
            teacher = Side(self._log_probs(chunk.teacher_rows), self.signal.targets[chunk.teacher_rows], *chunk.teacher)
        values = METHODS[self.method](student, teacher, self.shared, self.divergence)
        with torch.no_grad():
            metrics["kd"][rows][student.first] = values
            of_rows = torch.bincount(student.group, minlength=len(student.first) + 1)[:-1]
            share = torch.cat([teacher.sums(teacher.own) / of_rows, own.new_full((1,), torch.nan)])
            metrics["teacher_ce"][rows] = -share[student.group]
        return loss + self.kd_weight * (weights[student.first] * values).sum()

    def _log_probs(self, rows: slice) -> Float[Tensor, "rows vocab"]:
        """The teacher's, or of the mixture of several."""
        log_ps = [teacher.logits(teacher.hidden[rows] @ teacher.weight.T).log_softmax(-1) for teacher in self.teachers]
        signal = self.signal.signal
        return signal.mix(log_ps, rows)[0] if isinstance(signal, MixtureSignal) else log_ps[0]

    def chunks(self) -> Iterator[Chunk]:
        """Whole groups, some at a time, with the rows between them that are in none."""
        device, signal = self.student.hidden.device, self.signal
        groups, teacher_groups = signal.student_groups.cpu().numpy(), signal.groups.cpu().numpy()
        total = len(groups)
        numbers = np.intersect1d(groups[groups >= 0], teacher_groups)
        begins = [np.searchsorted(_filled(of), numbers) for of in (groups, teacher_groups)]
        columns = len(self.student.weight) + sum(len(teacher.weight) for teacher in self.teachers)
        most = chunk_rows(columns, [torch.float32] * 4, device, self.buffer_mib)
        edges = [0]
        for place in range(1, len(numbers)):
            if any(of[place] - of[edges[-1]] >= most for of in begins):
                edges.append(place)
        for edge, end in zip(edges, [*edges[1:], len(numbers)], strict=True):
            start = 0 if edge == 0 else int(begins[0][edge])
            stop = total if end == len(numbers) else int(begins[0][end])
            first = int(begins[1][edge]) if edge < len(numbers) else 0
            last = len(teacher_groups) if end == len(numbers) else int(begins[1][end])
            sides = [_places(of, numbers[edge:end], device) for of in (groups[start:stop], teacher_groups[first:last])]
            yield Chunk(slice(start, stop), slice(first, last), *sides)


class Places(NamedTuple):
    """As in a `Side`."""

    group: Tensor
    first: Tensor
    last: Tensor


class Chunk(NamedTuple):
    rows: slice
    """The student's."""
    teacher_rows: slice
    student: Places
    teacher: Places


def _filled(groups: np.ndarray) -> np.ndarray:
    """With the number of the group before for rows in none, so that it is sorted."""
    return np.maximum.accumulate(groups) if len(groups) else groups


def _places(groups: np.ndarray, numbers: np.ndarray, device: torch.device) -> Places:
    index = np.searchsorted(numbers, groups)
    index[~np.isin(groups, numbers)] = len(numbers)
    rows = np.flatnonzero(index < len(numbers))
    first = rows[np.searchsorted(index[rows], np.arange(len(numbers)), side="left")]
    last = rows[np.searchsorted(index[rows], np.arange(len(numbers)), side="right") - 1]
    return Places(*(torch.from_numpy(of.astype(np.int64)).to(device) for of in (index, first, last)))


@torch.compiler.disable  # type: ignore[untyped-decorator]
def aligned_head_loss(
    student_hidden: Float[Tensor, "rows hidden"],
    student_head: LMHead,
    signal: AlignedSignal,
    method: str,
    divergence: Divergence,
    *,
    targets: Int[Tensor, " rows"],
    row_weights: Float[Tensor, " rows"] | None = None,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    num_rows: Tensor | int | None = None,
    buffer_mib: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " rows"]]]:
    """(Σ_groups kd_weight · D + Σ_rows ce_weight · CE) / num_rows, and what it was made of.

    Args:
        method: one of METHODS.
        divergence: of `prefix`.
        row_weights: of the student's rows; a group's is that of its first.
        num_rows: of the student, as in `fused_head_loss`, which see for the rest too.

    Returns:
        The loss, and per row, detached: `kd` (that of a group in its first row, 0 in the others), `ce`, `entropy`,
        `correct`, and `teacher_ce`, the teacher's of a group, in equal parts for the student's tokens of it.
    """
    with ExitStack() as opened:
        weight, bias, student = opened_student(student_head, student_hidden, opened)
        teachers = opened_teachers(signal, statistics_dtype(student.hidden.dtype), opened)
        task = AlignedTask(
            student, teachers, signal, method, divergence, kd_weight, ce_weight, targets, row_weights, buffer_mib
        )
        num_rows = weight_of_rows(len(targets), row_weights) if num_rows is None else num_rows
        loss = _AlignedHeadLoss.apply(student_hidden, weight, bias, task, num_rows, torch.is_grad_enabled())
    return loss, task.metrics


class _AlignedHeadLoss(MadeGradients):
    """Chunk by chunk of whole groups."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        task: AlignedTask,
        num_rows: Tensor | int,
        wants_gradients: bool,
    ) -> Tensor:
        needs_hidden, needs_weight, needs_bias = (wants_gradients and needs for needs in ctx.needs_input_grad[:3])
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight: WeightGradient | None = None
        d_bias = torch.zeros_like(bias, dtype=statistics_dtype(bias.dtype)) if needs_bias and bias is not None else None
        total = torch.zeros((), dtype=statistics_dtype(task.student.hidden.dtype), device=hidden.device)
        with torch.cuda.device_of(hidden), torch.autocast(hidden.device.type, enabled=False):
            for chunk in task.chunks():
                inputs = task.student.hidden[chunk.rows]
                raw = (inputs @ task.student.weight.T).requires_grad_(needs_hidden or needs_weight or needs_bias)
                with torch.set_grad_enabled(raw.requires_grad):
                    loss = task.loss_of(chunk, raw)
                total += loss.detach()
                if not loss.requires_grad:
                    continue
                (d_raw,) = torch.autograd.grad(loss, raw)
                if d_bias is not None:
                    d_bias += d_raw.sum(0, dtype=d_bias.dtype)
                if d_hidden is not None:
                    d_hidden[chunk.rows] = (d_raw @ task.student.weight).to(d_hidden.dtype)
                if needs_weight:
                    d_weight = d_weight or WeightGradient(weight, inputs.dtype, 3, None)
                    d_weight.add(d_raw, inputs)
        no_rows = torch.zeros_like(weight) if needs_weight and d_weight is None else None
        made = (d_hidden, d_weight.total if d_weight else no_rows, d_bias)
        MadeGradients.keep(ctx, (hidden, weight, bias), made, num_rows)
        return total / num_rows
