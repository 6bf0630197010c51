"""Divergences between a teacher distribution p and a student distribution q over one vocabulary.

Each one is a sum over the vocabulary of an element-wise function φ(log p, log q), so it is fully given by φ and its
slope ψ = ∂φ/∂log q. With `u` the student's logits over the temperature and `q = softmax(u)`, its gradient is always

    ∂D/∂u = ψ − q · Σψ

which is all that the fused head loss needs: a new divergence is one class with one method, and gets the fused path.

Values are nats per row. Nothing here depends on the temperature: the caller passes log-probabilities at the temperature
that it wants.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor


class Terms(NamedTuple):
    """A divergence before the sum over the vocabulary."""

    phi: Float[Tensor, "rows vocab"]
    """The value: D = Σ φ."""
    psi: Float[Tensor, "rows vocab"]
    """The slope: ψ = ∂φ/∂log q."""


@runtime_checkable
class Divergence(Protocol):
    def terms(self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]) -> Terms:
        """φ and ψ, element by element, from the teacher's and the student's log-probabilities."""
        ...


@dataclass(frozen=True)
class ForwardKL:
    """KL(p‖q) = Σ p (log p − log q).

    Mean-seeking: the student must cover everything that the teacher finds likely (Hinton et al., 2015,
    arXiv:1503.02531).
    """

    def terms(self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]) -> Terms:
        p = log_p.exp()
        return Terms(p * (log_p - log_q), -p)


@dataclass(frozen=True)
class ReverseKL:
    """KL(q‖p) = Σ q (log q − log p).

    Mode-seeking: the student must avoid everything that the teacher finds unlikely (MiniLLM, arXiv:2306.08543).
    """

    def terms(self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]) -> Terms:
        q = log_q.exp()
        phi = q * (log_q - log_p)
        return Terms(phi, phi + q)


@dataclass(frozen=True)
class JSD:
    """Generalised Jensen-Shannon: β KL(p‖m) + (1−β) KL(q‖m) with m = βp + (1−β)q (GKD, arXiv:2306.13649, eq. 1).

    β is the share of the teacher in the mixture; 0.5 is the symmetric divergence.
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        ends = "the raw divergence is 0 at both ends; use forward_kl for the end at 0, reverse_kl for the end at 1."
        _require_open_unit_interval("jsd", "beta", self.beta, ends)

    def terms(self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]) -> Terms:
        p, q = log_p.exp(), log_q.exp()
        p_over_m, q_over_m = _log_ratios_to_mixture(log_p, log_q, self.beta)
        psi = (1 - self.beta) * q * q_over_m
        return Terms(self.beta * p * p_over_m + psi, psi)


@dataclass(frozen=True)
class SkewKL:
    """KL(p‖m) with m = λp + (1−λ)q (DistiLLM, arXiv:2402.03898, eq. 5). λ is the share of the teacher."""

    lam: float = 0.1

    def __post_init__(self) -> None:
        _require_open_unit_interval(
            "skew_kl", "lam", self.lam, "0 is forward_kl, and 1 compares the teacher with itself."
        )

    def terms(self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]) -> Terms:
        p = log_p.exp()
        p_over_m, q_over_m = _log_ratios_to_mixture(log_p, log_q, self.lam)
        return Terms(p * p_over_m, -(1 - self.lam) * p * q_over_m.exp())


@dataclass(frozen=True)
class SkewReverseKL:
    """KL(q‖m) with m = (1−λ)p + λq (DistiLLM, arXiv:2402.03898, eq. 6). λ is the share of the student."""

    lam: float = 0.1

    def __post_init__(self) -> None:
        ends = "0 is reverse_kl, and 1 compares the student with itself."
        _require_open_unit_interval("skew_reverse_kl", "lam", self.lam, ends)

    def terms(self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]) -> Terms:
        q = log_q.exp()
        _, q_over_m = _log_ratios_to_mixture(log_p, log_q, 1 - self.lam)
        phi = q * q_over_m
        return Terms(phi, phi + q - self.lam * q * q_over_m.exp())


@dataclass(frozen=True)
class TotalVariation:
    """½ Σ |p − q|, at most 1. Its gradient is the subgradient 0 where p = q (f-Distill, arXiv:2307.15190)."""

    def terms(self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]) -> Terms:
        q = log_q.exp()
        difference = log_p.exp() - q
        return Terms(0.5 * difference.abs(), -0.5 * difference.sign() * q)


@dataclass(frozen=True)
class AlphaBeta:
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

    def terms(self, log_p: Float[Tensor, "rows vocab"], log_q: Float[Tensor, "rows vocab"]) -> Terms:
        # With the larger of p and q taken out of the brackets, p = q gives exactly 0 and nothing overflows.
        a, b, s = self.alpha, self.beta, self.alpha + self.beta
        difference = log_p - log_q
        larger = (s * torch.maximum(log_p, log_q)).exp()
        share = torch.where(difference > 0, difference.new_tensor(b), a)
        smaller = torch.expm1(-s * difference.abs())
        cross = torch.expm1(-share * difference.abs())
        q_side = torch.where(difference > 0, smaller, 0.0)
        return Terms(larger * (share / s * smaller - cross) / (a * b), larger * (q_side - cross) / a)


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


def _log_ratios_to_mixture(log_p: Tensor, log_q: Tensor, share_of_p: float) -> tuple[Tensor, Tensor]:
    """(log p/m, log q/m) for m = share·p + (1−share)·q: exactly 0 where p = q, finite where one of them is tiny."""
    difference = log_p - log_q
    share_of_smaller = torch.where(difference > 0, difference.new_tensor(1 - share_of_p), share_of_p)
    # log m = log max(p, q) + log(1 + share_of_smaller · (smaller/larger − 1))
    m_over_larger = torch.log1p(share_of_smaller * torch.expm1(-difference.abs()))
    return difference.clamp(max=0) - m_over_larger, (-difference).clamp(max=0) - m_over_larger


def _require_open_unit_interval(name: str, parameter: str, value: float, ends: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} needs 0 < {parameter} < 1, got {value}: {ends}")
