"""Runs the teacher once over a dataset and keeps what it says: `llm-distill capture`.

The data is taken in windows, one shard each, dealt out to the ranks. What a shard holds depends on its window alone:
neither on the ranks nor on whether an earlier run was killed. So a run that goes on writes the bytes that the first
one would have written, and a shard that is lost or damaged is made again by itself.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from safetensors.torch import save
from torch import nn
from tqdm.auto import tqdm

from llm_distill import __version__
from llm_distill.cache import manifest as manifests
from llm_distill.cache.codec import check_widths
from llm_distill.cache.methods import Hidden, Hybrid, Method, Sampled, describe_method
from llm_distill.cache.select import encode_examples, packed_size, require_enough, select
from llm_distill.cache.store import AT_WORK, SHARD_NAME, ShardWriter, TeacherCache, cache_of, is_intact
from llm_distill.data.prepare import PREPARATION, PreparedData, iterate_windows, spread_rows
from llm_distill.files import LOCK_FILE, locked, write_atomically
from llm_distill.heads import LMHead
from llm_distill.losses.objective import Objective
from llm_distill.models import describe_tokenizer, vocabulary_size
from llm_distill.ranks import SHARDED
from llm_distill.rows import Batch, Example, View, count_rows, examples_of
from llm_distill.signals import Signal
from llm_distill.teachers import CachedTeacher, Teacher

logger = logging.getLogger(__name__)

BATCHES_AHEAD = 4
"""How many batches may wait to be packed, while the teacher goes on."""
MEASURED_BATCHES = 3
LARGEST_HEAP_BLOCK = 2**25
"""Bytes; larger blocks are always given back by glibc."""


class PlannedBatch(NamedTuple):
    """A batch with something in it that is not stored yet."""

    batch: Batch
    examples: list[Example]
    wanted: set[bytes]


class Run(NamedTuple):
    """Who is asked about what, and into which cache the answers go."""

    teacher: Teacher
    data: PreparedData
    cache: TeacherCache

    @property
    def is_sharded(self) -> bool:
        return self.data.accelerator.distributed_type in SHARDED


def capture(
    teacher: Teacher | None,
    data: PreparedData,
    folder: str | Path,
    method: Method,
    *,
    drop_stale: bool = False,
    examples_per_shard: int = 2048,
) -> TeacherCache:
    """Fills a cache with the teacher's answers to all texts; what is there already is left alone.

    Args:
        teacher: a live one, an ensemble, or one behind a server.
        data: the texts, as `data.prepare` makes them; its options say for which divergence and temperature.
        folder: the cache's.
        method: what is kept.
        drop_stale: remove what is there if it is another teacher's, tokenizer's or method's.
        examples_per_shard: rows of the dataset in a window: what a kill can cost at most, on each rank.

    Raises:
        ValueError: no teacher, no data, another cache in the folder, no room on the disk, another capture at work.
        OSError: the disk is full, or cannot be written. What was captured stays.
    """
    if teacher is None or (isinstance(teacher, CachedTeacher) and teacher.is_stored):
        raise ValueError("there is no live teacher to capture, only what one has said: name the teacher itself.")
    require_enough(method, teacher.k)
    if isinstance(method, Hidden) and not hasattr(teacher, "head"):
        raise ValueError(f"method=hidden needs one teacher with its head, not a {type(teacher).__name__}.")
    for name, dataset in data.datasets.items():
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError(f"the {name} dataset has no texts.")
    check_widths(method, vocabulary_size(data.tokenizer))
    prepare_teacher(teacher, data)
    folder, accelerator, objective = Path(folder), data.accelerator, Objective.of(data.args)
    manifest = new_manifest(teacher, data, method)
    head = _stored_head(teacher.head) if isinstance(method, Hidden) else None  # type: ignore[attr-defined]
    with locked(folder, AT_WORK) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            _prepare_folder(folder, manifest, head, drop_stale)
        accelerator.wait_for_everyone()
        cache = TeacherCache(folder)
        if objective.uses_teacher:
            CachedTeacher(cache).check(objective.head.divergence, objective.head.temperature)
        accelerator.wait_for_everyone()  # so that all have seen the same shards
        run = Run(teacher, data, cache)
        _estimate(run)
        if accelerator.device.type == "cpu":
            _keep_freed_memory()
        data.stream_counts.reset()
        try:
            _fill(run, examples_per_shard)
        except ConnectionError:  # of a stream
            raise
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"{folder} could not be written ({reason}). What is complete stays, and the same command goes on."
            ) from error
        data.stream_counts.warn()
        accelerator.wait_for_everyone()
        cache.refresh()
        if accelerator.is_main_process:
            cache.record_contents()
        accelerator.wait_for_everyone()
    return cache


def prepare_teacher(teacher: Teacher, data: PreparedData) -> None:
    """Lets a teacher stand where the data are. One that is the student itself was prepared by its trainer."""
    if not teacher.is_student:
        teacher.fit_to(data.tokenizer)
        teacher.prepare(data.accelerator, nn.Module())
        if data.packs:
            teacher.require_documents_apart(data.collate, data.accelerator)


def _keep_freed_memory() -> None:
    """From the largest block that it has seen freed, glibc takes how much free memory it keeps. Without this one it can
    give back the activations of every layer, and take a fifth of a forward to map them anew for the next.
    """
    torch.empty(LARGEST_HEAP_BLOCK - 2**16, dtype=torch.uint8)


def new_manifest(teacher: Teacher, data: PreparedData, method: Method) -> dict[str, Any]:
    """That of a cache of what a teacher says about these data."""
    return {
        "teacher": teacher.describe(),
        "tokenizer": describe_tokenizer(data.tokenizer),
        "vocab_size": vocabulary_size(data.tokenizer),
        "temperature": 1.0 if isinstance(method, Hidden) else data.args.loss_temperature,
        "method": describe_method(method),
        "seed": data.args.seed if isinstance(method, Hybrid | Sampled) else None,
        "data": {name: getattr(data.args, name) for name in PREPARATION},
        "llm_distill": __version__,
    }


@torch.no_grad()
def _fill(run: Run, examples_per_shard: int) -> None:
    accelerator, known = run.data.accelerator, KnownKeys(run.cache)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    with _Encoder(run.cache) as encoder:
        for name, dataset in run.data.datasets.items():
            total = len(dataset) if isinstance(dataset, Dataset) else None
            show = accelerator.is_main_process
            with tqdm(total=total, desc=f"Capturing {name}", unit=" texts", disable=not show) as bar:
                windows = iterate_windows(dataset, examples_per_shard)
                for texts, plans in _one_ahead(_rounds(run.data, windows, ranks, known)):
                    begun, own = bar.n, _in_step(plans, rank) if run.is_sharded else plans[rank]
                    for step, planned in enumerate(_answered_ahead(run.teacher, own), 1):
                        signal = score_view(run.teacher, run.data, View.of_teacher(planned.batch))
                        if planned.wanted or run.is_sharded:  # all ranks gather the head, though nothing be kept of it
                            encoder.add(planned, signal)
                        bar.n = begun + texts * step // len(own)
                        bar.set_postfix_str(encoder.progress())
                    encoder.end_shard()
                    bar.n = begun + texts
                    bar.refresh()


def _rounds(
    data: PreparedData, windows: Iterator[list[dict[str, Any]]], ranks: int, known: KnownKeys
) -> Iterator[tuple[int, list[list[PlannedBatch]]]]:
    """A window for each rank: how many texts they have, and the batches of each. Every rank plans all windows, so that
    a text that is in several is one rank's, the same whoever looks.
    """
    while round_ := list(itertools.islice(windows, ranks)):
        plans = [_plan(data, rows, known) for rows in round_]
        yield sum(map(len, round_)), plans + [[] for _ in range(ranks - len(plans))]


def _one_ahead(items: Iterator[Any]) -> Iterator[Any]:
    """The same, each made in a thread while the one before it is worked on."""
    with ThreadPoolExecutor(1, thread_name_prefix="capture_plans") as thread:
        made = thread.submit(next, items, None)
        while (item := made.result()) is not None:
            made = thread.submit(next, items, None)
            yield item


def _in_step(plans: list[list[PlannedBatch]], rank: int) -> list[PlannedBatch]:
    """The rank's batches, as many as any rank has: ranks that share a teacher's layers must run as often, and one that
    has nothing left runs another's batch for nothing.
    """
    own = plans[rank]
    return own + [other._replace(wanted=set()) for other in max(plans, key=len)[len(own) :]]


def _answered_ahead(teacher: Teacher, own: list[PlannedBatch]) -> Iterator[PlannedBatch]:
    """The same; a teacher that is asked where batches are made has a few of them at a time."""
    if teacher.reader is None:
        yield from own
        return
    threads, asked = ThreadPoolExecutor(BATCHES_AHEAD, thread_name_prefix="capture_answers"), deque[Future[Any]]()
    try:
        for number, planned in enumerate(own):
            while len(asked) <= BATCHES_AHEAD and number + len(asked) < len(own):
                asked.append(threads.submit(teacher.reader, dict(own[number + len(asked)].batch)))
            yield planned._replace(batch=asked.popleft().result())
    finally:
        threads.shutdown(cancel_futures=True)


def _plan(data: PreparedData, rows: list[dict[str, Any]], known: KnownKeys) -> list[PlannedBatch]:
    """The batches of a window: texts of about the same length together, without those that have nothing new."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    size, planned = data.args.per_device_eval_batch_size, []
    for start in range(0, len(rows), size):
        batch = data.collate(rows[start : start + size])
        examples = list(examples_of(View.of_teacher(batch)))
        wanted = {example.key for example in examples if example.key not in known}
        known.add(wanted)
        if wanted:
            planned.append(PlannedBatch(batch, examples, wanted))
    return planned


class KnownKeys:
    """The examples that are stored or planned: 16 bytes for each, and not the hundred of a Python set."""

    def __init__(self, cache: TeacherCache) -> None:
        self._index = cache.index
        self._new: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self._new or key in self._index

    def add(self, keys: set[bytes]) -> None:
        self._new |= keys
        if len(self._new) > 100_000:
            self._index, self._new = self._index.with_keys(self._new), set()


class _Encoder:
    """Packs and writes what is kept in a thread of its own, while the teacher goes on."""

    def __init__(self, cache: TeacherCache) -> None:
        self._cache = cache
        self._writer: ShardWriter | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cache_encoder")
        self._waiting: deque[Future[None]] = deque()
        self._began, self._rows = time.perf_counter(), 0

    def __enter__(self) -> _Encoder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        try:
            while self._waiting and kind is None:
                self._waiting.popleft().result()
        finally:
            self._thread.shutdown(cancel_futures=True)
            if self._writer is not None:
                self._writer.abandon()

    def add(self, planned: PlannedBatch, signal: Signal) -> None:
        manifest = self._cache.manifest
        seed = manifest["seed"] or 0
        selected = select(self._cache.method, signal, planned.examples, manifest["temperature"], seed)
        self._rows += len(signal)
        self._submit(self._write, selected, planned)

    def end_shard(self) -> None:
        self._submit(self._close)

    def progress(self) -> str:
        return f"{self._rows / (time.perf_counter() - self._began):,.0f} tokens/s"

    def _submit(self, function: Callable[..., None], *arguments: Any) -> None:
        self._waiting.append(self._thread.submit(function, *arguments))
        while len(self._waiting) > BATCHES_AHEAD or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()  # or it raises what went wrong there

    def _write(self, selected: Any, planned: PlannedBatch) -> None:
        if self._writer is None:
            self._writer = ShardWriter(Path(self._cache.path), self._cache.method, self._cache.identity)
        wanted = set(planned.wanted)
        for example, columns in encode_examples(self._cache.method, selected, planned.examples):
            if example.key in wanted:
                wanted.remove(example.key)
                self._writer.add(example.key, example.rows, columns)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


@torch.no_grad()
def score_view(teacher: Teacher, data: PreparedData, view: View) -> Signal:
    """What a teacher says about a view, on the device of this rank."""
    with data.accelerator.autocast():
        return teacher.score(view.to(data.accelerator.device))


def sample_batches(data: PreparedData, batches: int, batch_size: int | None = None) -> Iterator[tuple[int, Batch]]:
    """Batches from all over the training data (of a stream, the first ones) in which something counts, and of how many
    texts each is: by default as many as in evaluation.
    """
    size = batch_size or data.args.per_device_eval_batch_size
    rows = spread_rows(data.train, batches * size)
    for start in range(0, len(rows), size):
        texts = rows[start : start + size]
        batch = data.collate(texts)
        if count_rows(batch["labels"]):
            yield len(texts), batch


@torch.no_grad()
def _estimate(run: Run) -> None:
    """Says what it will take, from a few batches, and refuses what the disk has no room for."""
    cache, data = run.cache, run.data
    manifest, seconds, rows, size, texts = cache.manifest, 0.0, 0, 0, 0
    for number, (count, batch) in enumerate(sample_batches(data, MEASURED_BATCHES)):
        began, view = time.perf_counter(), View.of_teacher(batch)
        examples = list(examples_of(view))
        signal = score_view(run.teacher, data, view)
        selected = select(cache.method, signal, examples, manifest["temperature"], manifest["seed"] or 0)
        columns = [column for _, column in encode_examples(cache.method, selected, examples)]
        if number == 0:
            seconds = rows = size = texts = 0  # the first warms up
        seconds += time.perf_counter() - began
        rows, texts, size = rows + len(signal), texts + count, size + packed_size(columns)
    if not rows:
        raise ValueError("nothing counts in the texts that were looked at: is every label masked, or the data empty?")
    data.accelerator.print(
        f"{size / rows:.1f} bytes and {rows / seconds:,.0f} tokens a second on each rank (measured on {rows:,} tokens)."
    )
    datasets = list(data.datasets.values())
    if not all(isinstance(dataset, Dataset) for dataset in datasets):
        return
    left = max(0.0, sum(map(len, datasets)) * rows / texts - cache.num_rows)
    hours = left * seconds / rows / data.accelerator.num_processes / 3600
    needed, free = left * size / rows, shutil.disk_usage(cache.path).free
    data.accelerator.print(
        f"About {left:,.0f} tokens are left: {needed / 1e6:,.1f} MB and {hours:.2f} h. {free / 1e9:,.1f} GB are free."
    )
    if needed > free:
        raise ValueError(
            f"about {needed / 1e9:,.1f} GB are needed in {cache.path} and {free / 1e9:,.1f} GB are free. Make room, or "
            "keep less of each row (cache_method, cache_kwargs)."
        )


def _prepare_folder(folder: Path, wanted: dict[str, Any], head: StoredHead | None, drop_stale: bool) -> None:
    """Leaves what is whole and of this cache, and a manifest to fill it by. What is not a cache's is never touched."""
    names = [path.name for path in folder.iterdir()]
    known = {manifests.FILE, manifests.HEAD_FILE, manifests.PLOT_FILE, LOCK_FILE, manifests.CARD_FILE}
    strange = [n for n in names if n not in known and not SHARD_NAME.fullmatch(n) and not n.startswith(".partial-")]
    if strange and manifests.FILE not in names:
        raise ValueError(f"{folder} is not a teacher cache and has other things in it, such as {strange[0]}.")
    earlier = _earlier_manifest(folder, drop_stale)
    identity = {} if drop_stale else {name: earlier[name] for name in manifests.IDENTITY if name in earlier}
    stale = manifests.changes(earlier, wanted)
    manifest = {**wanted, **({} if stale else identity)}
    damaged, others = [], []
    shards = [folder / name for name in names if SHARD_NAME.fullmatch(name)]
    for path in tqdm(shards, desc="Verifying", unit=" shards", disable=len(shards) < 100):
        if not is_intact(path):
            damaged.append(path)
        elif cache_of(path) != manifests.identity(manifest):
            others.append(path)
    if (stale or others) and not drop_stale:
        reasons = stale or [f"{others[0].name} is of another teacher, tokenizer or method"]
        raise ValueError(
            f"{folder} holds another cache. {'; '.join(reasons)}. Choose another folder, or remove what is there: "
            "--drop_stale."
        )
    for path in damaged:
        logger.warning("%s is damaged: what it held is captured again.", path)
    for path in (*damaged, *others, *folder.glob(".partial-*")):
        path.unlink()
    if head is not None:
        write_atomically(folder / manifests.HEAD_FILE, head.content)
        manifest |= head.record
    if not stale and "fidelity" in earlier:
        manifest["fidelity"] = earlier["fidelity"]
    manifests.write_manifest(folder, manifest)


def _earlier_manifest(folder: Path, drop_stale: bool) -> dict[str, Any]:
    path = folder / manifests.FILE
    if not path.is_file():
        return {}
    try:
        return manifests.parse_manifest(path.read_bytes(), str(path))
    except manifests.DamagedManifestError as error:
        logger.warning("%s A new one is written.", error)
        return {}
    except manifests.OldFormatError:
        if not drop_stale:
            raise
        return {}


class StoredHead(NamedTuple):
    """A head as a file, and what the manifest says of it."""

    content: bytes
    record: dict[str, Any]


def _stored_head(head: LMHead) -> StoredHead:
    """Called on every rank, which may have to gather it together."""
    with head.weights() as (weight, bias):
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        content = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
        width = weight.shape[1]
    record = {"sha256": hashlib.sha256(content).hexdigest(), "scale": head.scale, "soft_cap": head.soft_cap}
    return StoredHead(content, {"head": record, "width": width})
