"""Every divergence with parameters, and its formula as the papers write it."""

from __future__ import annotations

from torch import Tensor

CASES = [
    ("forward_kl", {}),
    ("reverse_kl", {}),
    ("jsd", {"beta": 0.5}),
    ("jsd", {"beta": 0.1}),
    ("skew_kl", {"lam": 0.1}),
    ("skew_kl", {"lam": 0.7}),
    ("skew_reverse_kl", {"lam": 0.1}),
    ("tvd", {}),
    ("alpha_beta", {"alpha": 0.2, "beta": 0.7}),
    ("alpha_beta", {"alpha": 1.5, "beta": 0.3}),
]


def from_the_paper(
    name: str, p: Tensor, q: Tensor, *, beta: float = 0.0, lam: float = 0.0, alpha: float = 0.0
) -> Tensor:
    """The textbook formula over probabilities, independent of ours."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a / b).log()).sum(-1)

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * kl(p, m) + (1 - beta) * kl(q, m)
    if name == "skew_kl":
        return kl(p, lam * p + (1 - lam) * q)
    if name == "skew_reverse_kl":
        return kl(q, (1 - lam) * p + lam * q)
    if name == "tvd":
        return (p - q).abs().sum(-1) / 2
    s = alpha + beta
    inside = p**alpha * q**beta - alpha / s * p**s - beta / s * q**s
    return -inside.sum(-1) / (alpha * beta)
