"""The teacher's cache: how true it is for its bytes, what a student learns from it, and what it costs in time.

    python benchmarks/cache.py --output benchmarks/results/cache_cpu
    python benchmarks/cache.py --parts time start --output benchmarks/results/cache_cpu
    python benchmarks/cache.py --short

fidelity: bytes a token against the error of the gradient, on held-out text, for our methods and for how others store
the same. The teacher is trained here once, and so is the student at whose place gradients are taken. Our bytes are
those after zstd; the others' are counted as they count them. They are written from their descriptions, as methods of
ours, so that the same code measures them; their levels of 1/4096 nat are as fine as the formats they stand for.

train: the same student from scratch with the live teacher, from caches, and from what others store.

time: a step from the cache against one of transformers' `Trainer` (cross-entropy, same student and batches), and a
capture against the teacher's forward with logits. The capture's first two batches are left out; what it takes
once, to compile and begin, is a figure of its own. Every case runs in a process of its own, in turn with the others.

start: a cache of many shards that the system has not in memory: opened, then read in random order. With `--hollow` the
middle of each shard is a hole, for caches larger than the disk: opening reads what is there, and texts are read from
the beginnings.

Parts that are not asked for stay in NAME.json and NAME.md as they were.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import in_fresh_process, machine, peak_memory
from torch import Tensor
from tqdm import tqdm

# Before transformers reads them, here and in the children.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import train_step
import transformers
from demo import Corpus, Recipe, make_config, make_model, prepare_corpus, trained_teacher

from llm_distill import CachedTeacher, DistillationTrainer, LiveTeacher, LMHead, Teacher, TeacherCache
from llm_distill.cache import Hidden, Hybrid, Sampled, TopK, manifest, store
from llm_distill.cache.codec import decode, encode
from llm_distill.cache.methods import Entries, Method, SelectedTokens, SparseMethod, describe_method, make_method
from llm_distill.cache.select import encode_examples, select
from llm_distill.cache.store import ShardWriter
from llm_distill.capture import run as capturing
from llm_distill.capture.fidelity import Fidelity, Sample, fidelity, plot
from llm_distill.models import HEAD, Needs, kept_of
from llm_distill.rows import KEY_BYTES, View, examples_of
from llm_distill.signals import HiddenSignal, SparseSignal

Table = dict[str, dict[str, Any]]
"""Rows by name, of figures by name."""
RECIPE = Recipe(vocab_size=16384, block=256, teacher_width=256, teacher_layers=4, teacher_steps=700, batch=8)
RECIPE = replace(RECIPE, student_width=128, student_steps=150, learning_rate=2e-3, heldout_blocks=64)
SHORT = replace(RECIPE, vocab_size=2048, teacher_width=64, teacher_steps=30, student_steps=15, student_tokens=20_000)
TEXT_STEPS = 300
"""Of the student at whose place gradients are compared: neither random nor the teacher."""
FIDELITY_BLOCKS = 16
OURS: tuple[Method, ...] = (
    *(TopK(k) for k in (2, 4, 8, 10, 16, 20, 24, 32, 64, 128, 256)),
    *(TopK(128, mass) for mass in (0.5, 0.7, 0.9)),
    *(TopK(512, threshold=threshold, step=1 / 64) for threshold in (0.01, 0.005, 0.003, 0.002, 0.001, 0.00065, 0.0006)),
    *(TopK(k, step=step) for k in (32, 128) for step in (1 / 32, 1 / 64, 1 / 255)),
    *(Hybrid(threshold) for threshold in (0.2, 0.1, 0.05, 0.03, 0.026, 0.02, 0.017, 0.01, 0.005, 0.002)),
    *(Hybrid(threshold, step=step) for threshold in (0.03, 0.01) for step in (1 / 16, 1 / 128)),
    *(Sampled(draws) for draws in (12, 40, 50, 100)),
    Hidden("int8"),
    Hidden("bfloat16"),
)
CACHED: tuple[SparseMethod, ...] = (TopK(32), Hybrid(0.017))
RS_KD_BYTES = 36
"""What its paper stores a token: 12 tokens of 3 bytes."""
START, LOOKUPS = (1000, 256, 128), 2000
KEPT_BYTES = 2**21
"""Of a hollow shard, at each end."""


class Rival(SparseMethod):
    """How another project stores a distribution."""

    num_levels, max_entries, step = 2**16, 128, 1 / 4096

    def select(
        self, scores: Tensor, log_total: Tensor, uniform: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        ids, log_weights, log_tail = self.stored(scores.float() - log_total[:, None])
        row = torch.arange(len(ids)).repeat_interleave(ids.shape[1])
        return (
            row,
            ids.flatten(),
            self.levels(log_weights).flatten(),
            None if log_tail is None else self.levels(log_tail),
        )

    def levels(self, log_weights: Tensor) -> Tensor:
        return (log_weights.double() / -self.step).round().clamp(0, 2**16 - 1).int()

    def log_weights(self, levels: Tensor) -> Tensor:
        return (levels * -self.step).masked_fill(levels == 2**16 - 1, -torch.inf)

    log_tail, num_tail_levels = log_weights, num_levels


@dataclass(frozen=True)
class PlainTopK(Rival):
    """The likeliest tokens, made to sum to 1, without the others' mass: int32 and float16."""

    k: int

    def stored(self, log_p: Tensor) -> tuple[Tensor, Tensor, None]:
        values, ids = log_p.topk(self.k)
        return ids, values.log_softmax(-1).half(), None

    def size(self, entries: float, vocab: int) -> float:
        return 6 * self.k


@dataclass(frozen=True)
class RSKD(Sampled):
    """Independent draws from the teacher, each token with its count: 17 + 7 bits (arXiv:2503.16870)."""

    bits: int = 24

    def select(self, scores: Tensor, log_total: Tensor, uniform: Tensor) -> Entries:
        drawn = (scores - log_total[:, None]).exp().multinomial(self.draws, replacement=True).sort(-1).values
        row = torch.arange(len(drawn))[:, None].expand_as(drawn)
        (row, ids), counts = torch.stack([row, drawn]).flatten(1).unique_consecutive(dim=1, return_counts=True)
        return row, ids, self.draws - counts.int(), None

    def size(self, entries: float, vocab: int) -> float:
        return entries * self.bits / 8


@dataclass(frozen=True)
class DistillKit(Rival):
    """The first log-probabilities in bfloat16, a curve through the others, ids in as few bits as the vocabulary needs.

    The defaults are those that its README recommends. `tail=False` is its default loss (what is missing has no mass,
    the rest is made to sum to 1), `tail=True` its `symmetric_uniform`. Fitted in float64, which favours it.
    """

    k: int = 128
    exact_k: int = 16
    terms: tuple[float, ...] = (0, 1, 2, 3, 4, 0.5)
    tail: bool = False

    @property
    def has_tail(self) -> bool:
        return self.tail

    def stored(self, log_p: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        values, ids = log_p.topk(self.k)
        rank = torch.arange(self.k - self.exact_k, dtype=torch.float64)
        basis = torch.stack([rank**term for term in self.terms])
        coefficients = (values[:, self.exact_k :].double() @ torch.linalg.pinv(basis)).float()
        log_p = torch.cat([values[:, : self.exact_k].bfloat16().double(), coefficients.double() @ basis], -1)
        if self.tail:
            return ids, log_p, (1 - log_p.exp().sum(-1)).clamp(min=0).log()
        return ids, log_p.log_softmax(-1), None

    def size(self, entries: float, vocab: int) -> float:
        return math.ceil(self.k * math.ceil(math.log2(vocab)) / 8) + 2 * self.exact_k + 4 * len(self.terms)


def size_of(rival: Any, sample: Sequence[Sample]) -> float:
    """Bytes a token."""
    torch.manual_seed(0)
    counts = torch.cat([select(rival, part.teacher, part.examples, 1.0, 0).counts for part in sample])
    return rival.size(float(counts.float().mean()), sample[0].teacher.vocab_size)


def rs_kd_of(bits: int, sample: Sequence[Sample]) -> RSKD:
    """With as many draws as take its paper's bytes, or just more."""
    methods = (RSKD(draws, bits) for draws in itertools.count(RS_KD_BYTES * 8 // bits))
    return next(method for method in methods if size_of(method, sample) >= RS_KD_BYTES)


def measure_fidelity(recipe: Recipe, corpus: Corpus, teacher: LiveTeacher, folder: Path) -> dict[str, Table]:
    """Of our methods and the rivals, and whether ours are as true in fewer bytes."""
    sample = heldout_sample(recipe, corpus, teacher, folder)
    rs_kd = [rs_kd_of(bits, sample) for bits in (24, 7 + math.ceil(math.log2(recipe.vocab_size)))]  # or ids packed
    budget_pick = {"k": 50, "exact_k": 1, "terms": (0, 1, 0.5)}  # as its README calls it
    distillkit = [DistillKit(**pick, tail=tail) for pick in ({}, budget_pick) for tail in (False, True)]
    rivals = [*map(PlainTopK, (4, 6, 8, 16, 32, 64, 128)), *map(RSKD, (6, 12, 50, 127)), *rs_kd, *distillkit]
    ours = {method: fidelity(method, sample, 1.0, 0) for method in OURS}
    of_rivals = {r: fidelity(r, sample, 1.0, 0)._replace(bytes_per_token=size_of(r, sample)) for r in rivals}
    fair = {method: value for method, value in ours.items() if isinstance(method, Hybrid | Sampled)}
    sparse = {method: value for method, value in ours.items() if isinstance(method, SparseMethod)}
    goals = {
        **{f"{RS_KD_BYTES} bytes: {r}": goal(sparse, of_rivals[r], RS_KD_BYTES) for r in rs_kd},
        **{f"{RS_KD_BYTES} bytes, unbiased: {r}": goal(fair, of_rivals[r], RS_KD_BYTES) for r in rs_kd},
        **{f"half the bytes: {r}": goal(sparse, of_rivals[r], of_rivals[r].bytes_per_token / 2) for r in distillkit},
    }
    return {"Our methods": as_rows(ours), "Rivals": as_rows(of_rivals), "As true as": goals}


def goal(ours: dict[Any, Fidelity], other: Fidelity, limit: float) -> dict[str, Any]:
    """Whether one of ours within the bytes is as true as the other; no setting is interpolated."""
    best = min((m for m in ours if ours[m].bytes_per_token <= limit), key=lambda m: ours[m].gradient_error)
    as_true = [m for m in ours if ours[m].gradient_error <= other.gradient_error]
    least = min(as_true, key=lambda m: ours[m].bytes_per_token, default=None)
    return {
        "its bytes": other.bytes_per_token,
        "its error": other.gradient_error,
        "holds": ours[best].gradient_error <= other.gradient_error,
        "our truest within": str(best),
        "bytes": ours[best].bytes_per_token,
        "error": ours[best].gradient_error,
        "our smallest as true": str(least),
        "of its bytes": ours[least].bytes_per_token / other.bytes_per_token if least else None,
    }


def as_rows(measured: dict[Any, Fidelity]) -> Table:
    return {str(method): value._asdict() for method, value in measured.items()}


def heldout_sample(recipe: Recipe, corpus: Corpus, teacher: LiveTeacher, folder: Path) -> list[Sample]:
    """Held-out text, the teacher's answers, and where a student stands that has learned from the text alone."""
    width, layers, steps = recipe.student_width, recipe.student_layers, min(TEXT_STEPS, recipe.teacher_steps)
    recipe = replace(recipe, teacher_width=width, teacher_layers=layers, teacher_steps=steps)
    student = trained_teacher(folder / "text_student", recipe, corpus)[0].eval()
    head, sample = LMHead.of(student, recipe.vocab_size), []
    for start in range(0, FIDELITY_BLOCKS, recipe.batch):
        columns = corpus.heldout[start : start + recipe.batch]
        batch = {name: torch.tensor(columns[name]) for name in ("input_ids", "labels")}
        with torch.no_grad():
            view = View.of(batch)
            place = HiddenSignal(*kept_of(student, head, view))
        sample.append(Sample(list(examples_of(view)), teacher.score(view), place))
    return sample


class Stored(Teacher):
    """A live teacher, of whom a student hears what a rival would have stored."""

    def __init__(self, live: LiveTeacher, method: SparseMethod) -> None:
        self.live, self.method = live, method
        self.fit_to, self.prepare = live.fit_to, live.prepare

    def score(self, view: View, needs: Needs = HEAD) -> SparseSignal:
        examples, live = list(examples_of(view)), self.live.score(view)
        selected = select(self.method, live, examples, 1.0, 0)
        rows = decode(self.method, [columns for _, columns in encode_examples(self.method, selected, examples)])
        return SparseSignal(rows.ids, rows.log_weights, rows.log_tail, live.vocab_size, 1.0, rows.entropy)

    def describe(self) -> dict[str, Any]:
        return {"stored": str(self.method)}


def measure_training(recipe: Recipe, corpus: Corpus, live: LiveTeacher, folder: Path, seeds: int) -> dict[str, Table]:
    """Students of each teacher, one a seed, judged on held-out text beside the live one."""

    def trainer_of(teacher: Teacher, seed: int, model: Any = None) -> DistillationTrainer:
        args = make_config(folder / "student", recipe, recipe.student_steps, seed)
        args.eval_strategy = "no"
        model = model or make_model(recipe, recipe.student_width, recipe.student_layers, seed)
        data = {"train_dataset": corpus.short, "eval_dataset": corpus.heldout}
        return DistillationTrainer(model, teacher, args, processing_class=corpus.tokenizer, **data)

    teachers: dict[str, Teacher] = {"live teacher": live}
    for method in CACHED:
        cache = capturing.capture(live, trainer_of(live, 0).data, folder / str(method), method)
        teachers[f"cache, {method}: {cache.num_bytes / cache.num_rows:.1f} bytes"] = CachedTeacher(cache)
    teachers |= {f"top-{k} without tail: {6 * k} bytes": Stored(live, PlainTopK(k)) for k in (32, 8)}
    results: dict[str, list[dict[str, float]]] = {name: [] for name in teachers}
    for seed, name in itertools.product(range(1, seeds + 1), teachers):
        trainer = trainer_of(teachers[name], seed)
        trainer.train()
        results[name].append(trainer_of(live, seed, trainer.model).evaluate())
        print(f"seed {seed}, {name}: KL {results[name][-1]['eval_kl']:.4f}", flush=True)
    rows: Table = {name: {} for name in teachers}
    for figure, (name, runs) in itertools.product(("ce", "kl"), results.items()):
        values, lives = ([run[f"eval_{figure}"] for run in those] for those in (runs, results["live teacher"]))
        spread, gap = max(lives) - min(lives), statistics.fmean(values) - statistics.fmean(lives)
        rows[name] |= {figure: statistics.fmean(values), f"{figure} by seed": values, f"{figure} over live": gap}
        rows[name][f"{figure} within live's spread"] = f"{abs(gap) <= spread} ({spread:.4f})"
    return {"Students": rows}


def seconds_a_batch(task: dict[str, Any], folder: str) -> list[float]:
    """One case, in this process; of a capture also how much longer than that its first batches take, all together: it
    compiles, allocates and opens files, once. What a trainer does before its first batch is not in it.
    """
    case, _, method = task["case"].partition(", ")
    if case == "Trainer step":
        return [step_seconds(train_step.trainer_of({**task, "trainer": "hf"}, folder))]
    teacher, batches = train_step.build(task, "teacher").eval(), task["steps"] + train_step.LEFT_OUT
    inputs = train_step.tokens(task, batches * 8).split(8)
    with torch.no_grad():
        teacher(input_ids=inputs[0], use_cache=False)  # warms up
        if case == "teacher's forward":
            began = time.perf_counter()
            for ids in inputs:
                _ = teacher(input_ids=ids, use_cache=False).logits
            return [(time.perf_counter() - began) / batches]
    live = LiveTeacher(teacher, train_step.tokenizer_of(train_step.SIZES[task["size"]]["vocab"]))
    trainer = our_trainer(task, live, folder)
    starts, score = [], capturing.score_view

    def clocked(*of: Any) -> Any:
        starts.append(time.perf_counter())
        return score(*of)

    # No estimate, which takes three batches however many there are.
    with mock.patch.object(capturing, "_estimate"), mock.patch.object(capturing, "score_view", clocked):
        began = time.perf_counter()
        cache = capturing.capture(trainer.teacher, trainer.data, f"{folder}/cache", make_method(method))
        ended, counted = time.perf_counter(), starts[train_step.LEFT_OUT]  # to the end, with all that is written last
    if case == "capture":
        seconds = (ended - counted) / task["steps"]
        return [seconds, counted - began - train_step.LEFT_OUT * seconds]
    return [step_seconds(our_trainer(task, CachedTeacher(cache), folder))]


def our_trainer(task: dict[str, Any], teacher: Teacher, folder: str) -> transformers.Trainer:
    """That of train_step.py, with this teacher in place of the one that it makes up."""
    with mock.patch.object(train_step, "PrecomputedTeacher", return_value=teacher):
        return train_step.trainer_of({**task, "trainer": "ours", "teacher": "sparse"}, folder)


def step_seconds(trainer: transformers.Trainer) -> float:
    clock = train_step.StepTimes("cpu")
    trainer.add_callback(clock)
    trainer.train()
    return statistics.median(clock.seconds[train_step.LEFT_OUT :])


def measure_time(steps: int, rounds: int) -> dict[str, Table]:
    """Every case's seconds a batch, and medians of the ratios within a round."""
    pairs = {}
    for method in (TopK.name, Hybrid.name):
        pairs |= {
            f"step from the cache / Trainer step, at most 1.05, {method}": (f"step, {method}", "Trainer step"),
            f"capture's throughput / the forward's, at least 0.95, {method}": (
                "teacher's forward",
                f"capture, {method}",
            ),
        }
    cases: dict[str, list[float]] = {case: [] for pair in pairs.values() for case in pair}
    starts: list[float] = []
    for _, case in itertools.product(range(rounds), cases):
        seconds, *start = child(case=case, device="cpu", size="small", steps=steps)
        cases[case].append(seconds)
        starts += start
    cases |= {name: [a / b for a, b in zip(*map(cases.get, pair), strict=True)] for name, pair in pairs.items()}
    cases["capture: seconds at its start, once"] = starts
    return {"Seconds a batch": {name: {"median": statistics.median(v), "by round": v} for name, v in cases.items()}}


def child(**task: Any) -> Any:
    result = in_fresh_process(__file__, task)
    if isinstance(result, dict) and "error" in result:
        raise RuntimeError(f"{task}: {result['error']}")
    return result


def measure_start(folder: Path, shards: int, texts: int, tokens: int, hollow: bool) -> dict[str, Table]:
    """Of a cache made up for it, in a fresh process, first from the disk and then from memory."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        with mock.patch.object(store, "ZSTD_LEVEL", 1):  # random bytes do not get smaller
            write_shards(Path(made), shards, texts, tokens, hollow)
        files = list(Path(made).glob("shard-*"))
        for file in files:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        size = sum(file.stat().st_size for file in files) / 1e9
        title = f"{shards:,} shards of {texts:,} texts of {tokens} tokens, {size:.2f} GB{', hollow' * hollow}"
        return {title: {name: child(open=made, hollow=hollow) for name in ("from disk", "from memory")}}


def write_shards(folder: Path, shards: int, texts: int, tokens: int, hollow: bool) -> None:
    """Of random tokens; every shard has the same under other keys."""
    method, shape = TopK(32), (tokens, 32)
    fields = {"teacher": {}, "tokenizer": {}, "vocab_size": 32_000, "temperature": 1.0, "seed": None, "data": {}}
    manifest.write_manifest(folder, {**fields, "method": describe_method(method)})
    counts, tail, packed = torch.full((tokens,), 32), torch.zeros(tokens), []
    for _ in range(texts):
        ids, levels = torch.randint(32_000, shape), torch.rand(shape).mul(method.num_levels - 1).int()
        packed.append(encode(method, SelectedTokens(counts, ids.flatten(), levels.flatten(), tail, tail)))
    identity = TeacherCache(folder).identity
    for _ in tqdm(range(shards), desc="Making shards"):
        writer = ShardWriter(folder, method, identity)
        for columns in packed:
            writer.add(os.urandom(KEY_BYTES), tokens, columns)
        name = writer.close()
        if hollow:
            made = folder / str(name)
            length = made.stat().st_size - 2 * KEPT_BYTES
            if length <= 0:
                raise ValueError("--hollow needs larger shards, as of --start 2500 2048 256.")
            subprocess.run(["fallocate", "-p", "-o", str(KEPT_BYTES), "-l", str(length), str(made)], check=True)


def open_cache(path: str, hollow: bool) -> dict[str, float]:
    with peak_memory("cpu") as memory:
        began = time.perf_counter()
        cache = TeacherCache(path)
        seconds = time.perf_counter() - began
    shards = random.choices(cache.shards, k=LOOKUPS)
    keys = [random.choice(s.keys[: s.group_starts[1] if hollow else None]).tobytes() for s in shards]
    began = time.perf_counter()
    for key in keys:
        decode(cache.method, [cache.load(key)])
    rate = LOOKUPS / (time.perf_counter() - began)
    return {"seconds to open": seconds, "memory, MiB": memory["mib"], "texts read a second": rate}


def as_markdown(table: Table) -> str:
    names = list(next(iter(table.values())))
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---:|" * len(names)]
    lines += ["| " + " | ".join([name, *map(in_words, row.values())]) + " |" for name, row in table.items()]
    return "\n".join(lines)


def in_words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(in_words, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def measure(part: str, args: argparse.Namespace) -> dict[str, Table]:
    if part == "time":
        return measure_time(args.steps, args.rounds)
    recipe, folder = (SHORT, args.folder / "short") if args.short else (RECIPE, args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if part == "start":
        shards, texts, tokens = args.start
        return measure_start(folder, 20 if args.short else shards, texts, tokens, args.hollow)
    corpus = prepare_corpus(recipe)
    live = LiveTeacher(trained_teacher(folder / "teacher", recipe, corpus)[0], corpus.tokenizer)
    if part == "fidelity":
        return measure_fidelity(recipe, corpus, live, folder)
    return measure_training(recipe, corpus, live, folder, args.seeds)


def main() -> None:
    parts = ("fidelity", "train", "time", "start")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--seeds", type=int, default=3, help="students of each teacher; default: %(default)s")
    parser.add_argument("--steps", type=int, default=16, help=f"batches timed, after {train_step.LEFT_OUT} others")
    parser.add_argument("--rounds", type=int, default=3, help="how often every timed case gets a fresh process")
    shape = ("SHARDS", "TEXTS", "TOKENS")
    parser.add_argument("--start", type=int, nargs=3, metavar=shape, default=START, help="of the cache to be opened")
    parser.add_argument("--hollow", action="store_true", help="of that cache, leave the middle of each shard out")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/cache"), help="for teacher, students, caches")
    parser.add_argument("--short", action="store_true", help="everything small: under a minute")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json, NAME.md and NAME.png")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        with tempfile.TemporaryDirectory(prefix="cache_") as folder:
            is_open = "open" in args.task
            result = (
                open_cache(args.task["open"], args.task["hollow"]) if is_open else seconds_a_batch(args.task, folder)
            )
        print(json.dumps(result))
        return
    if args.short:
        args.seeds, args.steps, args.rounds = 1, 1, 1
    target = args.output and args.output.with_suffix(".json")
    whole = json.loads(target.read_text()) if target and target.is_file() else {}
    for part in args.parts:
        tables = measure(part, args)
        print("\n\n".join(f"{title}\n\n{as_markdown(table)}" for title, table in tables.items()), flush=True)
        whole[part] = {"machine": machine("cpu"), "tables": tables}
        if target:
            write(whole, target)


def write(whole: dict[str, Any], target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(whole, indent=1) + "\n")
    lines = ["# The teacher's cache"]
    for part, result in whole.items():
        about = result["machine"]
        where = f"{about['date']}, {about['device']}, {about['threads']} threads. `{about['command']}`"
        lines += [f"## {part}", where]
        lines += [f"{title}:\n\n{as_markdown(table)}" for title, table in result["tables"].items()]
    target.with_suffix(".md").write_text("\n\n".join(lines) + "\n")
    if "fidelity" in whole:
        both = [whole["fidelity"]["tables"][title] for title in ("Our methods", "Rivals")]
        plot(target.with_suffix(".png"), {name: Fidelity(**row) for table in both for name, row in table.items()})


if __name__ == "__main__":
    main()
