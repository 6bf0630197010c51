"""The divergence of a few teacher tokens from a full student distribution, with its exact gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_distill.divergences import Divergence

NOTHING = -1e30
"""log 0 as a number: exp gives 0, and 0 times it is 0 where 0 times −inf would be NaN."""


def sparse_divergence(
    divergence: Divergence,
    ids: Int[Tensor, "rows k"],
    log_p: Float[Tensor, "rows k"],
    log_tail: Float[Tensor, " rows"] | None,
    log_q: Float[Tensor, "rows vocab"],
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "rows vocab"]]:
    """The divergence a row, and its gradient on the student's scaled logits.

    With a tail, both distributions are lumped into k + 1 cells: the tokens, and all else. With ψ the slopes of the
    cells, the gradient is ψᵢ − qᵢ Σψ on token i, and ψ_tail · (qᵥ / q_tail) − qᵥ Σψ on every token v of the tail.
    Without a tail the value is the cross-entropy Σ w (−log q), and the gradient q Σw − w.
    """
    present = log_p > NOTHING
    log_p = torch.where(present, log_p.to(log_q.dtype), NOTHING)
    ids = torch.where(present, ids, ids[:, :1])  # padding repeats the first token, so that it marks no other as taken
    log_q_ids = torch.where(present, log_q.gather(-1, ids), NOTHING)

    if log_tail is None:
        w = log_p.exp()
        return -(w * log_q_ids).sum(-1), (log_q.exp() * w.sum(-1, keepdim=True)).scatter_add(-1, ids, -w)

    log_q_outside = log_q.scatter(-1, ids, -torch.inf)
    log_q_tail = log_q_outside.logsumexp(-1, keepdim=True).clamp(min=NOTHING)
    log_tail = log_tail.to(log_q.dtype)[:, None].clamp(min=NOTHING)
    phi, psi = divergence.terms(torch.cat([log_p, log_tail], -1), torch.cat([log_q_ids, log_q_tail], -1))
    share_of_tail = (log_q_outside - log_q_tail).exp()
    gradient = psi[:, -1:] * share_of_tail - log_q.exp() * psi.sum(-1, keepdim=True)
    return phi.sum(-1), gradient.scatter_add(-1, ids, torch.where(present, psi[:, :-1], 0.0))
