"""One call of the fused head loss, as both back ends read it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_distill.divergences import Divergence
from llm_distill.heads import LMHead
from llm_distill.signals import Signal, SparseSignal

NOTHING = -1e30
"""log 0 as a number: exp gives 0, and 0 times it is 0 where 0 times −inf would be NaN. A raw logit of this value takes
no part, whatever the bias, the scale and the cap."""


@dataclass(frozen=True)
class Projection:
    """An output projection, opened: logits = post_process(hidden · weightᵀ + bias)."""

    head: LMHead
    hidden: Tensor
    """[rows, width], in the dtype that the product runs in, as `weight` is."""
    weight: Tensor
    """[vocab, width]."""
    bias: Tensor | None
    """[vocab], in `statistics_dtype` of the student's."""

    def logits(self, raw: Tensor) -> Tensor:
        """From a part of the product, in whichever dtype it came, to logits in float32 at least."""
        raw = raw.to(statistics_dtype(raw.dtype))
        return self.head.post_process(raw if self.bias is None else raw + self.bias)

    def logits_of_included(self, raw: Tensor) -> Tensor:
        """The same, where tokens may be marked as excluded."""
        if self.bias is None and self.head.is_linear:
            return self.logits(raw)
        return self.logits(raw).masked_fill_(raw < NOTHING / 10, NOTHING)

    def logits_at(self, raw: Tensor, ids: Tensor) -> Tensor:
        """Of a few tokens a row: [rows, k]."""
        few = raw.gather(-1, ids).to(statistics_dtype(raw.dtype))
        return self.head.post_process(few if self.bias is None else few + self.bias[ids])


class RowStatistics(NamedTuple):
    """Of the student's logits z, over the vocabulary without the tokens that are marked as excluded.

    The maximum is kept apart from the sums: added to them, it would round them off where it is large.
    """

    maximum: Float[Tensor, " rows"]
    log_total: Float[Tensor, " rows"]
    """log Σ exp (z − maximum)."""
    tempered_log_total: Float[Tensor, " rows"]
    """log Σ exp ((z − maximum) / T)."""
    mean: Float[Tensor, " rows"]
    """Σ (z − maximum) · softmax(z)."""


class Choice(NamedTuple):
    """The few tokens of each row that are wanted."""

    most: int
    """No row has more; without a threshold the likeliest so many, the likeliest first."""
    threshold: float = 0.0
    """Every token with probability min(1, p / threshold), by systematic sampling (Madow, 1949): the tokens at which the
    sum of these, from a random start below 1, passes a whole number. In the order of their ids."""


class Few(NamedTuple):
    """Those tokens."""

    values: Float[Tensor, "rows most"]
    ids: Int[Tensor, "rows most"]
    """−1 where a row has fewer."""
    vocab_size: int
    """Of how many tokens."""


@dataclass(frozen=True)
class Job:
    """What is wanted of every row. `metrics` is filled on the way: name -> [rows]."""

    student: Projection
    signal: Signal | None
    teachers: list[Projection]
    """One, or the members of a mixture; none for a sparse signal."""
    divergence: Divergence
    temperature: float
    kd_weight: float
    squared: float
    """What multiplies the divergence: T² or 1."""
    ce_weight: float
    targets: Tensor | None
    metrics: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = ["entropy"]
        if self.targets is not None:
            names += ["ce"]
        if self.signal is not None:
            names += ["kd"]
        if self.teachers:
            names += ["kl", "acceptance", "top1_agreement", "confidence", "teacher_confidence"]
            names += ["teacher_ce", "correct", "teacher_correct"] if self.targets is not None else []
        elif isinstance(self.signal, SparseSignal) and self.signal.log_tail is not None:
            names += ["top1_agreement"]
        elif isinstance(self.signal, SparseSignal) and self.signal.entropy is not None and self.temperature == 1:
            names += ["kl"]
        hidden = self.student.hidden
        for name in names:
            self.metrics[name] = hidden.new_empty(len(hidden), dtype=statistics_dtype(hidden.dtype))

    @property
    def kd_slope(self) -> float:
        """What multiplies ψ − qΣψ in the gradient on the logits."""
        return self.kd_weight * self.squared / self.temperature

    def loss(self) -> Tensor:
        """Σ over rows, from the metrics."""
        total = torch.zeros((), dtype=self.metrics["entropy"].dtype, device=self.metrics["entropy"].device)
        if self.signal is not None:
            total += self.kd_weight * self.metrics["kd"].sum()
        if self.ce_weight:
            total += self.ce_weight * self.metrics["ce"].sum()
        return total


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over the vocabulary and gradients over rows are taken in float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def put(full: Float[Tensor, "rows vocab"], ids: Int[Tensor, "rows k"], values: Float[Tensor, "rows k"]) -> None:
    """`scatter_` along the vocabulary, which copies all of a 16-bit tensor on a CPU. Equal ids carry equal values."""
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    full.index_put_((rows.expand_as(ids), ids), values.to(full.dtype))
