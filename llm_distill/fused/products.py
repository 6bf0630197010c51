"""The matrix products of the fused head loss, written into buffers that are used again."""

from __future__ import annotations

import math
import mmap

import torch
from jaxtyping import Float
from torch import Tensor

VOCAB_TILE = 2**11
"""Rows of dW that are added up at a time where the product cannot add in float32 by itself."""


def new_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`; on Linux in pages of 2 MiB, because the first touch of each page of 4 KiB takes as long as 4,000
    operations of a product.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < 2**22 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


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
        narrow, wide = (hidden.new_empty(VOCAB_TILE, hidden.shape[1], dtype=d) for d in (hidden.dtype, total.dtype))
        for start in range(0, len(total), VOCAB_TILE):
            tile = total[start : start + VOCAB_TILE]
            n = len(tile)
            torch.mm(d_logits[:, start : start + n].T, hidden, out=narrow[:n])
            tile.copy_(narrow[:n]) if first else tile.add_(wide[:n].copy_(narrow[:n]))


def logits_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """Float32 at least wherever the product can give it; bfloat16 inputs give bfloat16 elsewhere."""
    if compute == torch.bfloat16 and device.type != "cuda":
        return compute
    return torch.promote_types(compute, torch.float32)
