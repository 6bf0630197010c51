"""What a teacher says about N rows (the positions of a batch that count), in one of five forms.

| signal | holds | serves |
|---|---|---|
| `HiddenSignal` | the teacher's last hidden states and its head | every divergence, every temperature, exactly |
| `MixtureSignal` | weighted `HiddenSignal`s (an ensemble) | the same, for their mean, by row if need be |
| `SparseSignal` with tail | the top k tokens, the mass outside | every divergence, of k + 1 cells (a lower bound) |
| `SparseSignal` without | sampled tokens, their weights | forward KL's gradient, without bias |
| `TokenSignal` | the log-probability of the text's own next token | reverse KL's gradient, of sampled text |
| `AlignedSignal` | one of the first two about other tokens of the same text | see `losses/cross_tokenizer.py` |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from llm_distill.divergences import Divergence, ForwardKL, ReverseKL
from llm_distill.heads import LMHead


@dataclass(frozen=True)
class HiddenSignal:
    """The teacher's hidden states; logits are made of them a chunk of rows at a time, and never all at once."""

    hidden: Float[Tensor, "rows hidden"]
    head: LMHead
    layers: Mapping[str, Mapping[int, Tensor]] = field(default_factory=dict)
    """What was kept of the layers that were asked for, by kind and number from 1, as in `models.Kept`."""

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.head.vocab_size

    @property
    def members(self) -> tuple[HiddenSignal, ...]:
        """The signals that a mixture is made of: this one alone."""
        return (self,)

    def mix(
        self, log_ps: Sequence[Float[Tensor, "some vocab"]], rows: slice | Int[Tensor, " some"]
    ) -> tuple[Float[Tensor, "some vocab"], Float[Tensor, " some"]]:
        """As `MixtureSignal.mix`, of nothing to be mixed."""
        return log_ps[0], log_ps[0].new_zeros(len(log_ps[0]))

    def select(self, rows: Bool[Tensor, " rows"]) -> HiddenSignal:
        """What the head needs of some rows: nothing of layers, which are kept for whole texts."""
        return replace(self, hidden=self.hidden[rows], layers={})

    def broken_rows(self) -> Bool[Tensor, " rows"]:
        """The rows in which a number is not finite, so that nothing can be learned there."""
        return ~self.hidden.isfinite().all(-1)

    def check(self, divergence: Divergence, temperature: float) -> None:
        """Everything can be served."""


@dataclass(frozen=True)
class MixtureSignal:
    """An ensemble: p = Σ wᵢ pᵢ, a mixture of probabilities (not of logits); or p ∝ Π pᵢ^wᵢ, their geometric mean."""

    signals: tuple[HiddenSignal, ...]
    weights: tuple[float, ...] | Float[Tensor, "rows members"]
    """Of each member, everywhere or in each row; there some may be 0."""
    is_geometric: bool = False

    def __post_init__(self) -> None:
        shape = tuple(self.weights.shape) if isinstance(self.weights, Tensor) else (len(self.weights),)
        if not self.signals or len(self.signals) != shape[-1]:
            raise ValueError(f"{len(self.signals)} signals need as many weights, got {shape[-1]}.")
        if len({len(signal) for signal in self.signals}) > 1 or len({s.vocab_size for s in self.signals}) > 1:
            shapes = [(len(signal), signal.vocab_size) for signal in self.signals]
            raise ValueError(f"the signals of a mixture must share rows and vocabulary, got (rows, vocab) {shapes}.")
        if isinstance(self.weights, Tensor):
            if len(self.weights) != len(self):
                raise ValueError(f"{len(self)} rows need as many weights of each member, got {len(self.weights)}.")
        elif min(self.weights) <= 0 or abs(sum(self.weights) - 1) > 1e-6:
            raise ValueError(f"the weights of a mixture must be positive and sum to 1, got {self.weights}.")

    def __len__(self) -> int:
        return len(self.signals[0])

    @property
    def vocab_size(self) -> int:
        return self.signals[0].vocab_size

    @property
    def members(self) -> tuple[HiddenSignal, ...]:
        return self.signals

    def select(self, rows: Bool[Tensor, " rows"]) -> MixtureSignal:
        """The same of some rows."""
        weights = self.weights[rows] if isinstance(self.weights, Tensor) else self.weights
        return replace(self, signals=tuple(signal.select(rows) for signal in self.signals), weights=weights)

    def mix(
        self, log_ps: Sequence[Float[Tensor, "some vocab"]], rows: slice | Int[Tensor, " some"]
    ) -> tuple[Float[Tensor, "some vocab"], Float[Tensor, " some"]]:
        """The mixture's log-probabilities in some rows, from those of its members (finite), and how much these differ
        there, in nats: Σ wᵢ KL(pᵢ‖p), the generalised Jensen-Shannon divergence, or of a geometric mean Σ wᵢ KL(p‖pᵢ).
        """
        if isinstance(self.weights, Tensor):
            weights = self.weights[rows].to(log_ps[0]).T[..., None]
            log_weights = weights.log()
        else:
            weights = log_ps[0].new_tensor(self.weights)[:, None, None]
            log_weights = log_ps[0].new_tensor([math.log(weight) for weight in self.weights])[:, None, None]
        if self.is_geometric:
            log_p = sum(weight * log_p for weight, log_p in zip(weights, log_ps, strict=True))
            log_total = log_p.logsumexp(-1, keepdim=True)
            return log_p - log_total, -log_total[:, 0]
        weighted = torch.stack([log_p + log_w for log_p, log_w in zip(log_ps, log_weights, strict=True)])
        log_p = weighted.logsumexp(0)
        shares = zip(weighted, log_ps, strict=True)
        differences = sum(torch.linalg.vecdot(share.exp(), member - log_p) for share, member in shares)
        return log_p, differences

    def broken_rows(self) -> Bool[Tensor, " rows"]:
        return torch.stack([signal.broken_rows() for signal in self.signals]).any(0)

    def check(self, divergence: Divergence, temperature: float) -> None:
        """Everything can be served."""


def mean_of(signals: Sequence[HiddenSignal], weights: Sequence[float] | None = None) -> HiddenSignal | MixtureSignal:
    """The mixture of several with these weights, by default equal ones; of one, that one."""
    if len(signals) == 1:
        return signals[0]
    return MixtureSignal(tuple(signals), (1 / len(signals),) * len(signals) if weights is None else tuple(weights))


@dataclass(frozen=True)
class SparseSignal:
    """A few tokens of each row, padded to K with −inf where a row has fewer (the first must be there).

    With `log_tail`, the tokens are distinct (top-k) and the tail is the exact log-mass of all others: the divergence is
    that of the k + 1 cells, a lower bound of the full one, and equal to it when K is the vocabulary.
    Without, they are samples (repetitions allowed) whose weights sum to 1 a row (RS-KD, arXiv:2503.16870): only the
    cross-entropy Σ w (−log q) has an unbiased estimate, so `kd` is that, larger than the KL by the teacher's entropy.
    """

    ids: Int[Tensor, "rows k"]
    log_probs: Float[Tensor, "rows k"]
    """Log-probabilities of the teacher at `temperature`; log-weights for samples."""
    log_tail: Float[Tensor, " rows"] | None
    vocab_size: int
    temperature: float | None = 1.0
    """None where it is the same at every temperature, as votes are."""
    entropy: Float[Tensor, " rows"] | None = None
    """The teacher's, in nats at `temperature`, if known: then samples tell the KL, and not only its gradient."""
    disagreement: Float[Tensor, " rows"] | None = None
    """Of a mixture, how much its members differ: see `MixtureSignal.mix`."""
    members: ClassVar[tuple[HiddenSignal, ...]] = ()

    def __post_init__(self) -> None:
        rows_k = tuple(self.ids.shape)
        tail = None if self.log_tail is None else tuple(self.log_tail.shape)
        if tuple(self.log_probs.shape) != rows_k or tail not in (None, rows_k[:1]):
            raise ValueError(f"ids {rows_k}, log_probs {tuple(self.log_probs.shape)}, log_tail {tail}: shapes differ.")
        if self.log_tail is not None and rows_k[1] > self.vocab_size:
            raise ValueError(f"ids {rows_k}: k = {rows_k[1]} is larger than the vocabulary of {self.vocab_size}.")
        if self.ids.device.type != "cpu" or not self.ids.numel():  # elsewhere the look would wait for the device
            return
        lowest, highest = torch.stack(self.ids.aminmax()).tolist()
        if not 0 <= lowest <= highest < self.vocab_size:
            raise ValueError(
                f"ids {rows_k} run from {lowest} to {highest}, outside the vocabulary of {self.vocab_size}."
            )

    def __len__(self) -> int:
        return self.ids.shape[0]

    def select(self, rows: Bool[Tensor, " rows"]) -> SparseSignal:
        """The same of some rows."""
        columns = {name: getattr(self, name) for name in ("ids", "log_probs", "log_tail", "entropy", "disagreement")}
        return replace(self, **{name: value[rows] for name, value in columns.items() if value is not None})

    def broken_rows(self) -> Bool[Tensor, " rows"]:
        return self.log_probs.isnan().any(-1)

    def check(self, divergence: Divergence, temperature: float) -> None:
        """Raises:
        ValueError: sampled tokens and another divergence than forward KL, or another temperature than was stored.
        """
        if self.log_tail is None and not isinstance(divergence, ForwardKL):
            raise ValueError(
                f"sampled teacher tokens give an unbiased gradient for forward_kl only, not for {divergence}. "
                "Use divergence='forward_kl', or a teacher that gives its top k with the tail."
            )
        if self.temperature not in (None, temperature):
            raise ValueError(
                f"the teacher's sparse probabilities are those at temperature {self.temperature} and cannot serve "
                f"loss_temperature={temperature}: the tail's mass at another temperature is unknown."
            )


@dataclass(frozen=True)
class TokenSignal:
    """How likely the teacher finds the token that comes next in the text, and nothing else.

    Where the student has sampled that token, y ~ q, the policy gradient −(log p(y) − log q(y)) · ∇ log q(y), whose
    first factor is a constant, is in expectation the gradient of KL(q‖p). On text of anybody else it is nothing.
    """

    log_probs: Float[Tensor, " rows"]
    vocab_size: int
    members: ClassVar[tuple[HiddenSignal, ...]] = ()

    def __len__(self) -> int:
        return self.log_probs.shape[0]

    def select(self, rows: Bool[Tensor, " rows"]) -> TokenSignal:
        """The same of some rows."""
        return replace(self, log_probs=self.log_probs[rows])

    def broken_rows(self) -> Bool[Tensor, " rows"]:
        return self.log_probs.isnan()

    def check(self, divergence: Divergence, temperature: float) -> None:
        """Raises ValueError for another divergence than reverse KL, or another temperature than 1."""
        if not isinstance(divergence, ReverseKL) or temperature != 1:
            raise ValueError(
                "one log-probability a token gives the gradient of reverse_kl at loss_temperature=1, not of "
                f"{divergence} at {temperature}. Use reverse_kl, or a teacher that tells its top k."
            )


class Vocabulary(NamedTuple):
    """What is known of the tokens of one side."""

    cell: Int[Tensor, " vocab"]
    """The outcome that a token is in, of those that both sides have."""
    rank: Int[Tensor, " vocab"]
    """Its place in the order of their bytes."""
    end: Int[Tensor, " vocab"]
    """The place after the last token that begins with its bytes."""

    def begins_with(self, tokens: Int[Tensor, " rows"]) -> Bool[Tensor, "rows vocab"]:
        """Which tokens begin with the bytes of each of some."""
        return (self.rank >= self.rank[tokens][:, None]) & (self.rank < self.end[tokens][:, None])


class SharedTokens(NamedTuple):
    """What two vocabularies have in common; see `alignment.Alignment.shared_tokens`."""

    student: Vocabulary
    teacher: Vocabulary
    cells: int
    """How many outcomes there are."""
    pieces: Int[Tensor, "student_vocab pieces"]
    """The teacher's tokens into which each of the student's is cut, in their order."""
    weights: Float[Tensor, "student_vocab pieces"]
    """How much of its probability goes to each: they sum to 1, or to 0 for a token that goes nowhere."""

    def to(self, device: torch.device) -> SharedTokens:
        """The same on another device."""
        student, teacher = (
            Vocabulary(*(tensor.to(device) for tensor in side)) for side in (self.student, self.teacher)
        )
        return SharedTokens(student, teacher, self.cells, self.pieces.to(device), self.weights.to(device))


@dataclass(frozen=True)
class AlignedSignal:
    """What a teacher says in its own tokens of the text of the student's rows: groups of tokens end at the same byte.

    The groups are numbered in the order of the rows of both sides; -1 is none.
    """

    signal: HiddenSignal | MixtureSignal
    targets: Int[Tensor, " teacher_rows"]
    """The teacher's next tokens."""
    groups: Int[Tensor, " teacher_rows"]
    student_groups: Int[Tensor, " rows"]
    shared: SharedTokens

    def __len__(self) -> int:
        return len(self.student_groups)

    @property
    def vocab_size(self) -> int:
        """The teacher's."""
        return self.signal.vocab_size

    @property
    def members(self) -> tuple[HiddenSignal, ...]:
        return self.signal.members

    def select(self, rows: Bool[Tensor, " rows"]) -> AlignedSignal:
        """The same of some of the student's rows: those of whole texts."""
        groups = self.student_groups[rows]
        of_teacher = torch.isin(self.groups, groups)
        return replace(
            self,
            signal=self.signal.select(of_teacher),
            targets=self.targets[of_teacher],
            groups=self.groups[of_teacher],
            student_groups=groups,
        )

    def broken_rows(self) -> Bool[Tensor, " rows"]:
        return torch.isin(self.student_groups, self.groups[self.signal.broken_rows()])

    def check(self, divergence: Divergence, temperature: float) -> None:
        """What cannot be served, `Objective.align` has refused."""


Signal = HiddenSignal | MixtureSignal | SparseSignal | TokenSignal | AlignedSignal
