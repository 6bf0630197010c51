"""Runs the teacher once over a dataset and keeps what it says: `llm-distill capture`.

The data is taken in windows, one shard each, dealt out to the ranks. What a shard holds depends on its window alone:
neither on the ranks nor on whether an earlier run was killed. So a run that goes on writes the bytes that the first
one would have written, and a shard that is lost or damaged is made again by itself.
"""

from __future__ import annotations

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

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from llm_distill import __version__
from llm_distill.cache import manifest as manifests
from llm_distill.cache.codec import check_widths
from llm_distill.cache.keys import Example, examples_of
from llm_distill.cache.methods import Hidden, Hybrid, Method, Sampled, describe_method, make_method
from llm_distill.cache.record import encoded, keep, packed_size
from llm_distill.cache.store import LOCK_FILE, ShardWriter, TeacherCache, file_hash, is_intact, the_only_writer
from llm_distill.heads import LMHead
from llm_distill.signals import Signal
from llm_distill.teachers import Batch, CachedTeacher
from llm_distill.teachers.cached import HEAD_FILE
from llm_distill.teachers.describe import describe_tokenizer, vocabulary_size
from llm_distill.trainer import DistillationTrainer, named_datasets

logger = logging.getLogger(__name__)

PLOT_FILE = "fidelity.png"
BATCHES_AHEAD = 4
"""How many batches may wait to be packed, while the teacher goes on."""
MEASURED_BATCHES = 3
PREPARATION = ("max_length", "packing", "packing_strategy", "completion_only_loss", "assistant_only_loss")
"""Options that decide where a text is cut and which of its tokens count."""


class Planned(NamedTuple):
    """A batch with something in it that is not stored yet."""

    batch: Batch
    examples: list[Example]
    wanted: set[bytes]


def capture(
    trainer: DistillationTrainer,
    folder: str | Path,
    method: Method,
    *,
    drop_stale: bool = False,
    examples_per_shard: int = 2048,
) -> TeacherCache:
    """Fills a cache with the teacher's answers to all of a trainer's texts; what is there already is left alone.

    Args:
        trainer: with a live teacher; its student gives the tokenizer, the preparation and, for the fidelity report,
            the place from which gradients are taken.
        folder: the cache's.
        method: what is kept.
        drop_stale: remove what is there if it is another teacher's, tokenizer's or method's.
        examples_per_shard: rows of the dataset in a window: what a kill can cost at most, on each rank.

    Raises:
        ValueError: no teacher, no data, another cache in the folder, no room on the disk, another capture at work.
        OSError: the disk is full, or cannot be written. What was captured stays.
    """
    if trainer.teacher is None or isinstance(trainer.teacher, CachedTeacher):
        raise ValueError("there is no live teacher to capture: teacher_model_name_or_path is missing.")
    if isinstance(method, Hidden) and not hasattr(trainer.teacher, "head"):
        raise ValueError(f"method=hidden needs one teacher with its head, not a {type(trainer.teacher).__name__}.")
    for name, dataset in named_datasets(trainer.train_dataset, trainer.eval_dataset):
        if isinstance(dataset, Dataset) and not len(dataset):
            raise ValueError(f"the {name} dataset has no texts.")
    check_widths(method, vocabulary_size(trainer.processing_class))
    folder, accelerator = Path(folder), trainer.accelerator
    with the_only_writer(folder) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process:
            _prepare_folder(folder, new_manifest(trainer, method), trainer, drop_stale)
        accelerator.wait_for_everyone()
        cache = TeacherCache(folder)
        accelerator.wait_for_everyone()  # so that all have seen the same shards
        _estimate(trainer, cache)
        try:
            _fill(trainer, cache, examples_per_shard)
        except OSError as error:
            reason = error.strerror or error
            raise OSError(
                f"{folder} could not be written ({reason}). What is complete stays, and the same command goes on."
            ) from error
        accelerator.wait_for_everyone()
        cache.refresh()
        if accelerator.is_main_process:
            cache.record_contents()
        accelerator.wait_for_everyone()
    return cache


def new_manifest(trainer: DistillationTrainer, method: Method) -> dict[str, Any]:
    assert trainer.teacher is not None
    args = trainer.args
    return {
        "teacher": trainer.teacher.describe(),
        "tokenizer": describe_tokenizer(trainer.processing_class),
        "vocab_size": vocabulary_size(trainer.processing_class),
        "temperature": 1.0 if isinstance(method, Hidden) else trainer.objective.temperature,
        "method": describe_method(method),
        "seed": args.seed if isinstance(method, Hybrid | Sampled) else None,
        "data": {name: getattr(args, name) for name in PREPARATION},
        "llm_distill": __version__,
    }


@torch.no_grad()
def _fill(trainer: DistillationTrainer, cache: TeacherCache, examples_per_shard: int) -> None:
    rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
    known = KnownKeys(cache)
    with _Encoder(cache) as encoder:
        for name, dataset in named_datasets(trainer.train_dataset, trainer.eval_dataset):
            total = len(dataset) if isinstance(dataset, Dataset) else None
            show = trainer.accelerator.is_main_process
            with tqdm(total=total, desc=f"Capturing {name}", unit=" texts", disable=not show) as bar:
                windows = _windows(dataset, examples_per_shard)
                while round_ := list(itertools.islice(windows, ranks)):
                    plans, begun = [_plan(trainer, rows, known) for rows in round_], bar.n
                    texts = sum(map(len, round_))
                    for done, planned in _in_step(plans, rank):
                        signal = ask(trainer, planned.batch)
                        if planned.wanted:
                            encoder.add(planned, signal)
                        bar.n = begun + int(texts * done)
                        bar.set_postfix_str(encoder.progress())
                    encoder.end_shard()
                    bar.n = begun + texts
                    bar.refresh()


def _in_step(plans: list[list[Planned]], rank: int) -> Iterator[tuple[float, Planned]]:
    """The rank's batches, and how much of the round is done after each. Ranks may share a teacher's layers, so all run
    as often: one that has nothing left runs a batch of another's for nothing.
    """
    longest = max(plans, key=len)
    own = plans[rank] if rank < len(plans) else []
    for step, other in enumerate(longest, 1):
        yield step / len(longest), own[step - 1] if step <= len(own) else other._replace(wanted=set())


def _windows(dataset: Any, size: int) -> Iterator[list[dict[str, Any]]]:
    for columns in dataset.iter(batch_size=size):
        yield [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _plan(trainer: DistillationTrainer, rows: list[dict[str, Any]], known: KnownKeys) -> list[Planned]:
    """The batches of a window: texts of about the same length together, without those that have nothing new."""
    rows = sorted(rows, key=lambda row: len(row["input_ids"]))
    size, planned = trainer.args.per_device_eval_batch_size, []
    for start in range(0, len(rows), size):
        batch = trainer.data_collator(rows[start : start + size])
        examples = list(examples_of(batch))
        wanted = {example.key for example in examples if example.key not in known}
        known.add(wanted)
        if wanted:
            planned.append(Planned(batch, examples, wanted))
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

    def add(self, planned: Planned, signal: Signal) -> None:
        manifest = self._cache.manifest
        kept = keep(self._cache.method, signal, planned.examples, manifest["temperature"], manifest["seed"] or 0)
        self._rows += len(signal)
        self._submit(self._write, kept, planned)

    def end_shard(self) -> None:
        self._submit(self._close)

    def progress(self) -> str:
        return f"{self._rows / (time.perf_counter() - self._began):,.0f} tokens/s"

    def _submit(self, function: Callable[..., None], *arguments: Any) -> None:
        self._waiting.append(self._thread.submit(function, *arguments))
        while len(self._waiting) > BATCHES_AHEAD or (self._waiting and self._waiting[0].done()):
            self._waiting.popleft().result()  # or it raises what went wrong there

    def _write(self, kept: Any, planned: Planned) -> None:
        if self._writer is None:
            self._writer = ShardWriter(Path(self._cache.path), self._cache.method, self._cache.identity)
        wanted = set(planned.wanted)
        for example, columns in encoded(self._cache.method, kept, planned.examples):
            if example.key in wanted:
                wanted.remove(example.key)
                self._writer.add(example.key, example.rows, columns)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def ask(trainer: DistillationTrainer, batch: Batch) -> Signal:
    assert trainer.teacher is not None
    device = trainer.accelerator.device
    with torch.no_grad(), trainer.accelerator.autocast():
        return trainer.teacher.score({n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()})


def spread(trainer: DistillationTrainer, batches: int) -> Iterator[Batch]:
    """Batches from all over the training data (of a stream, the first ones)."""
    size, data = trainer.args.per_device_eval_batch_size, trainer.train_dataset
    if isinstance(data, Dataset):
        count = min(batches, -(-len(data) // size))
        for start in np.linspace(0, max(0, len(data) - size), count).astype(int):
            yield trainer.data_collator([data[int(i)] for i in range(start, min(start + size, len(data)))])
    else:
        for rows in itertools.islice(_windows(data, size), batches):
            yield trainer.data_collator(rows)


@torch.no_grad()
def _estimate(trainer: DistillationTrainer, cache: TeacherCache) -> None:
    """Says what it will take, from a few batches, and refuses what the disk has no room for."""
    manifest, seconds, rows, size, texts = cache.manifest, 0.0, 0, 0, 0
    for number, batch in enumerate(spread(trainer, MEASURED_BATCHES)):
        began = time.perf_counter()
        examples = list(examples_of(batch))
        signal = ask(trainer, batch)
        kept = keep(cache.method, signal, examples, manifest["temperature"], manifest["seed"] or 0)
        columns = [column for _, column in encoded(cache.method, kept, examples)]
        if number == 0:
            seconds = rows = size = texts = 0  # the first warms up
        seconds += time.perf_counter() - began
        rows, texts, size = rows + len(signal), texts + len(examples), size + packed_size(columns)
    trainer.accelerator.print(
        f"{size / rows:.1f} bytes and {rows / seconds:,.0f} tokens a second on each rank (measured on {rows:,} tokens)."
    )
    datasets = [data for _, data in named_datasets(trainer.train_dataset, trainer.eval_dataset)]
    if not all(isinstance(data, Dataset) for data in datasets):
        return
    left = max(0, sum(map(len, datasets)) - len(cache)) * rows / max(texts, 1)
    hours = left * seconds / rows / trainer.accelerator.num_processes / 3600
    needed, free = left * size / rows, shutil.disk_usage(cache.path).free
    trainer.accelerator.print(
        f"About {left:,.0f} tokens are left: {needed / 1e6:,.1f} MB and {hours:.2f} h. {free / 1e9:,.1f} GB are free."
    )
    if needed > free:
        raise ValueError(
            f"about {needed / 1e9:,.1f} GB are needed in {cache.path} and {free / 1e9:,.1f} GB are free. Make room, or "
            "keep less of each row (cache_method, cache_kwargs)."
        )


def _prepare_folder(folder: Path, wanted: dict[str, Any], trainer: DistillationTrainer, drop_stale: bool) -> None:
    """Leaves what is whole and of this cache, and a manifest to fill it by."""
    shards = sorted(folder.glob("shard-*.parquet"))
    strange = [p.name for p in folder.iterdir() if p.name != LOCK_FILE] if not shards else []
    if strange and not (folder / manifests.FILE).is_file() and not all(n.startswith(".partial-") for n in strange):
        raise ValueError(f"{folder} is not a teacher cache and has other things in it, such as {strange[0]}.")
    for partial in folder.glob(".partial-*"):
        partial.unlink()
    earlier = _earlier_manifest(folder)
    stale = manifests.differences(earlier, {name: wanted[name] for name in manifests.IDENTITY})
    if stale and not drop_stale:
        raise ValueError(
            f"{folder} holds another cache. {'; '.join(stale)}. Choose another folder, or remove what is there: "
            "--drop_stale."
        )
    for path in tqdm(shards, desc="Verifying", unit=" shards", disable=len(shards) < 100):
        if stale:
            path.unlink()
        elif not is_intact(path):
            logger.warning("%s is damaged: what it held is captured again.", path)
            path.unlink()
    kept = {} if stale else {name: earlier[name] for name in (*manifests.IDENTITY, "fidelity") if name in earlier}
    manifest = {**wanted, **kept}
    if isinstance(make_method(**wanted["method"]), Hidden):
        manifest |= _write_head(folder, trainer.teacher.head)  # type: ignore[union-attr]
    manifests.write_manifest(folder, manifest)


def _earlier_manifest(folder: Path) -> dict[str, Any]:
    path = folder / manifests.FILE
    if not path.is_file():
        return {}
    try:
        return manifests.parse_manifest(path.read_bytes(), str(path))
    except manifests.DamagedManifestError as error:
        logger.warning("%s A new one is written.", error)
        return {}


def _write_head(folder: Path, head: LMHead) -> dict[str, Any]:
    with head.weights() as (weight, bias):
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        content = save({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()})
        width = weight.shape[1]
    manifests.write_atomically(folder / HEAD_FILE, content)
    said = {"sha256": file_hash(folder / HEAD_FILE), "scale": head.scale, "soft_cap": head.soft_cap}
    return {"head": said, "width": width}
