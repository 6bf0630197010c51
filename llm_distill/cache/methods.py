"""What of a teacher's distribution is kept: a few tokens of each row, or the hidden state that all of it is made of.

| method | keeps, per row | serves |
|---|---|---|
| `TopK(k, mass, …)` | the likeliest tokens, the mass of all others | every divergence, of k + 1 cells (a lower bound) |
| `Hybrid(threshold)` | every token above the threshold, a fair draw of those below | forward KL, without bias |
| `Sampled(draws)` | a fair draw of all tokens | forward KL, without bias |
| `Hidden(dtype)` | the teacher's last hidden state; its head once | every divergence and temperature |

Tokens are kept with a level, a whole number that stands for a probability: of `TopK` and `Hybrid` in equal steps of √p,
which for a given number of steps cost the least KL (to second order it is 2 Σ (Δ√p)²). Unlikely tokens have few levels,
hence many equal ones, and those take the fewest bytes; how levels are packed is `codec`'s.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_distill.losses.fused.logits import top_tokens
from llm_distill.losses.fused.task import TokenChoice, TopTokens

ENTROPY_STEP = 1 / 16
"""Nats; the mean over many rows is much closer than that."""


class Kept(NamedTuple):
    """Tokens of N rows, ragged: those of the first row, then those of the second, …"""

    counts: Int[Tensor, " rows"]
    ids: Int[Tensor, " entries"]
    levels: Int[Tensor, " entries"]
    tail: Int[Tensor, " rows"] | None
    """The level of the mass outside; None for samples, which stand for all of it."""
    entropy: Int[Tensor, " rows"]
    """The teacher's, in ENTROPY_STEPs."""


class SparseMethod(ABC):
    """Chooses tokens and gives each a level."""

    name: ClassVar[str]
    has_tail: ClassVar[bool] = False
    choice: TokenChoice | None = None
    """The tokens that are all it looks at; None: it looks at all."""
    step: float
    """Of √p, from one level to the next, at most."""
    lowest: float = 0.0
    """√p of the last level."""

    @property
    def num_levels(self) -> int:
        """Levels run from 0 (the largest weight) to one below this."""
        return math.ceil((1 - self.lowest) / self.step) + 1

    @property
    def spacing(self) -> float:
        """√p from one level to the next, so that 1 and `lowest` are levels."""
        return (1 - self.lowest) / (self.num_levels - 1)

    @property
    def num_tail_levels(self) -> int:
        """Those of the mass outside; the last is for none."""
        return 2 * self.num_levels - 1

    @property
    @abstractmethod
    def max_entries(self) -> int:
        """How many tokens a row can have."""

    @abstractmethod
    def keep(
        self, scores: Any, log_total: Float[Tensor, " rows"], uniform: Float[Tensor, "rows 2"]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Chooses, with two uniform numbers per row.

        Args:
            scores: log p = scores − log_total: [rows, vocab], or those of its `choice`.

        Returns:
            Row, id and level of each entry (`[entries]`), and the level of the tail (`[rows]`) if there is one.
        """

    def log_weights(self, levels: Int[Tensor, " entries"]) -> Float[Tensor, " entries"]:
        """What the levels stand for, in nats. Those of a method with a tail are not yet normalised: see `decode`."""
        return 2 * (self.lowest + (self.num_levels - 1 - levels).double() * self.spacing).log()

    def log_tail(self, levels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        """The same of the mass outside, whose fourth root has steps half as wide: it may be tiny, and must not be 0."""
        return 4 * ((self.num_tail_levels - 1 - levels).double() * self.spacing / 2).log()

    def __call__(
        self,
        scores: Float[Tensor, "rows vocab"] | TopTokens,
        uniform: Float[Tensor, "rows 2"],
        log_total: Float[Tensor, " rows"] | None = None,
        entropy: Float[Tensor, " rows"] | None = None,
    ) -> Kept:
        """What is kept of each row; without `log_total` the scores are log-probabilities."""
        if log_total is None or entropy is None:
            assert isinstance(scores, Tensor)
            log_total = scores.new_zeros(len(scores))
            entropy = -(scores.exp() * scores.clamp(min=-1e4)).sum(-1)
        row, ids, levels, tail = self.keep(scores, log_total, uniform)
        return Kept(
            counts=torch.bincount(row, minlength=len(log_total)),
            ids=ids,
            levels=levels,
            tail=tail,
            entropy=in_entropy_steps(entropy),
        )


def _positive(**values: int | float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive, got {value}.")


@dataclass(frozen=True)
class TopK(SparseMethod):
    """The k likeliest tokens, or those of them with at least the probability `threshold`, or as few as have `mass`
    together; and the mass of all others. For the same bytes a threshold and a large k are the truest: they put tokens
    where there are many to tell of.

    √p is rounded to multiples of `step`; tokens that round to 0 go to the others, but for the likeliest, which is kept.
    When read, all is made to sum to 1. With η = step · √(k + 1) / 2 < 1, no √p of at least step / 2 is further off than
    (step / 2 + η √p) / (1 − η), and neither is the root of the others' mass. Divergences that weigh log p by q, as
    reverse KL does, see the rounding of unlikely tokens most: a finer step is theirs.
    """

    name = "top_k"
    has_tail = True
    k: int = 32
    mass: float = 1.0
    threshold: float = 0.0
    step: float = 1 / 128

    def __post_init__(self) -> None:
        _positive(k=self.k, mass=self.mass, step=self.step)
        if self.mass > 1 or not 0 <= self.threshold < 1 or self.step > 1 / 2:
            raise ValueError(
                "mass is a share of 1, threshold a probability below 1 and step at most 1/2, got "
                f"mass={self.mass}, threshold={self.threshold}, step={self.step}."
            )

    @property
    def max_entries(self) -> int:
        return self.k

    @property
    def choice(self) -> TokenChoice:  # type: ignore[override]
        return TokenChoice(self.k)

    def keep(
        self, scores: Tensor | TopTokens, log_total: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        values, ids, vocab_size = top_tokens(scores, self.k) if isinstance(scores, Tensor) else scores
        p = (values.double() - log_total[:, None]).exp()
        last = self.num_levels - 1
        steps = (p.sqrt() / self.spacing).round().clamp(max=last)
        steps[:, 0].clamp_(min=1)
        kept = (steps > 0) & (p >= self.threshold)
        if self.mass < 1:
            kept &= p.cumsum(-1) - p < self.mass
        kept[:, 0] = True
        rest = (1 - (p * kept).sum(-1)).clamp(min=0)
        tail = (2 * rest.sqrt().sqrt() / self.spacing).round().clamp(1, 2 * last)
        tail[kept.sum(-1) == vocab_size] = 0
        return kept.nonzero()[:, 0], ids[kept], last - steps[kept].int(), 2 * last - tail.int()


@dataclass(frozen=True)
class Hybrid(SparseMethod):
    """Tokens above the threshold τ exactly, any other with probability p/τ and then with weight τ.

    Every token is kept with probability min(1, p/τ), which for a given number of kept tokens has the least variance of
    all fair draws: its noise comes from the tail alone, a variance of at most τ·p for a token. Confident rows keep few
    tokens, others up to 1/τ. One systematic pass over the running sum of min(1, p/τ) draws them. What is above the
    threshold is rounded up or down to a level at random, so that its mean is exact too; that adds up to step²·p.
    """

    name = "hybrid"
    threshold: float = 0.02
    step: float = 1 / 32

    def __post_init__(self) -> None:
        _positive(threshold=self.threshold, step=self.step)
        if not 1e-6 < self.threshold < 1 or self.step > 1:
            raise ValueError(
                "threshold is a probability between 1e-6 and 1 and step at most 1, got "
                f"threshold={self.threshold}, step={self.step}."
            )

    @property
    def lowest(self) -> float:  # type: ignore[override]
        return math.sqrt(self.threshold)

    @property
    def max_entries(self) -> int:
        return math.ceil(1 / self.threshold) + 1

    @property
    def choice(self) -> TokenChoice:  # type: ignore[override]
        return TokenChoice(self.max_entries, self.threshold)

    def keep(
        self, scores: Tensor | TopTokens, log_total: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if isinstance(scores, Tensor):
            share = (scores - (log_total + math.log(self.threshold))[:, None]).clamp_(max=0).exp_()
            row, ids, _ = _systematic(share, uniform[:, 0], self.max_entries)
            values = scores[row, ids]
        else:
            drawn = scores.ids >= 0
            row, ids, values = drawn.nonzero()[:, 0], scores.ids[drawn], scores.values[drawn]
        root = ((values.double() - log_total[row]) / 2).exp().clamp(self.lowest, 1)
        steps = ((root - self.lowest) / self.spacing).floor()
        lower = self.lowest + steps * self.spacing
        upper = lower + self.spacing
        # root² = w · lower² + (1 − w) · upper² has the weight w of the lower level.
        weight = (upper - root) * (upper + root) / (self.spacing * (upper + lower))
        spread = (uniform[row, 1] + ids.double() * 0.6180339887498949) % 1  # other numbers for other tokens
        return row, ids, (self.num_levels - 1 - steps - (spread >= weight).int()).clamp(min=0).int(), None


@dataclass(frozen=True)
class Sampled(SparseMethod):
    """`draws` tokens of each row, drawn from the teacher (RS-KD, arXiv:2503.16870), kept with how often they came.

    Drawn systematically and not one by one: as fair, and with less noise.
    """

    name = "sampled"
    draws: int = 50

    def __post_init__(self) -> None:
        _positive(draws=self.draws)

    @property
    def num_levels(self) -> int:
        return self.draws

    @property
    def max_entries(self) -> int:
        return self.draws

    def keep(self, scores: Tensor, log_total: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        p = (scores - log_total[:, None]).exp_()
        row, ids, counts = _systematic(p.mul_(self.draws / p.sum(-1, keepdim=True)), uniform[:, 0], self.draws)
        return row, ids, self.draws - counts.int(), None

    def log_weights(self, levels: Tensor) -> Tensor:
        return (1 - levels / self.draws).log()


@dataclass(frozen=True)
class Hidden:
    """The teacher's last hidden states: float32, bfloat16, or int8 with a scale per row. Its head is stored once."""

    name: ClassVar[str] = "hidden"
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "int8"):
            raise ValueError(f"hidden states are kept as float32, bfloat16 or int8, not as {self.dtype!r}.")


Method = SparseMethod | Hidden
METHODS: dict[str, type] = {method.name: method for method in (TopK, Hybrid, Sampled, Hidden)}  # type: ignore[attr-defined]


def make_method(name: str, **parameters: Any) -> Method:
    """By name and parameters.

    Raises:
        ValueError: no such method, or a parameter that it has not, or that cannot be.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}. There are {', '.join(METHODS)}.")
    try:
        return METHODS[name](**parameters)
    except TypeError as error:
        raise ValueError(f"{name} does not take these: {', '.join(parameters)}. ({error})") from error


def describe_method(method: Method) -> dict[str, Any]:
    """Name and parameters, as JSON."""
    return {"name": method.name, **asdict(method)}  # type: ignore[arg-type]


def in_entropy_steps(entropy: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """As it is stored, in a byte."""
    return (entropy / ENTROPY_STEP).round().clamp(0, 255).int()


def _systematic(
    expected: Float[Tensor, "rows vocab"], offset: Float[Tensor, " rows"], most: int
) -> tuple[Int[Tensor, " entries"], Int[Tensor, " entries"], Int[Tensor, " entries"]]:
    """Row, id and how often, of tokens drawn with the given expectations: one draw at each whole number that their
    running sum passes, from a random start (Madow, 1949). Overwrites `expected`.

    Args:
        most: no sum is larger.
    """
    rows, vocab = expected.shape
    sums = torch.cumsum(expected, -1, out=expected)
    at = torch.arange(1, most + 1, device=sums.device) - offset[:, None]
    drawn = torch.searchsorted(sums, at) + vocab * torch.arange(rows, device=sums.device)[:, None]
    cells, counts = torch.unique_consecutive(drawn[at <= sums[:, -1:]], return_counts=True)
    return cells // vocab, cells % vocab, counts
