"""The matrix products of the fused head loss, written into buffers that are used again."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

VOCAB_TILE = 2**12
"""Rows of dW that are added up at a time where the product cannot add in float32 by itself."""


def project(
    hidden: Float[Tensor, "rows width"], weight: Float[Tensor, "vocab width"], out: Float[Tensor, "rows vocab"]
) -> None:
    """out = hidden · weightᵀ, rounded to `out`'s dtype only."""
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.T, out=out)
    elif hidden.is_cuda:
        torch.mm(hidden, weight.T, out_dtype=out.dtype, out=out)
    else:
        out.copy_(hidden @ weight.T)


def add_weight_gradient(
    total: Float[Tensor, "vocab width"],
    d_logits: Float[Tensor, "rows vocab"],
    hidden: Float[Tensor, "rows width"],
    *,
    first: bool,
) -> None:
    """total += d_logitsᵀ · hidden (the first time, total = …: what was in it is not read)."""
    beta = 0 if first else 1
    if total.dtype == hidden.dtype:
        torch.addmm(total, d_logits.T, hidden, beta=beta, out=total)
    elif hidden.is_cuda:
        torch.addmm(total, d_logits.T, hidden, out_dtype=total.dtype, beta=beta, out=total)
    else:  # 16-bit products off CUDA give 16 bits: added up in float32, a tile that stays in the cache at a time
        for start in range(0, len(total), VOCAB_TILE):
            tile = total[start : start + VOCAB_TILE]
            part = (d_logits[:, start : start + VOCAB_TILE].T @ hidden).to(total.dtype)
            tile.copy_(part) if first else tile.add_(part)


def logits_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """Float32 at least wherever the product can give it; bfloat16 inputs give bfloat16 elsewhere."""
    if compute == torch.bfloat16 and device.type != "cuda":
        return compute
    return torch.promote_types(compute, torch.float32)
