"""Several teachers as one: a mixture of whatever they tell, weighed everywhere alike or by row, or their votes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llm_distill.cache.methods import Hidden
from llm_distill.divergences import AlphaBeta, Divergence, ReverseKL
from llm_distill.models import HEAD, LanguageModel, Needs
from llm_distill.probes import Collator
from llm_distill.rows import SIGNAL, SKIPPED, TEACHER_OF_ROW, Example, View, examples_of
from llm_distill.signals import HiddenSignal, MixtureSignal, Signal, SparseSignal
from llm_distill.teachers.base import Teacher
from llm_distill.teachers.cached import CachedTeacher, CacheReader, decoded, leave_out
from llm_distill.teachers.mixing import (
    Member,
    Opinion,
    Router,
    give_to_best,
    mean_over_texts,
    mix_draws,
    mix_top_tokens,
    opinion_of,
    take_votes,
    weigh_by,
)
from llm_distill.teachers.options import MIXTURE_WEIGHTS, MIXTURES

logger = logging.getLogger(__name__)

SPEAKS = "speaks"
"""Beside what a cache tells of a view, [rows]: whether it knows the text."""
EVERYTHING, TOP, DRAWS, TOKEN = "everything", "top tokens", "fair draws", "one probability a token"


class EnsembleTeacher(Teacher):
    """p = Σ wᵢ pᵢ over teachers that share a tokenizer: in memory, quantised, from caches, behind servers.

    Args:
        teachers: the members.
        weights: equal ones by default; relative to their sum. Or a function of a view and the members' signals that
            gives them for each row, [rows, members].
        mixture: `mean`; `geometric`, p ∝ Π pᵢ^wᵢ; `vote`, each member's weight on its likeliest token; `best`, the
            member that predicts the text at hand best.
        weights_by: `fixed`; `likelihood`, wᵢ · exp(−lossᵢ / temperature) with the member's mean loss on the text, in
            nats a token; `entropy`, the same with its entropy in each row, so that the surer one weighs more.
        names: what the column `teacher` of a dataset calls them.
    """

    def __init__(
        self,
        teachers: Sequence[Teacher],
        weights: Sequence[float] | Router | None = None,
        *,
        mixture: str = "mean",
        weights_by: str = "fixed",
        temperature: float = 1.0,
        names: Sequence[str] | None = None,
    ) -> None:
        """Raises:
        ValueError: no teacher, a weight that is not positive and finite, another number of weights or names than of
            teachers, or what does not go together.
        """
        self.teachers = tuple(teachers)
        self.router = weights if callable(weights) else None
        given = [1.0] * len(teachers) if weights is None or callable(weights) else list(weights)
        if not teachers or len(given) != len(teachers) or not all(0 < weight < math.inf for weight in given):
            raise ValueError(
                f"{len(teachers)} teachers need as many positive, finite weights, got {given}. Leave out a teacher "
                "that shall not speak."
            )
        if mixture not in MIXTURES or weights_by not in MIXTURE_WEIGHTS or not 0 < temperature < math.inf:
            raise ValueError(
                f"mixture must be one of {', '.join(MIXTURES)}, weights_by of {', '.join(MIXTURE_WEIGHTS)} and "
                f"temperature positive, got {mixture!r}, {weights_by!r} and {temperature}."
            )
        if weights_by != "fixed" and (mixture == "best" or self.router is not None):
            other = "best gives all weight to one teacher" if mixture == "best" else "a function gives the weights"
            raise ValueError(f"weights_by={weights_by!r} would have no effect: {other}.")
        self.weights = tuple(weight / sum(given) for weight in given)
        self.mixture, self.weights_by, self.temperature = mixture, weights_by, temperature
        self.names = tuple(str(number) for number in range(len(teachers))) if names is None else tuple(names)
        if len(set(self.names)) != len(teachers):
            raise ValueError(f"{len(teachers)} teachers need as many different names, got {self.names}.")
        self.is_stored = any(teacher.is_stored for teacher in teachers)
        if self.is_stored or any(teacher.reader is not None for teacher in teachers):
            self.reader = MixtureReader(self.teachers)

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        return tuple(model for teacher in self.teachers for model in teacher.models)

    @property
    def k(self) -> int | None:  # type: ignore[override]
        """How many tokens of a row it tells of: see `mix_top_tokens`."""
        if self.mixture == "vote":
            return len(self.teachers)
        ks = [_k_of(teacher) for teacher in self.teachers if _kind_of(teacher) != EVERYTHING]
        return sum(ks) + max(ks) * (len(self.teachers) - len(ks)) if ks else None

    @property
    def needs_opinions(self) -> bool:
        """Whether what is mixed, and how, depends on what each member thinks of the text."""
        return self.mixture in ("vote", "best") or self.weights_by != "fixed"

    def score(self, view: View, needs: Needs = HEAD) -> Signal:
        fetched: dict[str, Any] = dict(view.fetched or {})
        if self.is_stored and not self._is_fetched(fetched):
            fetched |= MixtureReader(self.teachers).fetch(view)
        signals = [
            _member(teacher, teacher.score(view._replace(fetched=fetched.get(str(number)))))
            for number, teacher in enumerate(self.teachers)
        ]
        speaks = self._speakers(view, fetched)
        if len(signals) == 1 and self.mixture != "vote":
            return signals[0]
        opinions = [opinion_of(signal, view.positions.targets) for signal in signals] if self.needs_opinions else []
        weights = self._weigh(view, signals, opinions, speaks)
        if self.mixture == "vote":
            likeliest = torch.stack([opinion.likeliest for opinion in opinions], -1)
            return take_votes(likeliest, weights, signals[0].vocab_size)
        if all(isinstance(signal, HiddenSignal) for signal in signals):
            is_fixed = speaks is None and self.router is None and not opinions
            members = cast(tuple[HiddenSignal, ...], tuple(signals))
            return MixtureSignal(members, self.weights if is_fixed else weights, self.mixture == "geometric")
        sparse = [signal for signal in signals if isinstance(signal, SparseSignal)]
        if any(signal.log_tail is None for signal in sparse):
            self._require_one_kind([EVERYTHING] * (len(signals) - len(sparse)) + [_kind_of_signal(s) for s in sparse])
            return mix_draws(sparse, weights)
        self._require_one_kind([_kind_of_signal(signal) for signal in signals])
        return mix_top_tokens(signals, weights)

    def _weigh(
        self, view: View, signals: list[Member], opinions: list[Opinion], speaks: Bool[Tensor, "rows members"] | None
    ) -> Float[Tensor, "rows members"]:
        """What each member weighs in each row: not negative, and 1 together."""
        like = signals[0].hidden if isinstance(signals[0], HiddenSignal) else signals[0].log_probs
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.router is not None:
            prior = self._routed(view, signals).to(like.device, dtype)
        else:
            prior = torch.tensor(self.weights, device=like.device, dtype=dtype).expand(len(signals[0]), -1)
        if speaks is not None:
            prior = prior * speaks.to(prior)
            if not (prior.sum(-1) > 0).all():
                raise ValueError(
                    "nobody speaks about a row: the teacher that its column `teacher` or the weights name does not "
                    "know its text. Capture it, or take such rows out."
                )
        prior = prior / prior.sum(-1, keepdim=True)
        if self.mixture == "best" or self.weights_by == "likelihood":
            scores = torch.stack([opinion.log_text for opinion in opinions], -1).to(prior)
            scores = mean_over_texts(scores, view.positions)
            return give_to_best(scores, prior) if self.mixture == "best" else weigh_by(scores, prior, self.temperature)
        if self.weights_by == "entropy":
            scores = -torch.stack([opinion.entropy for opinion in opinions], -1).to(prior)
            return weigh_by(scores, prior, self.temperature)
        return prior

    def _routed(self, view: View, signals: list[Member]) -> Tensor:
        assert self.router is not None, "it is asked for"
        weights, shape = self.router(view, signals), (len(signals[0]), len(signals))
        if not isinstance(weights, Tensor) or tuple(weights.shape) != shape:
            given = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(f"the router must give a weight for each row and teacher, {shape}, and gave {given}.")
        broken = ~(weights.isfinite() & (weights >= 0)).all(-1) | (weights.sum(-1) <= 0)
        if broken.any():
            row = int(broken.nonzero()[0])
            raise ValueError(
                f"the router gave the weights {weights[row].tolist()} in row {row}: they must be finite and not "
                "negative, and one must be positive."
            )
        return weights

    def _speakers(self, view: View, fetched: Mapping[str, Any]) -> Bool[Tensor, "rows members"] | None:
        """Who speaks about which row; None where all do."""
        device, rows = view.positions.sample.device, len(view.positions.sample)
        own = [fetched.get(str(number), {}).get(SPEAKS) for number in range(len(self.teachers))]
        of_row = fetched.get(TEACHER_OF_ROW)
        if of_row is None and all(mask is None for mask in own):
            return None
        everywhere = torch.ones(rows, dtype=torch.bool)
        speaks = torch.stack([everywhere if mask is None else mask.cpu() for mask in own], -1).to(device)
        if of_row is not None:
            chosen = of_row.to(device)[view.positions.sample]
            speaks = speaks & (chosen[:, None] == torch.arange(len(self.teachers), device=device))
        return speaks

    def _is_fetched(self, fetched: Mapping[str, Any]) -> bool:
        stored = [str(number) for number, teacher in enumerate(self.teachers) if isinstance(teacher, CachedTeacher)]
        return all(number in fetched for number in stored)

    def describe(self) -> dict[str, Any]:
        weights = "of a function" if self.router is not None else list(self.weights)
        members = [teacher.describe() for teacher in self.teachers]
        return {
            "ensemble": members,
            "weights": weights,
            "mixture": words_of(self.mixture, self.weights_by, self.temperature),
        }

    def summary(self) -> str:
        how = words_of(self.mixture, self.weights_by, self.temperature)
        return f"{how} of {len(self.teachers)}: " + "; ".join(teacher.summary() for teacher in self.teachers)

    def check(self, divergence: Divergence, temperature: float) -> None:
        kinds = [_kind_of(teacher) for teacher in self.teachers]
        self._require_one_kind(kinds)
        if self.mixture == "geometric" and set(kinds) != {EVERYTHING}:
            raise ValueError(
                "mixture=geometric multiplies whole distributions, and a cache of tokens or a server tells a part of "
                "them, so that what the others would be is not known: use mean, or cache_method=hidden."
            )
        if self.mixture == "vote" and isinstance(divergence, ReverseKL | AlphaBeta):
            raise ValueError(
                f"{divergence} is infinite where the teacher gives a token nothing, as votes do: use forward_kl, jsd, "
                "a skew divergence or tvd, or mixture=mean."
            )
        if self.needs_opinions and DRAWS in kinds:
            raise ValueError(
                "fair draws do not tell how likely a token is, so that a cache of them has no vote and no weight of "
                "its own by row: capture it with cache_method=top_k or hidden, or set mixture=mean and "
                "mixture_weights=fixed."
            )
        for teacher in self.teachers:
            if self.mixture != "vote":
                teacher.check(divergence, temperature)
        self._tell_shared_texts()

    def _require_one_kind(self, kinds: list[str]) -> None:
        if TOKEN in kinds:
            raise ValueError(
                "a teacher_server_k of 0 tells the text's own token alone, which is no distribution to mix."
            )
        if DRAWS in kinds and set(kinds) != {DRAWS}:
            other = sorted({*kinds} - {DRAWS})[0]
            raise ValueError(
                f"a mixture has a cache of fair draws (cache_method=hybrid or sampled) beside a teacher that tells "
                f"{other}, and one cannot be mixed with the other: capture with cache_method=top_k or hidden, or all "
                "with hybrid."
            )

    def _tell_shared_texts(self) -> None:
        """Says how many texts caches have in common, and what happens with the rest."""
        caches = {n: t.cache for n, t in zip(self.names, self.teachers, strict=True) if isinstance(t, CachedTeacher)}
        if len(caches) < 2:
            return
        first, *others = (cache.index for cache in caches.values())
        shared, known = first.shared_with(others)
        if shared < known:
            logger.warning(
                "the caches of the mixture know different texts: %s; %s of %s (%.0f %%) are in all of them. A text "
                "that one lacks ends the run, or with on_miss: skip at that cache is left to the others.",
                ", ".join(f"{name} {len(cache):,}" for name, cache in caches.items()),
                f"{shared:,}",
                f"{known:,}",
                100 * shared / known,
            )

    def fit_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        for teacher in self.teachers:
            teacher.fit_to(tokenizer)

    @property
    def max_length(self) -> int | None:
        return min((limit for teacher in self.teachers if (limit := teacher.max_length)), default=None)

    def require_documents_apart(self, collate: Collator, accelerator: Accelerator) -> None:
        for teacher in self.teachers:
            teacher.require_documents_apart(collate, accelerator)

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        for teacher in self.teachers:
            teacher.prepare(accelerator, student)

    def flush(self) -> None:
        for teacher in self.teachers:
            teacher.flush()


def words_of(mixture: str, weights_by: str, temperature: float) -> str:
    """How several become one, as a cache records it."""
    return mixture if weights_by == "fixed" else f"{mixture} by {weights_by} at {temperature:g}"


class MixtureReader:
    """Puts what caches and servers say into a batch, each under its number.

    A text that a cache lacks ends the run there (`on_miss=error`), or is left to the others (`skip`); one that nobody
    knows is left out of the loss.
    """

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.readers = [teacher.reader for teacher in teachers]

    def __call__(self, batch: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        given, skipped = batch.get(SIGNAL, {}), torch.zeros(len(batch["labels"]), dtype=torch.long)
        view = View.of_teacher(batch)
        examples = list(examples_of(view))
        for example, is_silent in zip(examples, self._silent(view, examples), strict=True):
            if all(is_silent):
                leave_out(example, batch)
                skipped[example.sample] += example.rows
        if skipped.any():  # others count now
            view = View.of_teacher(batch)
            examples = list(examples_of(view))
        fetched = self._look_up(view, examples)
        for number, reader in enumerate(self.readers):
            if reader is not None and not isinstance(reader, CacheReader):
                fetched[str(number)] = reader(dict(batch))[SIGNAL]
        if any(isinstance(reader, CacheReader) and reader.on_miss == "skip" for reader in self.readers):
            fetched[SKIPPED] = skipped
        batch[SIGNAL] = {**given, **fetched}
        return batch

    def fetch(self, view: View) -> dict[str, Any]:
        """What caches say of a view, by their numbers. Raises ValueError for a text that one must know and lacks."""
        examples = list(examples_of(view))
        self._silent(view, examples)
        return self._look_up(view, examples)

    def _look_up(self, view: View, examples: list[Example]) -> dict[str, Any]:
        fetched: dict[str, Any] = {}
        for number, reader in enumerate(self.readers):
            if isinstance(reader, CacheReader):
                stored, missing = reader.look_up(view)
                bits = decoded(reader.cache, stored)
                if missing:
                    keys = {example.key for example in missing}
                    speaks = torch.tensor([e.key not in keys for e in examples for _ in range(e.rows)])
                    bits = {name: _spread(value, speaks) for name, value in bits.items()} | {SPEAKS: speaks}
                fetched[str(number)] = bits
        return fetched

    def _silent(self, view: View, examples: list[Example]) -> list[list[bool]]:
        """Of each text, which teachers say nothing: another is the row's, or its cache lacks it and may."""
        of_row = (view.fetched or {}).get(TEACHER_OF_ROW)
        is_asked = [[of_row is None or int(of_row[e.sample]) == n for n in range(len(self.readers))] for e in examples]
        silent = [[not asked for asked in of_example] for of_example in is_asked]
        for number, reader in enumerate(self.readers):
            if not isinstance(reader, CacheReader):
                continue
            lacks = [example.key not in reader.cache for example in examples]
            missing = [
                e for e, asked, lacking in zip(examples, is_asked, lacks, strict=True) if asked[number] and lacking
            ]
            if missing and reader.on_miss != "skip":
                error = reader.missing_texts(view, missing, len(examples))
                raise ValueError(f"{error} In a mixture, on_miss: skip at this cache leaves such texts to the others.")
            for of_example, lacking in zip(silent, lacks, strict=True):
                of_example[number] |= lacking
        return silent


def _spread(values: Tensor, rows: Bool[Tensor, " rows"]) -> Tensor:
    """Zeros in the other rows: what stands there has no weight."""
    spread = values.new_zeros(len(rows), *values.shape[1:])
    spread[rows] = values
    return spread


def _member(teacher: Teacher, signal: Signal) -> Member:
    if isinstance(signal, HiddenSignal | SparseSignal):
        return signal
    raise TypeError(f"a mixture is of distributions, and a {type(teacher).__name__} gave a {type(signal).__name__}.")


def require_rated(teacher: Teacher, row_weights: str) -> None:
    """Raises ValueError if the divergence shall weigh by what a teacher thinks of a row, and it does not tell it."""
    members = teacher.teachers if isinstance(teacher, EnsembleTeacher) else (teacher,)
    kinds = {_kind_of(member) for member in members}
    if TOKEN in kinds or (DRAWS in kinds and (row_weights == "correctness" or len(members) > 1)):
        raise ValueError(
            f"kd_row_weights={row_weights} needs what the teacher thinks of a row, and it tells "
            f"{TOKEN if TOKEN in kinds else DRAWS}: use a teacher in memory, or cache_method=top_k or hidden."
        )


def _kind_of(teacher: Teacher) -> str:
    """What a teacher tells of each row, as far as is known before it is asked."""
    if isinstance(teacher, CachedTeacher):
        method = teacher.cache.method
        return EVERYTHING if isinstance(method, Hidden) else TOP if method.has_tail else DRAWS
    return {None: EVERYTHING, 0: TOKEN}.get(teacher.k, TOP)


def _kind_of_signal(signal: Member) -> str:
    return EVERYTHING if isinstance(signal, HiddenSignal) else TOP if signal.log_tail is not None else DRAWS


def _k_of(teacher: Teacher) -> int:
    return getattr(teacher.cache.method, "k", 1) if isinstance(teacher, CachedTeacher) else teacher.k or 0
