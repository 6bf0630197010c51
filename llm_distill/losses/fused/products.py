"""The matrix products of the fused head loss, written into buffers that are used again."""

from __future__ import annotations

import functools
import itertools
import math
import mmap
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from jaxtyping import Float
from torch import Tensor

from llm_distill.losses.fused.cpp_backend import Kernels

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
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


_spare_memory: list[Tensor] = []
SPARE_BYTES = 2**29
"""How much memory a process keeps between two calls at most."""


@contextmanager
def chunk_buffers(
    rows: int, columns: list[tuple[int, torch.dtype]], device: torch.device
) -> Iterator[list[Float[Tensor, "rows columns"]]]:
    """Matrices of as many rows, with a number of columns and a dtype each. On a CPU their memory is kept for the next
    call, as an accelerator's allocator does: to map new memory in every step would take as long as a tenth of the
    products.
    """
    if device.type != "cpu":
        yield [torch.empty(rows, number, dtype=dtype, device=device) for number, dtype in columns]
        return
    sizes = [rows * number * dtype.itemsize for number, dtype in columns]
    ends = list(itertools.accumulate(-(-size // 64) * 64 for size in sizes))
    try:
        memory = _spare_memory.pop()
    except IndexError:  # the first call, or another thread's
        memory = torch.empty(0, dtype=torch.uint8)
    if len(memory) < ends[-1]:
        with torch.inference_mode(False):  # or no later call could write into it
            memory = new_buffer((ends[-1],), torch.uint8, device)
    starts = [0, *ends[:-1]]
    try:
        yield [
            memory[start : start + size].view(dtype).view(rows, number)
            for start, size, (number, dtype) in zip(starts, sizes, columns, strict=True)
        ]
    finally:
        _spare_memory[:] = [memory] if len(memory) <= SPARE_BYTES else []


def multiply(a: Float[Tensor, "n k"], b: Float[Tensor, "k m"], out: Float[Tensor, "n m"]) -> None:
    """Out = a · b, rounded to `out`'s dtype only where the device can do that."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif _gives_float32(torch.mm, a.dtype, a.device):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        out.copy_(a @ b)


class WeightGradient:
    """dW = Σ d_logitsᵀ · hidden over the chunks of a task, summed in float32 at least.

    `total` is in the weight's dtype from the start where nothing is lost by it. So it is with one or two products in
    bfloat16: each is a sum in float32 inside, and the second is added to the first before it is rounded. Where there
    are more, and it is compiled, `total` has the upper halves of the float32 sums and `rest` the lower ones.
    """

    def __init__(
        self, weight: Float[Tensor, "vocab width"], compute: torch.dtype, num_products: int, kernels: Kernels | None
    ) -> None:
        """`compute` is the dtype of the products, and `kernels` the compiled ones, where there are some."""
        is_narrow = weight.dtype == compute == torch.bfloat16
        becomes_dw = is_narrow and (num_products <= 2 or kernels is not None)
        dtype = weight.dtype if becomes_dw else torch.promote_types(weight.dtype, torch.float32)
        self.total = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self.rest: Tensor | None = None
        if becomes_dw and num_products > 2:
            self.rest = torch.zeros(weight.shape, dtype=torch.int16, device=weight.device)
        self._kernels, self._num_products, self._num_added = kernels, num_products, 0

    def add(self, d_logits: Float[Tensor, "rows vocab"], hidden: Float[Tensor, "rows width"]) -> None:
        """One product more; after the last, `total` is dW."""
        total, first, device = self.total, self._num_added == 0, hidden.device
        self._num_added += 1
        same, direct = total.dtype == hidden.dtype, _gives_float32(torch.mm, hidden.dtype, device)
        if first and (same or direct):
            multiply(d_logits.T, hidden, out=total)
        elif same and self.rest is None:
            torch.addmm(total, d_logits.T, hidden, out=total)
        elif _gives_float32(torch.addmm, hidden.dtype, device):
            torch.addmm(total, d_logits.T, hidden, out_dtype=total.dtype, out=total)
        else:  # added up a tile at a time, which on a CPU stays in the cache
            size = VOCAB_TILE["cpu" if device.type == "cpu" else "accelerator"]
            product = torch.empty(size, hidden.shape[1], dtype=torch.float32 if direct else hidden.dtype, device=device)
            for start in range(0, len(total), size):
                tile = total[start : start + size]
                part = product[: len(tile)]
                multiply(d_logits[:, start : start + len(tile)].T, hidden, out=part)
                if first:
                    tile.copy_(part)
                elif self.rest is None or self._kernels is None:
                    tile.add_(part)
                else:
                    rest = self.rest[start : start + size]
                    is_last = self._num_added == self._num_products
                    self._kernels.add_halves(tile, rest, part, is_last=is_last)


@functools.cache
def _gives_float32(product: Callable[..., Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether `mm` or `addmm` of 16-bit matrices can give float32: not on every device, and not in every torch."""
    if device.type != "cuda" or dtype.itemsize != 2:
        return False
    a = torch.zeros(16, 16, dtype=dtype, device=device)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device)
    try:
        product(*(() if product is torch.mm else (total,)), a, a, out_dtype=torch.float32, out=total)
    except RuntimeError:
        return False
    return True


def logits_dtype(compute: torch.dtype, device: torch.device) -> torch.dtype:
    """Float32 at least wherever the product can give it; otherwise that of the inputs."""
    return torch.promote_types(compute, torch.float32) if _gives_float32(torch.mm, compute, device) else compute
