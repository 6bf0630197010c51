"""Divergences between a teacher distribution p and a student distribution q over one vocabulary.

Each one is a sum over the vocabulary of an element-wise function φ of (p, q), so it is fully given by φ and its slope
ψ = ∂φ/∂log q. With `u` the student's logits over the temperature and `q = softmax(u)`, its gradient is always

    ∂D/∂u = ψ − q · Σψ

which is all that the fused head loss needs: a new divergence is one class with one formula. The formula is written down
once, here, and compiled for CPU and GPU (`fused/formula.py`), so it may use arithmetic and torch's `absolute`, `exp`,
`expm1`, `log`, `log1p`, `maximum`, `minimum` and `sign`. One that uses more of torch runs in torch, more slowly.

Values are nats per row. Nothing here depends on the temperature: the caller passes probabilities at the one it wants.
"""

from __future__ import annotations

import difflib
import math
from abc import ABC
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Float
from torch import Tensor, absolute, exp, expm1, log1p, maximum, sign


class Terms(NamedTuple):
    """A divergence before the sum over the vocabulary."""

    phi: Float[Tensor, "rows vocab"]
    """The value: D = Σ φ."""
    psi: Float[Tensor, "rows vocab"]
    """The slope: ψ = ∂φ/∂log q."""


class Divergence(ABC):
    """A frozen dataclass whose fields are the parameters that its formula takes after (p, q, log p, log q)."""

    formula: ClassVar[Callable[..., tuple[Any, Any]]]
    """(φ, ψ) from the probabilities and their logarithms, element by element. Both are given, so that nobody computes
    an exponential twice."""
    slope_sum: ClassVar[float | None] = None
    """Σψ, where it is the same for all distributions: it saves a pass over the vocabulary."""

    def terms(
        self,
        p: Float[Tensor, "rows vocab"],
        q: Float[Tensor, "rows vocab"],
        log_p: Float[Tensor, "rows vocab"],
        log_q: Float[Tensor, "rows vocab"],
    ) -> Terms:
        """φ and ψ of each element."""
        return Terms(*self.formula(p, q, log_p, log_q, *astuple(self)))  # type: ignore[call-overload]


@dataclass(frozen=True)
class ForwardKL(Divergence):
    """KL(p‖q) = Σ p (log p − log q).

    Mean-seeking: the student must cover everything that the teacher finds likely (Hinton et al., 2015,
    arXiv:1503.02531).
    """

    slope_sum = -1.0

    @staticmethod
    def formula(p: Any, q: Any, log_p: Any, log_q: Any) -> tuple[Any, Any]:
        return p * (log_p - log_q), -p


@dataclass(frozen=True)
class ReverseKL(Divergence):
    """KL(q‖p) = Σ q (log q − log p).

    Mode-seeking: the student must avoid everything that the teacher finds unlikely (MiniLLM, arXiv:2306.08543).
    """

    @staticmethod
    def formula(p: Any, q: Any, log_p: Any, log_q: Any) -> tuple[Any, Any]:
        phi = q * (log_q - log_p)
        return phi, phi + q


@dataclass(frozen=True)
class JSD(Divergence):
    """Generalised Jensen-Shannon: β KL(p‖m) + (1−β) KL(q‖m) with m = βp + (1−β)q (GKD, arXiv:2306.13649, eq. 1).

    β is the share of the teacher in the mixture; 0.5 is the symmetric divergence.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        ends = "the raw divergence is 0 at both ends; use forward_kl for the end at 0, reverse_kl for the end at 1."
        _require_open_unit_interval("jsd", "beta", self.beta, ends)

    @staticmethod
    def formula(p: Any, q: Any, log_p: Any, log_q: Any, beta: float) -> tuple[Any, Any]:
        p_over_m, q_over_m = log_ratios_to_mixture(log_p, log_q, beta)
        psi = (1 - beta) * (q * q_over_m)
        return beta * (p * p_over_m) + psi, psi


@dataclass(frozen=True)
class SkewKL(Divergence):
    """KL(p‖m) with m = λp + (1−λ)q (DistiLLM, arXiv:2402.03898, eq. 5). λ is the share of the teacher."""

    lam: float = 0.1

    def __post_init__(self) -> None:
        _require_open_unit_interval(
            "skew_kl", "lam", self.lam, "0 is forward_kl, and 1 compares the teacher with itself."
        )

    @staticmethod
    def formula(p: Any, q: Any, log_p: Any, log_q: Any, lam: float) -> tuple[Any, Any]:
        p_over_m, q_over_m = log_ratios_to_mixture(log_p, log_q, lam)
        return p * p_over_m, (lam - 1) * (p * exp(q_over_m))


@dataclass(frozen=True)
class SkewReverseKL(Divergence):
    """KL(q‖m) with m = (1−λ)p + λq (DistiLLM, arXiv:2402.03898, eq. 6). λ is the share of the student."""

    lam: float = 0.1

    def __post_init__(self) -> None:
        ends = "0 is reverse_kl, and 1 compares the student with itself."
        _require_open_unit_interval("skew_reverse_kl", "lam", self.lam, ends)

    @staticmethod
    def formula(p: Any, q: Any, log_p: Any, log_q: Any, lam: float) -> tuple[Any, Any]:
        _, q_over_m = log_ratios_to_mixture(log_p, log_q, 1 - lam)
        phi = q * q_over_m
        return phi, phi + q - lam * (q * exp(q_over_m))


@dataclass(frozen=True)
class TotalVariation(Divergence):
    """½ Σ |p − q|, at most 1. Its gradient is the subgradient 0 where p = q (f-Distill, arXiv:2307.15190)."""

    @staticmethod
    def formula(p: Any, q: Any, log_p: Any, log_q: Any) -> tuple[Any, Any]:
        difference = p - q
        return 0.5 * absolute(difference), -0.5 * (sign(difference) * q)


@dataclass(frozen=True)
class AlphaBeta(Divergence):
    """The α-β divergence (ABKD, arXiv:2505.04560, eq. 8), for α, β > 0:

        −1/(αβ) Σ [ pᵅ qᵝ − α/(α+β) pᵅ⁺ᵝ − β/(α+β) qᵅ⁺ᵝ ],    ψ = (qᵅ⁺ᵝ − pᵅ qᵝ) / α

    α weighs how hard the student is pulled where it is most wrong, β where it is most sure of itself; forward KL is the
    limit (1, 0) and reverse KL the limit (0, 1).
    """

    alpha: float = 0.2
    beta: float = 0.7

    def __post_init__(self) -> None:
        if not (0 < self.alpha < math.inf and 0 < self.beta < math.inf):
            raise ValueError(
                f"alpha_beta needs alpha > 0 and beta > 0, got alpha={self.alpha}, beta={self.beta}. "
                "The limit (1, 0) is divergence='forward_kl', the limit (0, 1) is divergence='reverse_kl'."
            )

    @staticmethod
    def formula(p: Any, q: Any, log_p: Any, log_q: Any, alpha: float, beta: float) -> tuple[Any, Any]:
        # With the larger of p and q taken out of the brackets, p = q gives exactly 0 and nothing overflows.
        difference = log_p - log_q
        minus_magnitude = -absolute(difference)
        p_is_larger = 0.5 + 0.5 * sign(difference)  # 0, 1, or ½ where it does not matter
        larger = exp((alpha + beta) * maximum(log_p, log_q))
        smaller = expm1((alpha + beta) * minus_magnitude)
        cross = expm1((alpha + p_is_larger * (beta - alpha)) * minus_magnitude)
        share = (alpha + p_is_larger * (beta - alpha)) / (alpha + beta)
        phi = larger * (share * smaller - cross) / (alpha * beta)
        return phi, larger * (p_is_larger * smaller - cross) / alpha


DIVERGENCES: dict[str, type[Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jsd": JSD,
    "skew_kl": SkewKL,
    "skew_reverse_kl": SkewReverseKL,
    "tvd": TotalVariation,
    "alpha_beta": AlphaBeta,
}


def make_divergence(name: str, **parameters: Any) -> Divergence:
    """`DIVERGENCES[name](**parameters)`, with errors that name what exists.

    Raises:
        ValueError: unknown name, unknown parameter, or a parameter out of range.
    """
    if name not in DIVERGENCES:
        nearest = difflib.get_close_matches(name, DIVERGENCES, n=1, cutoff=0.4)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"unknown divergence {name!r}.{hint} Known: {', '.join(DIVERGENCES)}.")
    known = list(getattr(DIVERGENCES[name], "__dataclass_fields__", {}))
    if unknown := sorted(set(parameters) - set(known)):
        takes = f"takes {', '.join(known)}" if known else "takes no parameter"
        raise ValueError(f"divergence {name!r} {takes}; got {', '.join(unknown)} in divergence_kwargs.")
    try:
        numbers = {parameter: float(value) for parameter, value in parameters.items()}  # to YAML, 1e-1 is a string
    except (TypeError, ValueError):
        raise ValueError(f"divergence_kwargs of {name!r} must be numbers, got {parameters}.") from None
    return DIVERGENCES[name](**numbers)


def log_ratios_to_mixture(log_p: Any, log_q: Any, share_of_p: float) -> tuple[Any, Any]:
    """(log p/m, log q/m) for m = share·p + (1−share)·q: exactly 0 where p = q, finite where one of them is tiny."""
    difference = log_p - log_q
    magnitude = absolute(difference)
    share_of_smaller = 0.5 + (0.5 - share_of_p) * sign(difference)
    # log m = log max(p, q) + log(1 + share_of_smaller · (smaller/larger − 1))
    m_over_larger = log1p(share_of_smaller * expm1(-magnitude))
    return 0.5 * (difference - magnitude) - m_over_larger, -0.5 * (difference + magnitude) - m_over_larger


def _require_open_unit_interval(name: str, parameter: str, value: float, ends: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} needs 0 < {parameter} < 1, got {value}: {ends}")
