"""Several teachers' signals about the same rows become one: weighed by row, voted on, or with what they have in common.

A member is a teacher of the mixture. Its signal is of one of three kinds, and those that tell less than everything are
mixed as tokens: of members that tell their top tokens and a tail, the union of these tokens and what is left (see
`mix_top_tokens`); of members that give fair draws, all draws.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_distill.losses.fused.logits import Logits, logits_in_chunks, top_tokens
from llm_distill.losses.fused.sparse import rate_top_tokens
from llm_distill.losses.fused.task import NOTHING
from llm_distill.rows import Positions, View
from llm_distill.signals import HiddenSignal, Signal, SparseSignal

Member = HiddenSignal | SparseSignal
Router = Callable[[View, Sequence[Signal]], Float[Tensor, "rows members"]]
"""Gives the weight of each member in each row, not negative and relative to each other."""


class Opinion(NamedTuple):
    """What one member thinks of each row, at the temperature of its signal if that is sparse, and at 1 otherwise."""

    log_text: Float[Tensor, " rows"]
    """Of the text's own token. Of one that is not named, the mean of the tokens of the tail."""
    entropy: Float[Tensor, " rows"]
    """In nats; of a tail, as if its tokens were equally likely."""
    likeliest: Int[Tensor, " rows"]


@torch.no_grad()
def opinion_of(signal: Member, targets: Int[Tensor, " rows"]) -> Opinion:
    """Costs a product of the teacher's head where that tells everything. Raises ValueError for draws."""
    if isinstance(signal, HiddenSignal):
        parts = [_opinion_of_logits(part, targets) for part in logits_in_chunks(signal.hidden, signal.head, 1.0)]
        if not parts:
            return Opinion(targets.float(), targets.float(), targets)
        return Opinion(*map(torch.cat, zip(*parts, strict=True)))
    if signal.log_tail is None:
        raise ValueError("fair draws do not tell how likely a token is: capture the teacher with cache_method=top_k.")
    log_p = signal.log_probs.clamp(min=NOTHING)
    entropy, log_text = rate_top_tokens(log_p, signal.log_tail, signal.vocab_size, signal.ids == targets[:, None])
    assert log_text is not None, "targets are given"
    return Opinion(log_text, entropy, signal.ids.gather(-1, log_p.argmax(-1, keepdim=True))[:, 0])


def _opinion_of_logits(part: Logits, targets: Int[Tensor, " rows"]) -> Opinion:
    assert isinstance(part.scores, Tensor), "no choice was made"
    text = part.scores.gather(-1, targets[part.rows, None])[:, 0]
    return Opinion(text - part.log_total, part.entropy, part.scores.argmax(-1))


def mean_over_texts(values: Float[Tensor, "rows members"], positions: Positions) -> Float[Tensor, "rows members"]:
    """In each row the mean over the rows that count of its text."""
    length = int(positions.position.max()) + 1 if len(values) else 1
    _, text = (positions.sample * length + positions.start).unique(return_inverse=True)
    counts = torch.bincount(text).to(values)[:, None]
    sums = values.new_zeros(len(counts), values.shape[1]).index_add(0, text, values)
    return (sums / counts)[text]


def weigh_by(scores: Float[Tensor, "rows members"], prior: Float[Tensor, "rows members"], temperature: float) -> Tensor:
    """softmax(log prior + scores / temperature) over the members. Where the prior is 0, so is the weight."""
    return (prior.log() + scores / temperature).softmax(-1)


def give_to_best(scores: Float[Tensor, "rows members"], prior: Float[Tensor, "rows members"]) -> Tensor:
    """All weight to the member with the highest score among those whose prior is not 0; of equals, to the first."""
    best = scores.masked_fill(prior == 0, -torch.inf).argmax(-1, keepdim=True)
    return torch.zeros_like(scores).scatter(-1, best, 1.0)


def take_votes(
    likeliest: Int[Tensor, "rows members"], weights: Float[Tensor, "rows members"], vocab: int
) -> SparseSignal:
    """Each member votes for its likeliest token with its weight, and the votes are the distribution.

    Whatever one of them says moves it, in total variation, by its weight at most, and what nobody finds likeliest gets
    nothing. It is the same at every temperature.
    """
    ids, log_probs = merge_tokens(likeliest, weights.log(), vocab)
    entropy = -(log_probs.exp() * log_probs.clamp(min=NOTHING)).sum(-1)
    log_tail = torch.full_like(entropy, -torch.inf)
    return SparseSignal(ids, log_probs, log_tail, vocab, temperature=None, entropy=entropy, disagreement=entropy)


def mix_draws(signals: Sequence[SparseSignal], weights: Float[Tensor, "rows members"]) -> SparseSignal:
    """All draws with their member's weight: the gradient of forward KL towards Σ wᵢ pᵢ, without bias."""
    log_weights = weights.log().T
    parts = [s.log_probs + log_w[:, None].to(s.log_probs) for s, log_w in zip(signals, log_weights, strict=True)]
    ids, log_probs = torch.cat([s.ids for s in signals], -1), torch.cat(parts, -1)
    order = log_probs.argsort(-1, descending=True)  # so that the first is there
    first = signals[0]
    return SparseSignal(ids.gather(-1, order), log_probs.gather(-1, order), None, first.vocab_size, first.temperature)


@torch.no_grad()
def mix_top_tokens(signals: Sequence[Member], weights: Float[Tensor, "rows members"]) -> SparseSignal:
    """Σ wᵢ pᵢ over the union of what the members name, and the mass outside as one more cell.

    A member that tells everything names as many of its likeliest tokens as the others do, and tells its probability of
    theirs too. What a sparse member says of a token that others name is not known: it is between 0 and its tail, is
    taken for 0, and stays in the tail. So the mass of the mixture that is in the wrong cell is at most Σ wᵢ tailᵢ in a
    row, over the sparse members, and none where they have no tail, as with the whole vocabulary.
    """
    sparse = [signal for signal in signals if isinstance(signal, SparseSignal)]
    temperature, vocab = sparse[0].temperature, sparse[0].vocab_size
    assert all(signal.temperature == temperature for signal in sparse), "each was checked"
    k = max(signal.ids.shape[1] for signal in sparse)
    named = [signal.ids.where(signal.log_probs.isfinite(), signal.ids[:, :1]) for signal in sparse]
    told = [s if isinstance(s, SparseSignal) else _top_of(s, k, temperature or 1.0, named) for s in signals]
    log_weights = weights.log().T
    parts = [s.log_probs + log_w[:, None].to(s.log_probs) for s, log_w in zip(told, log_weights, strict=True)]
    ids, log_probs = merge_tokens(torch.cat([s.ids for s in told], -1), torch.cat(parts, -1), vocab)
    log_tails = [torch.zeros(()) if s.log_tail is None else s.log_tail.double() for s in told]
    tails = [log_tail + log_w.double() for log_tail, log_w in zip(log_tails, log_weights, strict=True)]
    is_whole = log_probs.isfinite().sum(-1) == vocab
    log_tail = torch.stack(tails).logsumexp(0).masked_fill(is_whole, -torch.inf).to(log_probs)
    mixed = SparseSignal(ids, log_probs, log_tail, vocab, temperature)
    differences = _entropy(mixed) - sum(w * _entropy(s) for w, s in zip(weights.T, told, strict=True))
    return replace(mixed, disagreement=differences.clamp(min=0))


def merge_tokens(
    ids: Int[Tensor, "rows k"], log_probs: Float[Tensor, "rows k"], vocab: int
) -> tuple[Int[Tensor, "rows most"], Float[Tensor, "rows most"]]:
    """Each token of a row once with the sum of its probabilities, the likeliest first, then padding with −inf."""
    ids, order = ids.sort(dim=-1, stable=True)
    p = log_probs.gather(-1, order).double().exp()  # in float32, e^−104 is 0
    is_first = torch.nn.functional.pad(ids[:, 1:] != ids[:, :-1], (1, 0), value=True)
    token = is_first.cumsum(-1) - 1
    sums = torch.zeros_like(p).scatter_add(-1, token, p)
    distinct = torch.zeros_like(ids).scatter(-1, token, ids)
    log_sums, order = sums.log().sort(dim=-1, descending=True, stable=True)
    return distinct.gather(-1, order)[:, :vocab], log_sums[:, :vocab].to(log_probs)


def _top_of(signal: HiddenSignal, k: int, temperature: float, named: list[Tensor]) -> SparseSignal:
    """The k likeliest tokens of a member that tells everything, those named by others, and the mass outside."""
    k = min(k, signal.vocab_size)
    asked = torch.cat(named, -1)
    ids = asked.new_zeros(len(signal), k + asked.shape[1])
    log_probs = torch.full(ids.shape, -torch.inf, device=ids.device)
    log_tail = log_probs.new_full((len(signal),), -torch.inf)
    for part in logits_in_chunks(signal.hidden, signal.head, temperature):
        scores = part.scores
        assert isinstance(scores, Tensor), "no choice was made"
        log_probs, log_tail = log_probs.to(part.log_total), log_tail.to(part.log_total)
        own = torch.cat([top_tokens(scores, k).ids, asked[part.rows]], -1)
        ordered, order = own.sort(dim=-1, stable=True)
        is_again = torch.nn.functional.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
        is_again = torch.zeros_like(is_again).scatter(-1, order, is_again)
        log_p = (scores.gather(-1, own) - part.log_total[:, None]).masked_fill(is_again, -torch.inf)
        rest = scores.scatter(-1, own, -torch.inf).logsumexp(-1) - part.log_total
        ids[part.rows], log_probs[part.rows], log_tail[part.rows] = own, log_p, rest
    return SparseSignal(*merge_tokens(ids, log_probs, signal.vocab_size), log_tail, signal.vocab_size, temperature)


def _entropy(signal: SparseSignal) -> Float[Tensor, " rows"]:
    """Of its cells, in nats."""
    assert signal.log_tail is not None, "draws have none"
    cells = torch.cat([signal.log_probs, signal.log_tail[:, None]], -1)
    return -(cells.exp() * cells.clamp(min=NOTHING)).sum(-1)
