"""Signals as bytes: columns that zstd's entropy coder makes small, decoded a sequence at a time without a loop.

A row's tokens are ordered by level and, where levels are equal, by id. Levels are stored as differences, most of them
0 or 1. An id is stored as its distance to the one before it where their levels are equal: a set costs less than a list.
Of each of these numbers the leading four bits and their place make a byte, which the entropy coder sees; the bits below
are as good as random and are packed as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llm_distill.cache.methods import ENTROPY_STEP, Hidden, SelectedTokens, SparseMethod

ZSTD_LEVEL = 9
"""3 to 5 % smaller than at its lowest, for 1 to 3 µs a row in the thread that packs; 12: 1 % more, in thrice that."""
ID_BITS, LEVEL_BITS = 24, 18
EXACT = 16
"""Numbers below are their own byte."""
SPARSE_COLUMNS = ("counts", "levels", "ids", "id_bits", "entropy")
HIDDEN_COLUMNS = ("hidden", "scales")


class SparseRows(NamedTuple):
    """The decoded tokens of some rows, padded to K; in nats."""

    ids: Tensor
    """[rows, K]."""
    log_weights: Tensor
    """[rows, K], −inf where a row has fewer."""
    log_tail: Tensor | None
    """[rows]."""
    entropy: Tensor
    """[rows], the teacher's."""


def columns(method: SparseMethod | Hidden) -> tuple[str, ...]:
    """The names of what `encode` gives."""
    if isinstance(method, Hidden):
        return HIDDEN_COLUMNS if method.dtype == "int8" else HIDDEN_COLUMNS[:1]
    return (*SPARSE_COLUMNS, "tail") if method.has_tail else SPARSE_COLUMNS


def check_widths(method: SparseMethod | Hidden, vocab_size: int) -> None:
    """Raises ValueError if the ids or the levels do not fit the format."""
    if vocab_size > 2**ID_BITS:
        raise ValueError(
            f"a vocabulary of {vocab_size:,} tokens is past the {2**ID_BITS:,} that the format has ids for."
        )
    if isinstance(method, SparseMethod) and method.num_levels > 2**LEVEL_BITS:
        raise ValueError(
            f"{method} has {method.num_levels:,} levels and the format {2**LEVEL_BITS:,}: take a larger step, or fewer "
            "draws."
        )


def encode(method: SparseMethod, tokens: SelectedTokens) -> dict[str, bytes]:
    """The tokens of one sequence's rows."""
    counts = tokens.counts.cpu().numpy()
    assert len(counts) <= 2 ** (64 - ID_BITS - LEVEL_BITS), "a text is shorter than four million tokens"
    row = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
    ids, levels = (part.cpu().numpy().astype(np.uint64) for part in (tokens.ids, tokens.levels))
    ordered = np.sort(row << np.uint64(ID_BITS + LEVEL_BITS) | levels << np.uint64(ID_BITS) | ids)
    ids = (ordered & np.uint64(2**ID_BITS - 1)).astype(np.int64)
    levels = (ordered >> np.uint64(ID_BITS) & np.uint64(2**LEVEL_BITS - 1)).astype(np.int64)
    steps, numbers = _differences(levels, counts), ids.copy()
    tied = _tied(steps, counts)
    numbers[1:][tied[1:]] -= ids[:-1][tied[1:]]
    leading, bits = _split(numbers)
    result = {
        "counts": counts.astype(_dtype(method.max_entries + 1)).tobytes(),
        "levels": steps.astype(_dtype(method.num_levels)).tobytes(),
        "ids": leading,
        "id_bits": bits,
        "entropy": tokens.entropy.cpu().numpy().astype(np.uint8).tobytes(),
    }
    if tokens.tail is not None:
        result["tail"] = tokens.tail.cpu().numpy().astype(_dtype(method.num_tail_levels)).tobytes()
    return result


def decode(method: SparseMethod, parts: list[dict[str, bytes]]) -> SparseRows:
    """The rows of some sequences, one after the other.

    Raises:
        ValueError: the bytes do not hold together.
    """
    counts = _joined(parts, "counts", _dtype(method.max_entries + 1)).astype(np.int64)
    steps = _joined(parts, "levels", _dtype(method.num_levels)).astype(np.int64)
    numbers = np.concatenate([_merge(part["ids"], part["id_bits"]) for part in parts])
    if not counts.sum() == len(steps) == len(numbers):
        raise ValueError(f"{counts.sum()} tokens were stored with {len(steps)} levels and {len(numbers)} ids.")
    levels = _running_sum(steps, _starts(counts))
    ids = _running_sum(numbers, np.flatnonzero(~_tied(steps, counts)))
    of_level = method.log_weights(torch.arange(method.num_levels)).float()
    padded_ids, log_weights, present = _padded(counts, ids, of_level[torch.from_numpy(levels)])
    log_tail = None
    if method.has_tail:
        tail = torch.from_numpy(_joined(parts, "tail", _dtype(method.num_tail_levels)).astype(np.int64))
        log_tail = method.log_tail(tail).float()
        total = torch.logaddexp(log_weights.logsumexp(-1), log_tail)
        log_weights, log_tail = (log_weights - total[:, None]).masked_fill(~present, -torch.inf), log_tail - total
    entropy = torch.from_numpy(_joined(parts, "entropy", np.dtype(np.uint8)).astype(np.float32)) * ENTROPY_STEP
    return SparseRows(padded_ids, log_weights, log_tail, entropy)


def encode_hidden(method: Hidden, hidden: Tensor) -> dict[str, bytes]:
    """Hidden states [rows, width], each byte of a number in a plane of its own (exponents repeat, mantissas do not)."""
    if method.dtype == "int8":
        scales = hidden.float().abs().amax(-1).clamp(min=1e-30) / 127
        numbers = (hidden.float() / scales[:, None]).round().to(torch.int8)
        return {"hidden": numbers.cpu().numpy().tobytes(), "scales": scales.cpu().numpy().astype("<f4").tobytes()}
    numbers = hidden.to(getattr(torch, method.dtype)).cpu().contiguous().view(torch.uint8)
    size = getattr(torch, method.dtype).itemsize
    return {"hidden": numbers.numpy().reshape(-1, size).T.tobytes()}


def decode_hidden(method: Hidden, parts: list[dict[str, bytes]], width: int) -> Tensor:
    """[rows, width], in float32 for int8 and otherwise as stored."""
    if method.dtype == "int8":
        numbers = torch.from_numpy(_joined(parts, "hidden", np.dtype(np.int8)).astype(np.float32)).view(-1, width)
        return numbers * torch.from_numpy(_joined(parts, "scales", np.dtype("<f4")).copy())[:, None]
    dtype = getattr(torch, method.dtype)
    planes = [np.frombuffer(part["hidden"], np.uint8).reshape(dtype.itemsize, -1).T.reshape(-1) for part in parts]
    return torch.from_numpy(np.concatenate(planes)).view(dtype).view(-1, width)


def _dtype(values: int) -> np.dtype:
    """The smallest for whole numbers from 0 to one below `values`."""
    return np.dtype(np.uint8 if values <= 2**8 else "<u2" if values <= 2**16 else "<u4")


def _joined(parts: list[dict[str, bytes]], name: str, dtype: np.dtype) -> np.ndarray:
    return np.frombuffer(b"".join(part[name] for part in parts), dtype)


def _starts(counts: np.ndarray) -> np.ndarray:
    """Where the rows that have tokens begin."""
    return (np.cumsum(counts) - counts)[counts > 0]


def _differences(levels: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """To the one before in the row; the first of a row is as it is."""
    steps = np.diff(levels, prepend=0)
    starts = _starts(counts)
    steps[starts] = levels[starts]
    return steps


def _tied(steps: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whether a token has the level of the one before it in its row."""
    tied = steps == 0
    tied[_starts(counts)] = False
    return tied


def _running_sum(numbers: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The sum so far, which begins anew at each start (the first is 0)."""
    total = np.cumsum(numbers)
    before = total[starts] - numbers[starts]
    return total - np.repeat(before, np.diff(starts, append=len(numbers)))


def _split(numbers: np.ndarray) -> tuple[bytes, bytes]:
    """A byte of each number for the entropy coder, and the bits below."""
    exponent = np.frexp(numbers.astype(np.float64))[1] - 1
    width = np.where(numbers < EXACT, 0, exponent - 3)
    leading = np.where(numbers < EXACT, numbers, EXACT + (exponent - 4) * 8 + ((numbers >> width) & 7))
    repeated = np.repeat(numbers, width)  # once for each of its bits
    place = np.arange(len(repeated)) - np.repeat(np.cumsum(width) - width, width)
    return leading.astype(np.uint8).tobytes(), np.packbits((repeated >> place) & 1, bitorder="little").tobytes()


def _merge(leading: bytes, bits: bytes) -> np.ndarray:
    first = np.frombuffer(leading, np.uint8).astype(np.int64)
    octave, top = np.divmod(first - EXACT, 8)
    width = np.where(first < EXACT, 0, octave + 1)
    offset = np.cumsum(width) - width
    if len(bits) * 8 < width.sum():
        raise ValueError(f"{len(bits)} bytes were stored for {width.sum()} bits.")
    part = np.frombuffer(bits + bytes(8), np.uint8).astype(np.uint32)
    words = part[:-3] | part[1:-2] << 8 | part[2:-1] << 16 | part[3:] << 24  # of four bytes, from each byte on
    low = (words[offset >> 3] >> (offset & 7)) & ((1 << width) - 1)
    return np.where(first < EXACT, first, ((8 + top) << width) + low)


def _padded(counts: np.ndarray, ids: np.ndarray, log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    present = torch.arange(max(int(counts.max(initial=1)), 1)) < torch.from_numpy(counts)[:, None]
    all_ids, all_weights = torch.zeros(present.shape, dtype=torch.long), torch.full(present.shape, -torch.inf)
    all_ids[present], all_weights[present] = torch.from_numpy(ids), log_weights
    return all_ids, all_weights, present
