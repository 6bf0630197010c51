"""What the fused head loss is to do with its rows, as every back end reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_distill.divergences import Divergence
from llm_distill.heads import LMHead
from llm_distill.signals import MixtureSignal, Signal, SparseSignal, TokenSignal

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
    """[vocab, width], and in a student's the rows past the vocabulary after those."""
    bias: Tensor | None
    """One number for each row of the weight, in `statistics_dtype` of the student's."""

    @property
    def has_outside(self) -> bool:
        """Whether there are rows past the vocabulary."""
        return len(self.weight) > self.head.vocab_size

    def logits(self, raw: Tensor, first: int = 0) -> Tensor:
        """From some columns of the product, from the one of token `first` on, in whichever dtype they came, to logits
        in float32 at least.
        """
        x = raw.to(statistics_dtype(raw.dtype))
        if self.bias is None and self.head.is_linear:
            return x
        x = x if self.bias is None else x + self.bias[first : first + raw.shape[-1]]
        return self.head.post_process(x).masked_fill(raw < NOTHING / 10, NOTHING)

    def logits_at(self, raw: Tensor, ids: Tensor) -> Tensor:
        """Of a few tokens a row: [rows, k]."""
        x = raw.gather(-1, ids).to(statistics_dtype(raw.dtype))
        return self.head.post_process(x if self.bias is None else x + self.bias[ids]).clamp(min=NOTHING)


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


class TokenChoice(NamedTuple):
    """Which tokens of each row are wanted: the likeliest, or with a threshold a fair draw."""

    most: int
    """How many tokens a row gives at most. Without a threshold it gives so many, the likeliest first."""
    threshold: float = 0.0
    """Every token comes with probability min(1, p / threshold), by systematic sampling (Madow, 1949): those at which
    the sum of these, from a random start below 1, passes a whole number, in the order of their ids."""


class TopTokens(NamedTuple):
    """The tokens of a `TokenChoice`, with their logits."""

    values: Float[Tensor, "rows most"]
    ids: Int[Tensor, "rows most"]
    """−1 where a row has fewer."""
    vocab_size: int
    """How many tokens they were chosen from."""


class Chunk(NamedTuple):
    """Some rows of a task with their raw logits: products, before bias and post-processing."""

    rows: slice
    """Which rows of the task these are."""
    raw: Float[Tensor, "rows vocab"]
    """The student's over the vocabulary."""
    teacher_raw: list[Tensor]
    """[rows, vocab] for each teacher."""
    gradient: Float[Tensor, "rows vocab"] | None
    """Where that of Σ rows on `raw` goes, if it is wanted; may be `raw` itself."""
    log_outside: Float[Tensor, " rows"] | None
    """log Σ exp z over the student's rows past the vocabulary; None where it has none."""


@dataclass(frozen=True)
class HeadLossTask:
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
    kd_row_weights: str = "equal"
    """By what the divergence weighs less in some rows: see `fused_head_loss`."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    row_weights: Tensor | None = None
    """[rows], what each weighs in the loss; None for 1 each. The back ends know nothing of it."""

    def __post_init__(self) -> None:
        sparse = self.sparse_signal
        names = ["entropy"]
        if self.targets is not None:
            names += ["ce", "correct"]
        if self.student.has_outside:
            names += ["outside_mass", "outside_loss"]
        if self.signal is not None:
            names += ["kd"]
            names += ["kd_row_weight"] if self.kd_row_weights != "equal" else []
        if self.teachers:
            names += ["kl", "acceptance", "top1_agreement", "confidence", "teacher_confidence"]
            names += ["teacher_ce", "teacher_correct"] if self.targets is not None else []
        elif isinstance(self.signal, TokenSignal):
            names += ["teacher_ce"]
        elif sparse is not None and sparse.log_tail is not None:
            names += ["top1_agreement"]
        elif sparse is not None and sparse.entropy is not None and self.temperature == 1:
            names += ["kl"]
        if isinstance(self.signal, MixtureSignal) and len(self.teachers) > 1:
            names += ["disagreement"]
        elif sparse is not None and sparse.disagreement is not None:
            self.metrics["disagreement"] = sparse.disagreement
        hidden = self.student.hidden
        for name in names:
            self.metrics[name] = hidden.new_empty(len(hidden), dtype=statistics_dtype(hidden.dtype))

    @property
    def sparse_signal(self) -> SparseSignal | None:
        """The signal, if it names a few tokens of each row."""
        return self.signal if isinstance(self.signal, SparseSignal) else None

    @property
    def kd_slope(self) -> float:
        """What multiplies ψ − qΣψ in the gradient on the logits."""
        return self.kd_weight * self.squared / self.temperature

    def weigh_kd(
        self,
        rows: slice,
        entropy: Float[Tensor, " rows"],
        log_text: Float[Tensor, " rows"] | None,
        log_likeliest: Float[Tensor, " rows"],
    ) -> Float[Tensor, " rows"]:
        """What multiplies the divergence in these rows, from 0 to 1, from what the teacher thinks there.

        Args:
            entropy: the teacher's, in nats.
            log_text: its log-probability of the text's own token.
            log_likeliest: the same of its likeliest one.
        """
        if self.kd_row_weights == "entropy":
            weights = (1 - entropy / math.log(self.student.head.vocab_size)).clamp(0, 1)
        else:
            assert log_text is not None, "it is checked"
            weights = (log_text - log_likeliest).exp().clamp(max=1)
        self.metrics["kd_row_weight"][rows] = weights
        return weights

    @property
    def outside_weight(self) -> float:
        """What multiplies −log (1 − m), with m the student's mass past the vocabulary at temperature 1."""
        return self.ce_weight + (0.0 if self.signal is None else self.kd_weight)

    def record_outside(
        self, rows: slice, log_outside: Float[Tensor, " rows"], log_vocabulary: Float[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Fills the metrics of the student's rows past the vocabulary, and adds their part to `ce`, which is there by
        then. The gradient on a vocabulary logit gets −outside_weight · m · q.

        Args:
            log_outside: log Σ exp z over those rows.
            log_vocabulary: the same over the vocabulary.

        Returns:
            Their mass m.
        """
        to_vocabulary = log_outside - log_vocabulary
        mass, loss = to_vocabulary.sigmoid(), -torch.nn.functional.logsigmoid(-to_vocabulary)
        self.metrics["outside_mass"][rows], self.metrics["outside_loss"][rows] = mass, loss
        if self.targets is not None:
            self.metrics["ce"][rows] += loss
        return mass

    def loss(self) -> Tensor:
        """Σ over rows, each times its weight, from the metrics."""
        metrics = self.metrics
        if self.row_weights is not None:
            metrics = {name: metrics[name] * self.row_weights for name in metrics}
        total = torch.zeros((), dtype=metrics["entropy"].dtype, device=metrics["entropy"].device)
        if self.signal is not None:
            total += self.kd_weight * metrics["kd"].sum()
            if self.student.has_outside:
                total += self.kd_weight * metrics["outside_loss"].sum()
        if self.ce_weight:
            total += self.ce_weight * metrics["ce"].sum()
        return total


@runtime_checkable
class Backend(Protocol):
    """The passes over rows; `torch_backend` says what each does."""

    def dense(self, task: HeadLossTask, chunk: Chunk) -> None: ...

    def statistics(self, task: HeadLossTask, raw: Tensor) -> RowStatistics: ...

    def softmax_gradient(
        self,
        task: HeadLossTask,
        raw: Tensor,
        gradient: Tensor,
        statistics: RowStatistics,
        slope: Tensor,
        slope_T: Tensor | None,
    ) -> None: ...


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over the vocabulary and gradients over rows are taken in float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def is_likeliest(logits: Float[Tensor, " rows"], maximum: Float[Tensor, " rows"]) -> Bool[Tensor, " rows"]:
    """Whether a token's logit is the row's maximum. Torch's tanh is not that of the kernels that sought it."""
    return logits.isclose(maximum, rtol=1e-6, atol=1e-6)


def set_tokens(full: Float[Tensor, "rows vocab"], ids: Int[Tensor, "rows k"], values: Float[Tensor, "rows k"]) -> None:
    """`scatter_` along the vocabulary, which copies all of a 16-bit tensor on a CPU. Equal ids carry equal values."""
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    full.index_put_((rows.expand_as(ids), ids), values.to(full.dtype))
