"""The matrix products of the fused head loss, written into buffers that are used again."""

from __future__ import annotations

import functools
import itertools
import math
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor

VOCAB_TILE = {"cpu": 2**11, "accelerator": 2**15}
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


_kept: list[Tensor] = []


@contextmanager
def chunk_buffers(shape: tuple[int, int], dtypes: list[torch.dtype], device: torch.device) -> Iterator[list[Tensor]]:
    """A matrix of this shape in each dtype. On a CPU they are kept for the next call, as an accelerator's allocator
    does: to map new memory in every step would take as long as a tenth of the products.
    """
    if device.type != "cpu":
        yield [torch.empty(shape, dtype=dtype, device=device) for dtype in dtypes]
        return
    ends = list(itertools.accumulate(-(-math.prod(shape) * dtype.itemsize // 64) * 64 for dtype in dtypes))
    try:
        memory = _kept.pop()
    except IndexError:  # the first call, or another thread's
        memory = torch.empty(0, dtype=torch.uint8)
    if len(memory) < ends[-1]:
        memory = new_buffer((ends[-1],), torch.uint8, device)
    starts = [0, *ends[:-1]]
    try:
        yield [
            memory[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
            for start, dtype in zip(starts, dtypes, strict=True)
        ]
    finally:
        _kept[:] = [memory]


def multiply(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"], out: Float[Tensor, "n m"]) -> None:
    """Out = a · b, rounded to `out`'s dtype only where the device can do that."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


def add_weight_gradient(
    total: Float[Tensor, "vocab width"],
    d_logits: Float[Tensor, "rows vocab"],
    hidden: Float[Tensor, "rows width"],
    *,
    first: bool,
) -> None:
    """Total += d_logitsᵀ · hidden (the first time, total = …: what was in it is not read)."""
    if first and (total.dtype == hidden.dtype or hidden.is_cuda):
        multiply(d_logits.T, hidden, out=total)
    elif total.dtype == hidden.dtype:
        torch.addmm(total, d_logits.T, hidden, out=total)
    elif hidden.is_cuda and _adds_in_float32(hidden.dtype, hidden.device):
        torch.addmm(total, d_logits.T, hidden, out_dtype=total.dtype, out=total)
    else:  # added up in float32 a tile at a time, which on a CPU stays in the cache
        size = VOCAB_TILE["cpu" if hidden.device.type == "cpu" else "accelerator"]
        product_dtype = total.dtype if hidden.is_cuda else hidden.dtype
        narrow, wide = (hidden.new_empty(size, hidden.shape[1], dtype=d) for d in (product_dtype, total.dtype))
        for start in range(0, len(total), size):
            tile = total[start : start + size]
            n = len(tile)
            multiply(d_logits[:, start : start + n].T, hidden, out=narrow[:n])
            tile.copy_(narrow[:n]) if first else tile.add_(wide[:n].copy_(narrow[:n]))


@functools.cache
def _adds_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this torch's `addmm` of 16-bit matrices takes a float32 sum: not every version does."""
    a, total = torch.zeros(16, 16, dtype=dtype, device=device), torch.zeros(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def logits_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """Float32 at least wherever the product can give it; bfloat16 inputs give bfloat16 elsewhere."""
    if compute == torch.bfloat16 and device.type != "cuda":
        return compute
    return torch.promote_types(compute, torch.float32)
