"""From what a live teacher says about a batch to what is stored of each of its examples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from torch import Tensor

from llm_distill.cache.codec import ZSTD_LEVEL, encode, encode_hidden
from llm_distill.cache.methods import Hidden, Method, SelectedTokens, TopK, in_entropy_steps
from llm_distill.losses.fused.logits import logits_in_chunks
from llm_distill.rows import Example
from llm_distill.signals import AlignedSignal, HiddenSignal, MixtureSignal, Signal, SparseSignal, TokenSignal

CHUNK_BYTES = 2**26
"""Of float32 log-probabilities at a time."""
Selected = SelectedTokens | Float[Tensor, "rows width"]
"""What is stored of some rows: tokens, or hidden states."""


def select(method: Method, signal: Signal, examples: Sequence[Example], temperature: float, seed: int) -> Selected:
    """What the method stores of all rows, in main memory. Draws depend on example and seed alone, not on the batch.

    Raises:
        ValueError: the signal has not what the method stores.
    """
    if isinstance(method, Hidden):
        if not isinstance(signal, HiddenSignal):
            raise ValueError(
                f"method=hidden keeps the hidden states of one live teacher, not a {type(signal).__name__}."
            )
        hidden = signal.hidden.cpu()
        _require_finite(hidden.sum(-1), slice(0, len(hidden)), examples)
        return hidden
    if isinstance(signal, SparseSignal):
        return _select_top(method, signal, examples)
    assert not isinstance(signal, TokenSignal | AlignedSignal), "require_enough comes first"
    uniform = torch.from_numpy(np.concatenate([_uniform(example, seed) for example in examples]))
    chunks: list[SelectedTokens] = []
    if isinstance(signal, HiddenSignal):
        for logits in logits_in_chunks(signal.hidden, signal.head, temperature, method.choice, uniform[:, 0]):
            _require_finite(logits.log_total, logits.rows, examples)
            draws = uniform[logits.rows].to(logits.log_total.device)
            chunks.append(method(logits.scores, draws, logits.log_total, logits.entropy).cpu())
    else:
        for start, log_p in log_probabilities(signal, temperature):
            _require_finite(log_p.amax(-1), slice(start, start + len(log_p)), examples)
            chunks.append(method(log_p, uniform[start : start + len(log_p)].to(log_p.device)).cpu())
    columns: Any = (None if parts[0] is None else torch.cat(parts) for parts in zip(*chunks, strict=True))
    return SelectedTokens(*columns)


def require_enough(method: Method, k: int | None) -> None:
    """Raises ValueError if `method` keeps more of a row than a teacher tells, whose top k it is (None: everything)."""
    if k is not None and not (isinstance(method, TopK) and method.k <= k):
        its_top = f"keep its top k (cache_method=top_k, cache_kwargs={{k: {k}}}), or " if k else ""
        raise ValueError(
            f"{method} keeps more than the {k} likeliest tokens that this teacher tells of each row: {its_top}have it "
            "tell more (teacher_server_k)."
        )


def _select_top(method: Method, signal: SparseSignal, examples: Sequence[Example]) -> SelectedTokens:
    """Of the top k of a teacher. The entropy that is stored is that of its k + 1 cells, a lower bound."""
    if signal.log_tail is None:
        raise ValueError("sampled tokens are not full distributions nor their top k, of which a cache is made.")
    if signal.ids.shape[1] < signal.vocab_size:
        require_enough(method, signal.ids.shape[1])
    assert isinstance(method, TopK), "or it was refused"
    _require_finite(signal.log_probs.amax(-1), slice(0, len(signal)), examples)
    cells = torch.cat([signal.log_probs, signal.log_tail[:, None]], -1).double()
    entropy = -(cells.exp() * cells.clamp(min=-1e4)).sum(-1)
    scores = signal.log_probs
    if scores.shape[1] < signal.vocab_size:  # one column that is never selected, as there are others outside
        scores = torch.nn.functional.pad(scores, (0, 1), value=-torch.inf)
    row, column, levels, tail = method.select(scores, scores.new_zeros(len(scores)), scores.new_zeros(len(scores), 2))
    counts = torch.bincount(row, minlength=len(scores))
    return SelectedTokens(counts, signal.ids[row, column], levels, tail, in_entropy_steps(entropy)).cpu()


def encode_examples(
    method: Method, selected: Selected, examples: Sequence[Example]
) -> Iterator[tuple[Example, dict[str, bytes]]]:
    """Each example's columns."""
    encode_rows: Any = encode_hidden if isinstance(method, Hidden) else encode
    parts = selected.split([example.rows for example in examples])
    for example, part in zip(examples, parts, strict=True):
        yield example, encode_rows(method, part)


def _require_finite(values: Float[Tensor, " rows"], rows: slice, examples: Sequence[Example]) -> None:
    broken = ~values.isfinite()
    if broken.any():
        row, ends = rows.start + int(broken.nonzero()[0]), np.cumsum([example.rows for example in examples])
        example = examples[int(np.searchsorted(ends, row, side="right"))]
        raise ValueError(
            f"the teacher gave NaN or infinity for {int(broken.sum())} positions, first in row {example.sample} of a "
            f"batch, a text of {len(example.positions)} tokens. A teacher in float16 often overflows: load it in "
            'bfloat16 (teacher_model_init_kwargs=\'{"dtype": "bfloat16"}\'). Nothing of this batch was stored.'
        )


def packed_size(columns: list[dict[str, bytes]]) -> int:
    """The bytes that the columns of some examples take on disk, about."""
    planes = [b"".join(example[name] for example in columns) for name in columns[0]] if columns else []
    zstd = pa.Codec("zstd", ZSTD_LEVEL)
    return sum(len(zstd.compress(plane, asbytes=True)) for plane in planes)


@torch.no_grad()
def log_probabilities(
    signal: HiddenSignal | MixtureSignal, temperature: float
) -> Iterator[tuple[int, Float[Tensor, "chunk vocab"]]]:
    """The teacher's, a chunk of rows at a time, and where the chunk starts."""
    size = max(1, CHUNK_BYTES // (4 * signal.vocab_size))
    with ExitStack() as opened:
        heads = [opened.enter_context(member.head.weights()) for member in signal.members]
        for start in range(0, len(signal), size):
            log_ps = []
            for member, (weight, bias) in zip(signal.members, heads, strict=True):
                hidden = member.hidden[start : start + size].to(weight.dtype)
                logits = member.head.post_process(torch.nn.functional.linear(hidden, weight, bias).float())
                log_ps.append((logits / temperature).log_softmax(-1))
            yield start, signal.mix(log_ps, slice(start, start + size))[0]


def _uniform(example: Example, seed: int) -> np.ndarray:
    """Two numbers for each row: [rows, 2]."""
    bits = np.random.Philox(key=int.from_bytes(example.key, "little") ^ seed)
    return np.random.Generator(bits).random((example.rows, 2), dtype=np.float32)
