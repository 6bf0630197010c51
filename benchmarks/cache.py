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
capture against the teacher's forward with logits. Every case runs in a process of its own, in turn with the others.

start: a cache of many shards that the system has not in memory: opened, then read in random order.

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

# Before transformers reads them, here and in the children.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).parents[1] / "recipes"))

import train_step
import transformers
from demo import Corpus, Recipe, make_config, make_model, prepare_corpus, trained_teacher

from llm_distill import CachedTeacher, DistillationTrainer, LiveTeacher, LMHead, Teacher, TeacherCache
from llm_distill import capture as capturing
from llm_distill.cache import Hidden, Hybrid, Sampled, TopK, manifest
from llm_distill.cache.codec import decode, encode
from llm_distill.cache.fidelity import Fidelity, Sample, as_table, fidelity
from llm_distill.cache.keys import KEY_BYTES, examples_of
from llm_distill.cache.methods import Kept, Method, SparseMethod, describe_method
from llm_distill.cache.record import encoded, keep
from llm_distill.cache.store import ShardWriter
from llm_distill.signals import HiddenSignal, SparseSignal
from llm_distill.teachers import Batch
from llm_distill.teachers.live import hidden_of_counted_rows

RECIPE = Recipe(vocab_size=16384, block=256, teacher_width=256, teacher_layers=4, teacher_steps=700, batch=8)
RECIPE = replace(RECIPE, student_width=128, student_steps=150, learning_rate=2e-3, heldout_blocks=64)
SHORT = replace(RECIPE, vocab_size=2048, teacher_width=64, teacher_steps=40, student_steps=20, student_tokens=20_000)
TEXT_STEPS = 300
"""Of the student at whose place gradients are compared: neither random nor the teacher."""
FIDELITY_BLOCKS = 16
BUDGET = 36
"""Bytes a token of RS-KD's paper: 12 tokens of 3 bytes."""
OURS: tuple[Method, ...] = (
    *(TopK(k) for k in (4, 6, 8, 12, 16, 24, 32, 64, 128)),
    *(TopK(128, mass) for mass in (0.5, 0.7, 0.9, 0.99)),
    *(TopK(k, step=1 / 4) for k in (16, 24, 32, 64, 128)),
    *(Hybrid(threshold) for threshold in (0.2, 0.1, 0.05, 0.03, 0.02, 0.01, 0.005, 0.002)),
    *(Hybrid(threshold, step=1 / 4) for threshold in (0.05, 0.03, 0.02, 0.01)),
    *(Sampled(draws) for draws in (12, 25, 50, 100)),
    Hidden("int8"),
    Hidden("bfloat16"),
)
CACHED: tuple[SparseMethod, ...] = (TopK(32), Hybrid(0.02))
RATIOS = {
    "step from the cache / Trainer step": ("step from the cache", "Trainer step", "at most 1.05"),
    "capture's throughput / teacher's forward": ("teacher's forward", "capture", "at least 0.95"),
}
"""Of the seconds of two cases, and the goal."""
SHARDS, EXAMPLES, ROWS, LOOKUPS = 1000, 256, 128, 2000


class Rival(SparseMethod):
    """How another project stores a distribution."""

    num_levels, max_entries = 2**16, 128

    def log_weights(self, levels: Tensor) -> Tensor:
        return levels / -4096

    def levels(self, log_weights: Tensor) -> Tensor:
        return (log_weights * -4096).round().clamp(0, 2**16 - 1).int()


@dataclass(frozen=True)
class PlainTopK(Rival):
    """The likeliest tokens, made to sum to 1, without the others' mass: int32 and float16."""

    k: int

    def keep(self, log_p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        values, ids = log_p.topk(self.k)
        return rows_of(ids), ids.flatten(), self.levels(values.log_softmax(-1).half().float()).flatten(), None

    def size(self, entries: float, vocab: int) -> float:
        return 6 * self.k


@dataclass(frozen=True)
class RSKD(Sampled):
    """Independent draws from the teacher, each token with its count: 17 + 7 bits (arXiv:2503.16870)."""

    bits: int = 24

    def keep(self, log_p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        drawn = log_p.exp().multinomial(self.draws, replacement=True)
        counts = torch.zeros_like(log_p).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=log_p.dtype))
        row, ids = counts.nonzero(as_tuple=True)
        return row, ids, self.draws - counts[row, ids].int(), None

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

    def keep(self, log_p: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        values, ids = log_p.topk(self.k)
        rank = torch.arange(self.k - self.exact_k, dtype=torch.float64)
        basis = torch.stack([rank**term for term in self.terms])
        coefficients = (values[:, self.exact_k :].double() @ torch.linalg.pinv(basis)).float()
        found = torch.cat([values[:, : self.exact_k].bfloat16().double(), coefficients.double() @ basis], -1)
        rest = self.levels((1 - found.exp().sum(-1)).clamp(min=0).log()) if self.tail else None
        return rows_of(ids), ids.flatten(), self.levels(found if self.tail else found.log_softmax(-1)).flatten(), rest

    def size(self, entries: float, vocab: int) -> float:
        return math.ceil(self.k * math.ceil(math.log2(vocab)) / 8) + 2 * self.exact_k + 4 * len(self.terms)


def rows_of(ids: Tensor) -> Tensor:
    return torch.arange(len(ids)).repeat_interleave(ids.shape[1])


def rs_kd_of(size: float, bits: int, sample: Sequence[Sample]) -> RSKD:
    """With as many draws as take these bytes a row, or just more."""
    return next(each for draws in itertools.count(2) if size_of(each := RSKD(draws, bits), sample) >= size)


def size_of(rival: Any, sample: Sequence[Sample]) -> float:
    """Bytes a token."""
    torch.manual_seed(0)
    counts = torch.cat([keep(rival, part.teacher, part.examples, 1.0, 0).counts for part in sample])
    return rival.size(float(counts.float().mean()), sample[0].teacher.vocab_size)


def measure_fidelity(recipe: Recipe, corpus: Corpus, teacher: LiveTeacher, folder: Path) -> dict[str, Any]:
    """Of our methods and the rivals, and whether ours are truer in fewer bytes; no setting is interpolated."""
    sample = heldout_sample(recipe, corpus, teacher, folder)
    rs_kd = [rs_kd_of(BUDGET, bits, sample) for bits in (24, 7 + math.ceil(math.log2(recipe.vocab_size)))]
    budget_pick = {"k": 50, "exact_k": 1, "terms": (0, 1, 0.5)}  # as its README calls it
    distillkit = [DistillKit(**pick, tail=tail) for tail in (False, True) for pick in ({}, budget_pick)]
    rivals = [*map(PlainTopK, (4, 6, 8, 16, 32, 64, 128)), *map(RSKD, (6, 12, 50, 100, 127)), *rs_kd, *distillkit]
    ours = {str(method): fidelity(method, sample, 1.0, 0) for method in OURS}
    theirs = {}
    for rival in rivals:
        theirs[str(rival)] = fidelity(rival, sample, 1.0, 0)._replace(bytes_per_token=size_of(rival, sample))
    goals = [(f"less error than RS-KD at {BUDGET} bytes", rival, BUDGET) for rival in rs_kd]
    goals += [("DistillKit's error at half its bytes", each, theirs[str(each)].bytes_per_token / 2) for each in distillkit]
    verdicts = []
    for name, rival, limit in goals:
        other = theirs[str(rival)]
        within = [each for each in ours if ours[each].bytes_per_token <= limit]
        as_true = [each for each in ours if ours[each].gradient_error <= other.gradient_error]
        best = min(within, key=lambda each: ours[each].gradient_error)
        least = min(as_true, key=lambda each: ours[each].bytes_per_token)
        figures = {"theirs": str(rival), "best of ours within": best, "smallest of ours as true": least}
        holds = ours[best].gradient_error <= other.gradient_error
        verdicts.append({"goal": name, "limit": limit, "holds": holds, **figures})
    return {"rows": sum(len(part.teacher) for part in sample), "ours": ours, "rivals": theirs, "goals": verdicts}


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
            place = HiddenSignal(hidden_of_counted_rows(student, head, batch), head)
        sample.append(Sample(list(examples_of(batch)), teacher.score(batch), place))
    return sample


class Stored(Teacher):
    """A live teacher, of whom a student hears what a rival would have stored."""

    def __init__(self, live: LiveTeacher, method: SparseMethod) -> None:
        self.live, self.method = live, method
        self.fit_to, self.prepare = live.fit_to, live.prepare

    def score(self, batch: Batch) -> SparseSignal:
        examples, live = list(examples_of(batch)), self.live.score(batch)
        kept = keep(self.method, live, examples, 1.0, 0)
        rows = decode(self.method, [columns for _, columns in encoded(self.method, kept, examples)])
        return SparseSignal(rows.ids, rows.log_weights, rows.log_tail, live.vocab_size, 1.0, rows.entropy)

    def describe(self) -> dict[str, Any]:
        return {"stored": str(self.method)}


def measure_training(
    recipe: Recipe, corpus: Corpus, live: LiveTeacher, folder: Path, seeds: int
) -> dict[str, dict[str, Any]]:
    """Students of each teacher, one a seed, judged on held-out text beside the live one: means and spreads."""
    teachers: dict[str, tuple[Teacher, float | None]] = {"live teacher": (live, None)}
    for method in CACHED:
        cache = capturing.capture(trainer_of(recipe, corpus, live, folder, 0), folder / str(method), method)
        teachers[f"cache, {method}"] = (CachedTeacher(cache), cache.num_bytes / cache.num_rows)
    for k in (32, 8):
        teachers[f"top-{k} without tail"] = (Stored(live, PlainTopK(k)), PlainTopK(k).size(k, recipe.vocab_size))
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in teachers}
    for seed, name in itertools.product(range(1, seeds + 1), teachers):
        trainer = trainer_of(recipe, corpus, teachers[name][0], folder, seed)
        trainer.train()
        found = trainer_of(recipe, corpus, live, folder, seed, trainer.model).evaluate()
        runs[name].append({"ce": found["eval_ce"], "kl": found["eval_kl"]})
    rows: dict[str, dict[str, Any]] = {}
    for name, each in runs.items():
        row = rows[name] = {"bytes": teachers[name][1], "runs": each}
        for figure in ("ce", "kl"):
            values, lives = ([run[figure] for run in those] for those in (each, runs["live teacher"]))
            row[figure], row[f"{figure}_spread"] = statistics.fmean(values), max(values) - min(values)
            row[f"{figure}_gap"] = row[figure] - statistics.fmean(lives)
            row[f"{figure}_within"] = abs(row[f"{figure}_gap"]) <= max(lives) - min(lives)
    return rows


def trainer_of(
    recipe: Recipe, corpus: Corpus, teacher: Teacher, folder: Path, seed: int, model: Any = None
) -> DistillationTrainer:
    args = make_config(folder / "student", recipe, recipe.student_steps, seed)
    args.eval_strategy = "no"
    data = {"train_dataset": corpus.short, "eval_dataset": corpus.heldout, "processing_class": corpus.tokenizer}
    return DistillationTrainer(
        model or make_model(recipe, recipe.student_width, recipe.student_layers, seed), teacher, args, **data
    )


def seconds_a_batch(task: dict[str, Any], folder: str) -> dict[str, float]:
    """One case, in this process. What a trainer does before its first batch is not in it."""
    if task["case"] == "Trainer step":
        return step_seconds(train_step.trainer_of({**task, "trainer": "hf"}, folder))
    teacher, batches = train_step.build(task, "teacher").eval(), task["steps"] + train_step.LEFT_OUT
    inputs = train_step.tokens(task, batches * 8).split(8)
    with torch.no_grad():
        teacher(input_ids=inputs[0], use_cache=False)  # warms up
        began = time.perf_counter()
        for ids in inputs if task["case"] == "teacher's forward" else ():
            _ = teacher(input_ids=ids, use_cache=False).logits
        if task["case"] == "teacher's forward":
            return {"seconds": (time.perf_counter() - began) / batches}
    live = LiveTeacher(teacher, train_step.tokenizer_of(train_step.SIZES[task["size"]]["vocab"]))
    with mock.patch.object(capturing, "_estimate"):  # a few batches more, however many there are
        trainer = our_trainer(task, live, folder)
        began = time.perf_counter()
        cache = capturing.capture(trainer, f"{folder}/cache", TopK(32))
        seconds = (time.perf_counter() - began) / batches
    if task["case"] == "capture":
        return {"seconds": seconds}
    return step_seconds(our_trainer(task, CachedTeacher(cache), folder))


def our_trainer(task: dict[str, Any], teacher: Teacher, folder: str) -> transformers.Trainer:
    """That of train_step.py, with this teacher in place of the one that it makes up."""
    with mock.patch.object(train_step, "PrecomputedTeacher", lambda *_: teacher):
        return train_step.trainer_of({**task, "trainer": "ours", "teacher": "sparse"}, folder)


def step_seconds(trainer: transformers.Trainer) -> dict[str, float]:
    clock = train_step.StepTimes("cpu")
    trainer.add_callback(clock)
    trainer.train()
    return {"seconds": statistics.median(clock.seconds[train_step.LEFT_OUT :])}


def measure_time(steps: int, rounds: int) -> dict[str, Any]:
    """Every case's seconds a batch, and medians of the ratios within a round."""
    cases: dict[str, list[float]] = {case: [] for pair in RATIOS.values() for case in pair[:2]}
    for _, case in itertools.product(range(rounds), cases):
        cases[case].append(child(case=case, device="cpu", size="small", steps=steps)["seconds"])
    ratios = {}
    for name, (over, under, aim) in RATIOS.items():
        by_round = [a / b for a, b in zip(cases[over], cases[under], strict=True)]
        ratios[name] = {"ratio": statistics.median(by_round), "by_round": by_round, "goal": aim}
    return {"seconds": cases, "ratios": ratios}


def child(**task: Any) -> dict[str, Any]:
    result = in_fresh_process(__file__, task)
    if "error" in result:
        raise RuntimeError(f"{task}: {result['error']}")
    return result


def measure_start(folder: Path, shards: int) -> dict[str, Any]:
    """Of a cache made up for it, in a fresh process, first from the disk and then from memory."""
    with tempfile.TemporaryDirectory(dir=folder) as made:
        write_shards(Path(made), shards)
        files = list(Path(made).glob("shard-*"))
        for file in files:
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        about = {"shards": shards, "texts": shards * EXAMPLES, "gigabytes": sum(f.stat().st_size for f in files) / 1e9}
        return about | {"from disk": child(open=made), "again": child(open=made)}


def write_shards(folder: Path, shards: int) -> None:
    """Of random tokens; every shard has the same under other keys."""
    method, shape = TopK(32), (ROWS, 32)
    said = {"teacher": {}, "tokenizer": {}, "vocab_size": 32_000, "temperature": 1.0, "seed": None, "data": {}}
    manifest.write_manifest(folder, {**said, "method": describe_method(method)})
    counts, tail = torch.full((ROWS,), 32), torch.zeros(ROWS)
    texts = []
    for _ in range(EXAMPLES):
        ids, levels = torch.randint(32_000, shape), torch.rand(shape).mul(method.num_levels - 1).int()
        texts.append(encode(method, Kept(counts, ids.flatten(), levels.flatten(), tail, tail)))
    identity = TeacherCache(folder).identity
    for _ in range(shards):
        writer = ShardWriter(folder, method, identity)
        for columns in texts:
            writer.add(os.urandom(KEY_BYTES), ROWS, columns)
        writer.close()


def open_cache(path: str) -> dict[str, float]:
    with peak_memory("cpu") as memory:
        began = time.perf_counter()
        cache = TeacherCache(path)
        seconds = time.perf_counter() - began
    keys = [random.choice(random.choice(cache.shards).keys).tobytes() for _ in range(LOOKUPS)]
    began = time.perf_counter()
    for key in keys:
        decode(cache.method, [cache.load(key)])
    return {"seconds": seconds, "mib": memory["mib"], "lookups": LOOKUPS / (time.perf_counter() - began)}


def in_words(part: str, found: dict[str, Any]) -> str:
    """The tables of a part, in markdown."""
    if part == "fidelity":
        measured = {name: Fidelity(*each) for name, each in {**found["ours"], **found["rivals"]}.items()}
        lines = ["| goal | holds | theirs | ours |", "|---|---|---|---|"]
        for each in found["goals"]:
            theirs, *ours = (
                f"{name}: {measured[name].bytes_per_token:.1f} bytes, error {measured[name].gradient_error:.3f}"
                for name in (each["theirs"], each["best of ours within"], each["smallest of ours as true"])
            )
            lines.append(f"| {each['goal']} | {each['holds']} | {theirs} | {'; '.join(dict.fromkeys(ours))} |")
        return f"{found['rows']:,} rows of held-out text.\n\n{as_table(measured)}\n\n" + "\n".join(lines)
    if part == "train":
        lines = ["| taught by | bytes a token | loss | its spread | from live | KL | its spread | from live | within |"]
        lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---|")
        for name, row in found["rows"].items():
            size = "" if row["bytes"] is None else f"{row['bytes']:.1f}"
            figures = [row[f"{figure}{of}"] for figure in ("ce", "kl") for of in ("", "_spread", "_gap")]
            within = " and ".join(figure.upper() for figure in ("ce", "kl") if row[f"{figure}_within"]) or "no"
            lines.append(f"| {name} | {size} | {' | '.join(f'{figure:.4f}' for figure in figures)} | {within} |")
    elif part == "time":
        lines = ["| | seconds a batch of 8 × 256, by round | ratio | goal |", "|---|---|---:|---|"]
        lines += [f"| {case} | {', '.join(f'{s:.3f}' for s in each)} | | |" for case, each in found["seconds"].items()]
        for name, each in found["ratios"].items():
            rounds = ", ".join(f"{ratio:.3f}" for ratio in each["by_round"])
            lines.append(f"| {name} | {rounds} | {each['ratio']:.3f} | {each['goal']} |")
    else:
        said = f"{found['shards']:,} shards, {found['texts']:,} texts of {ROWS} tokens, {found['gigabytes']:.2f} GB"
        lines = [f"| {said} | seconds to open | memory, MiB | texts read a second |", "|---|---:|---:|---:|"]
        for name in ("from disk", "again"):
            each = found[name]
            lines.append(f"| {name} | {each['seconds']:.2f} | {each['mib']:.0f} | {each['lookups']:,.0f} |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """Gradient error against bytes, a line per method; rivals are dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    for whose, style in (("ours", "o-"), ("rivals", "x--")):
        for family in dict.fromkeys(name.split("(")[0] for name in found[whose]):
            points = sorted(each[:3:2] for name, each in found[whose].items() if name.split("(")[0] == family)
            axes.plot(*zip(*points, strict=True), style, label=family)
    axes.set(xlabel="bytes a token", ylabel="gradient error ‖ĝ − g‖ / ‖g‖", xscale="log", yscale="log")
    axes.set_title("What is stored, and how true it is")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--seeds", type=int, default=3, help="students of each teacher; default: %(default)s")
    parser.add_argument("--steps", type=int, default=8, help=f"of `time`, after {train_step.LEFT_OUT} others")
    parser.add_argument("--rounds", type=int, default=3, help="of `time`")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/cache"), help="for teacher, students, caches")
    parser.add_argument("--short", action="store_true", help="everything small: under a minute")
    parser.add_argument("--output", type=Path, default=None, help="writes NAME.json, NAME.md and NAME.png")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(run_task(args.task)))
        return
    recipe, folder = (SHORT, args.folder / "short") if args.short else (RECIPE, args.folder)
    if args.short:
        args.seeds, args.steps, args.rounds = 1, 1, 1
    earlier = args.output.with_suffix(".json") if args.output else None
    whole = json.loads(earlier.read_text()) if earlier and earlier.is_file() else {}
    for part in args.parts:
        found = run_part(part, recipe, folder, args)
