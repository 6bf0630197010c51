"""The teacher's cache: how true it is for its bytes, what a student learns from it, and what it costs in time.

    python benchmarks/cache.py --output benchmarks/results/cache_cpu
    python benchmarks/cache.py --parts time --rounds 5 --output benchmarks/results/cache_cpu
    python benchmarks/cache.py --short

Four parts, each of which can be measured by itself; the others keep what NAME.json has of them:

fidelity: bytes a token against the error of the gradient, on held-out text, for our methods and for how others store
the same. The teacher is trained here once, and so is the student at whose place the gradients are taken. Our bytes are
those after zstd; the others' are counted as they count them. They are written from their descriptions, as methods of
ours, so that the same code measures them; levels of 1/4096 nat are finer than the formats that they stand for.

train: the same student from scratch with the live teacher, from caches, and from what others store.

time: a step from the cache against one of transformers' `Trainer` (cross-entropy, the same student and batches), and a
capture against the teacher's own forward. Every case runs in a process of its own, in turn with the others.

start: a cache of many shards, out of the page cache: seconds and memory to open it, then lookups in random order.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import in_fresh_process, machine, peak_memory
from torch import Tensor

# Before transformers reads them, here and in the children.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import train_step
import transformers
from datasets import Dataset
from demo import Corpus, Recipe, make_config, make_model, prepare_corpus, train, trained_teacher
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_distill import CachedTeacher, DistillationConfig, DistillationTrainer, LiveTeacher, Teacher, TeacherCache
from llm_distill import capture as capturing
from llm_distill.cache import Hidden, Hybrid, Sampled, TopK, manifest
from llm_distill.cache.codec import decode
from llm_distill.cache.fidelity import Fidelity, Sample, as_table, fidelity
from llm_distill.cache.keys import KEY_BYTES, examples_of
from llm_distill.cache.methods import Method, SparseMethod, describe_method
from llm_distill.cache.record import encoded, keep
from llm_distill.cache.store import ShardWriter
from llm_distill.heads import LMHead
from llm_distill.signals import HiddenSignal, SparseSignal
from llm_distill.teachers import Batch
from llm_distill.teachers.live import hidden_of_counted_rows

PARTS = ("fidelity", "train", "time", "start")
RECIPE = Recipe(
    vocab_size=16384, block=256, teacher_width=256, teacher_layers=4, teacher_steps=700, student_width=128,
    student_steps=150, student_tokens=100_000, batch=8, learning_rate=2e-3, heldout_blocks=64,
)  # fmt: skip
SHORT = replace(
    RECIPE, vocab_size=2048, block=128, teacher_width=64, teacher_layers=2, teacher_steps=60, student_width=32,
    student_steps=30, student_tokens=30_000, heldout_blocks=16,
)  # fmt: skip
TEXT_STEPS = 300
"""Of the student at whose place gradients are compared: neither random nor the teacher."""
BUDGET = 36
"""Bytes a token at which RS-KD's paper works: 12 tokens of 3 bytes."""
OURS: tuple[Method, ...] = (
    *(TopK(k) for k in (4, 6, 8, 12, 16, 24, 32, 64, 128)),
    *(TopK(128, mass) for mass in (0.5, 0.7, 0.9, 0.99)),
    *(TopK(k, step=1 / 4) for k in (16, 32, 64, 128)),
    *(Hybrid(threshold) for threshold in (0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002)),
    *(Hybrid(threshold, step=1 / 4) for threshold in (0.05, 0.03, 0.02, 0.01)),
    *(Sampled(draws) for draws in (12, 25, 50, 100)),
    Hidden("int8"),
    Hidden("bfloat16"),
)
CACHED: tuple[Method, ...] = (TopK(32), Hybrid(0.015))
SHARDS, EXAMPLES, ROWS = 1000, 256, 128
LOOKUPS = 2000


class Rival(SparseMethod):
    """How another project stores a distribution."""

    num_levels, max_entries = 2**16, 128

    def log_weights(self, levels: Tensor) -> Tensor:
        return levels / -4096

    def bytes_per_token(self, entries: float, vocab: int) -> float:
        """Of a row that keeps so many tokens."""
        raise NotImplementedError

    def levels(self, log_weights: Tensor) -> Tensor:
        return (log_weights * -4096).round().clamp(0, 2**16 - 1).int()


@dataclass(frozen=True)
class PlainTopK(Rival):
    """The likeliest tokens, made to sum to 1, without the others' mass: int32 and float16."""

    name = "plain_top_k"
    k: int

    def keep(self, log_p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        values, ids = log_p.topk(self.k)
        return _rows(ids), ids.flatten(), self.levels(values.log_softmax(-1).half().float()).flatten(), None

    def bytes_per_token(self, entries: float, vocab: int) -> float:
        return 6 * self.k


@dataclass(frozen=True)
class RSKD(Sampled):
    """Independent draws from the teacher, each token with its count: 17 + 7 bits (arXiv:2503.16870)."""

    name = "rs_kd"

    def keep(self, log_p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        drawn = log_p.exp().multinomial(self.draws, replacement=True)
        counts = torch.zeros_like(log_p).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=log_p.dtype))
        row, ids = counts.nonzero(as_tuple=True)
        return row, ids, self.draws - counts[row, ids].int(), None

    def bytes_per_token(self, entries: float, vocab: int) -> float:
        return 3 * entries


@dataclass(frozen=True)
class DistillKit(Rival):
    """The first log-probabilities in bfloat16, a curve through the others, ids in as few bits as the vocabulary needs.

    The defaults are what its README recommends for new captures. `tail=False` is its default loss (what is missing has
    no mass, the rest is made to sum to 1), `tail=True` its `symmetric_uniform`. The curve is fitted in float64, which
    favours it.
    """

    name = "distillkit"
    k: int = 128
    exact_k: int = 16
    terms: tuple[float, ...] = (0, 1, 2, 3, 4, 0.5)
    tail: bool = False

    @property
    def has_tail(self) -> bool:
        return self.tail

    def keep(self, log_p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        values, ids = log_p.topk(self.k)
        rank = torch.arange(self.k - self.exact_k, dtype=torch.float64)
        basis = torch.stack([rank**term for term in self.terms])
        coefficients = (values[:, self.exact_k :].double() @ torch.linalg.pinv(basis)).float()
        found = torch.cat([values[:, : self.exact_k].bfloat16().double(), coefficients.double() @ basis], -1)
        rest = (1 - found.exp().sum(-1)).clamp(min=0)
        levels = self.levels(found if self.tail else found.log_softmax(-1)).flatten()
        return _rows(ids), ids.flatten(), levels, self.levels(rest.log()) if self.tail else None

    def bytes_per_token(self, entries: float, vocab: int) -> float:
        return math.ceil(self.k * math.ceil(math.log2(vocab)) / 8) + 2 * self.exact_k + 4 * len(self.terms)


def _rows(ids: Tensor) -> Tensor:
    return torch.arange(len(ids)).repeat_interleave(ids.shape[1])


BUDGET_PICK = {"k": 50, "exact_k": 1, "terms": (0, 1, 0.5)}
"""DistillKit's README calls it so."""


def heldout_sample(recipe: Recipe, corpus: Corpus, teacher: LiveTeacher, folder: Path) -> list[Sample]:
    """Batches of held-out text with the teacher's answers, and where a student of the text stands."""
    settings = replace(
        recipe, teacher_width=recipe.student_width, teacher_layers=recipe.student_layers, teacher_steps=TEXT_STEPS
    )
    student = trained_teacher(folder / "student", settings, corpus)[0].eval()
    head = LMHead.of(student, recipe.vocab_size)
    sample = []
    for start in range(0, min(16, len(corpus.heldout)), recipe.batch):
        columns = corpus.heldout[start : start + recipe.batch]
        batch = {name: torch.tensor(columns[name]) for name in ("input_ids", "labels")}
        with torch.no_grad():
            at = HiddenSignal(hidden_of_counted_rows(student, head, batch), head)
        sample.append(Sample(list(examples_of(batch)), teacher.score(batch), at))
    return sample


def measure_fidelity(recipe: Recipe, sample: Sequence[Sample]) -> dict[str, Any]:
    """Of our methods and the rivals, and whether ours keep more in fewer bytes."""
    at_budget = rs_kd_with(BUDGET / 3, sample)
    packed = rs_kd_with(BUDGET * 8 / (7 + math.ceil(math.log2(recipe.vocab_size))), sample)
    rivals: list[Any] = [
        *(PlainTopK(k) for k in (4, 6, 8, 16, 32, 64, 128)),
        *(RSKD(draws) for draws in sorted({at_budget.draws, packed.draws, 6, 12, 50, 100, 127})),
        *(DistillKit(tail=tail, **pick) for pick in ({}, BUDGET_PICK) for tail in (False, True)),
    ]
    torch.manual_seed(0)
    ours = {str(method): fidelity(method, sample, 1.0, 0) for method in OURS}
    theirs = {}
    for method in rivals:
        size = method.bytes_per_token(mean_entries(method, sample), recipe.vocab_size)
        theirs[str(method)] = fidelity(method, sample, 1.0, 0)._replace(bytes_per_token=size)
    goals = [
        goal("less error than RS-KD at 36 bytes", ours, theirs, at_budget, of_bytes=1),
        goal("less error than RS-KD at 36 bytes, were its ids packed", ours, theirs, packed, BUDGET),
        *(
            goal("half of DistillKit's bytes at its error", ours, theirs, each, of_bytes=0.5)
            for each in rivals
            if isinstance(each, DistillKit)
        ),
    ]
    as_dicts = [{name: each._asdict() for name, each in found.items()} for found in (ours, theirs)]
    rows = sum(len(part.teacher) for part in sample)
    return {"rows": rows, "ours": as_dicts[0], "rivals": as_dicts[1], "goals": goals}


def goal(
    name: str,
    ours: dict[str, Fidelity],
    theirs: dict[str, Fidelity],
    rival: SparseMethod,
    limit: float | None = None,
    *,
    of_bytes: float = 1,
) -> dict[str, Any]:
    """The truest of our methods within the bytes, and the smallest that is as true; no setting is interpolated."""
    other = theirs[str(rival)]
    limit = limit or other.bytes_per_token * of_bytes
    fitting = {name: each for name, each in ours.items() if each.bytes_per_token <= limit}
    as_true = {name: each for name, each in ours.items() if each.gradient_error <= other.gradient_error}
    best = min(fitting, key=lambda each: ours[each].gradient_error)
    smallest = min(as_true, key=lambda each: ours[each].bytes_per_token)
    return {
        "goal": name,
        "rival": str(rival),
        "limit_bytes": limit,
        "rival_bytes": other.bytes_per_token,
        "rival_error": other.gradient_error,
        "best_within": [best, ours[best].bytes_per_token, ours[best].gradient_error],
        "smallest_as_true": [smallest, ours[smallest].bytes_per_token, ours[smallest].gradient_error],
        "holds": ours[best].gradient_error < other.gradient_error,
    }


def mean_entries(method: Method, sample: Sequence[Sample]) -> float:
    counts = [keep(method, part.teacher, part.examples, 1.0, 0).counts for part in sample]
    return float(torch.cat(counts).float().mean())


def rs_kd_with(entries: float, sample: Sequence[Sample]) -> RSKD:
    """With as many draws as make so many different tokens a row, or just more."""
    torch.manual_seed(0)
    return next(method for draws in itertools.count(2) if mean_entries(method := RSKD(draws), sample) >= entries)


class Stored(Teacher):
    """A live teacher, of whom a student hears what a method would have stored."""

    def __init__(self, live: LiveTeacher, method: SparseMethod) -> None:
        self.live, self.method = live, method
        self.fit_to, self.prepare = live.fit_to, live.prepare

    def score(self, batch: Batch) -> SparseSignal:
        examples = list(examples_of(batch))
        kept = keep(self.method, self.live.score(batch), examples, 1.0, 0)
        rows = decode(self.method, [columns for _, columns in encoded(self.method, kept, examples)])
        vocab = self.live.head.vocab_size
        return SparseSignal(rows.ids, rows.log_weights, rows.log_tail, vocab, 1.0, rows.entropy)

    def describe(self) -> dict[str, Any]:
        return {"stored": describe_method(self.method)}


def train_students(recipe: Recipe, corpus: Corpus, live: LiveTeacher, folder: Path, seeds: int) -> dict[str, Any]:
    """Each teacher's students, one a seed, judged on held-out text beside the live teacher."""
    teachers: dict[str, Teacher] = {"live teacher": live}
    sizes = {}
    for method in CACHED:
        trainer = trainer_for(recipe, corpus, live, folder, seed=0)
        cache = capturing.capture(trainer, folder / f"cache-{method}", method)
        teachers[f"cache, {method}"] = CachedTeacher(cache)
        sizes[f"cache, {method}"] = cache.num_bytes / cache.num_rows
    for rival, size in ((PlainTopK(32), 192), (PlainTopK(8), 48)):
        teachers[f"live, {rival}"], sizes[f"live, {rival}"] = Stored(live, rival), size
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in teachers}
    for seed, (name, teacher) in itertools.product(range(1, seeds + 1), teachers.items()):
        trainer = trainer_for(recipe, corpus, teacher, folder, seed)
        began = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - began
        judge = trainer_for(recipe, corpus, live, folder, seed, model=trainer.model)
        figures = judge.evaluate()
        runs[name].append({"ce": figures["eval_ce"], "kl": figures["eval_kl"], "seconds": seconds})
    return {"bytes": sizes, "runs": runs, "summary": summarise(runs)}


def trainer_for(
    recipe: Recipe, corpus: Corpus, teacher: Teacher, folder: Path, seed: int, model: Any = None
) -> DistillationTrainer:
    args = make_config(folder / "distilled", recipe, recipe.student_steps, seed)
    args.eval_strategy = "no"
    model = model or make_model(recipe, recipe.student_width, recipe.student_layers, seed)
    data = {"train_dataset": corpus.short, "eval_dataset": corpus.heldout}
    return DistillationTrainer(model, teacher, args, processing_class=corpus.tokenizer, **data)


def summarise(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, Any]]:
    """Means over seeds, spreads (largest less smallest), and whether a mean is as near to the live one as its seeds."""
    rows: dict[str, dict[str, Any]] = {}
    for name, each in runs.items():
        row = rows[name] = {"seconds": statistics.fmean(run["seconds"] for run in each)}
        for figure in ("ce", "kl"):
            values = [run[figure] for run in each]
            pairs = [run[figure] - other[figure] for run, other in zip(each, runs["live teacher"], strict=True)]
            spread, gap = max(values) - min(values), statistics.fmean(pairs)
            row |= {figure: statistics.fmean(values), f"{figure}_spread": spread, f"{figure}_gap": gap}
            row[f"{figure}_within"] = abs(gap) <= rows["live teacher"][f"{figure}_spread"]
    return rows
