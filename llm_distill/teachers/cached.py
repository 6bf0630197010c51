"""A teacher that ran once: its signals are read from disk, by what the text is and not by where it stood."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import filelock
import torch
from accelerate import Accelerator
from safetensors.torch import load
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from llm_distill.cache.codec import decode, decode_hidden
from llm_distill.cache.manifest import HEAD_FILE
from llm_distill.cache.methods import Hidden
from llm_distill.cache.select import encode_examples, require_enough, select
from llm_distill.cache.store import AT_WORK, ShardWriter, TeacherCache
from llm_distill.divergences import Divergence
from llm_distill.files import differences, locked
from llm_distill.heads import LMHead
from llm_distill.models import HEAD, LAST, LanguageModel, Needs, describe_tokenizer, vocabulary_size, without_places
from llm_distill.probes import Collator
from llm_distill.ranks import SHARDED
from llm_distill.rows import IGNORED, SIGNAL, SKIPPED, TEACHER, Example, View, examples_of
from llm_distill.signals import HiddenSignal, Signal, SparseSignal
from llm_distill.teachers.base import Teacher

logger = logging.getLogger(__name__)

STORED = {"hidden", "log_weights"}
"""One of these is in what comes from a cache, and not in what a live teacher's reader has put there."""
EXAMPLES_PER_SHARD = 1024
"""Of those that are written while a student trains."""


class CacheReader:
    """Puts the stored signal of a batch into it, where batches are made: all that a loader's worker needs to have.

    Signals travel as bits: an engine that casts the floats of a batch to 16 bits would round them.
    """

    def __init__(
        self,
        cache: TeacherCache,
        on_miss: str,
        read_live: Callable[[MutableMapping[str, Any]], MutableMapping[str, Any]] | None = None,
    ) -> None:
        """`read_live` puts the live teacher's answer into a batch that is not stored, where it can be had here."""
        self.cache, self.on_miss, self.read_live = cache, on_miss, read_live
        self._skipped = False

    def __call__(self, batch: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """Where texts are missing: raises, masks their labels, or leaves the batch to `score`, as `on_miss` says."""
        view = View.of_teacher(batch)
        stored, missing = self.look_up(view)
        if missing and self.on_miss == "live":
            return batch if self.read_live is None else self.read_live(batch)
        if missing and self.on_miss == "error":
            raise self.missing_texts(view, missing, len(stored) + len(missing))
        if missing and not self._skipped:
            self._skipped = True
            logger.warning("texts that are not in %s are left out of the loss.", self.cache.path)
        batch[SIGNAL] = decoded(self.cache, stored)
        if self.on_miss == "skip":
            batch[SIGNAL][SKIPPED] = torch.zeros(len(batch["labels"]), dtype=torch.long)
        for example in missing:
            leave_out(example, batch)
            batch[SIGNAL][SKIPPED][example.sample] += example.rows
        return batch

    def look_up(self, view: View) -> tuple[list[dict[str, Any]], list[Example]]:
        """The columns of a view's examples that are stored, in order, and those that are not."""
        stored, missing = [], []
        for example in examples_of(view):
            columns = self.cache.load(example.key)
            if columns is None:
                missing.append(example)
            elif columns["rows"] != example.rows:
                raise ValueError(f"{self.cache.path} has {columns['rows']} rows of a text with {example.rows}.")
            else:
                stored.append(columns)
        return stored, missing

    def missing_texts(self, view: View, missing: list[Example], total: int) -> ValueError:
        """To be raised."""
        first = view.inputs["input_ids"][missing[0].sample, torch.from_numpy(missing[0].positions)]
        cut = ", ".join(f"{name}={value!r}" for name, value in self.cache.manifest["data"].items())
        return ValueError(
            f"{len(missing)} of the {total} texts of a batch are not in {self.cache.path}; the first has {len(first)} "
            f"tokens and begins with the ids {first[:8].tolist()}. The cache was captured with {cut}: texts cut in "
            "another way, or with another prompt for the teacher, are other texts. `llm-distill capture` with the "
            "settings of this run adds what is missing; "
            "or choose on_miss: live or skip."
        )


def leave_out(example: Example, batch: MutableMapping[str, Any]) -> None:
    """Masks the labels of a text, or of a packed row's document."""
    if TEACHER in batch:
        batch["labels"][example.sample] = batch[TEACHER]["labels"][example.sample] = IGNORED
    else:
        batch["labels"][example.sample, example.positions] = IGNORED


class CachedTeacher(Teacher):
    """What a `TeacherCache` holds. No model is loaded.

    Args:
        cache: a `TeacherCache`, or where one lies.
        on_miss: for a text that is not in it: `error`; `skip`, which leaves it out of the loss; or `live`, which asks
            `live` and adds the answer to the cache.
        live: the teacher whose cache it is.
    """

    def __init__(self, cache: TeacherCache | str, on_miss: str = "error", live: Teacher | None = None) -> None:
        if on_miss not in ("error", "live", "skip"):
            raise ValueError(f"on_miss must be error, live or skip, got {on_miss!r}.")
        if (on_miss == "live") != (live is not None):
            raise ValueError("on_miss='live' needs the live teacher, and nothing else has a use for it.")
        self.cache = cache if isinstance(cache, TeacherCache) else TeacherCache.open(cache)
        if live is not None and (not self.cache.is_local or self.cache.is_downloaded):
            raise ValueError(f"on_miss='live' adds to the cache, and {self.cache.path} is not a folder of yours.")
        if live is not None:
            require_enough(self.cache.method, live.k)
        self.live, self.is_stored = live, live is None
        self.reader: CacheReader = CacheReader(self.cache, on_miss, None if live is None else live.reader)
        self._head = _stored_head(self.cache) if isinstance(self.cache.method, Hidden) else None
        if self._head is not None:
            self.can, self.width = self.can | {LAST}, self.cache.manifest["width"]
        self._writer: ShardWriter | None = None
        self._written: set[bytes] = set()
        self._locks = False
        self._lock: filelock.AcquireReturnProxy | None = None

    def summary(self) -> str:
        return f"what {self.cache.manifest['teacher'].get('model') or 'it'} said is read from {self.cache.path}"

    @property
    def models(self) -> tuple[LanguageModel, ...]:
        return () if self.live is None else self.live.models

    def check(self, divergence: Divergence, temperature: float) -> None:
        if self._head is None:
            self._signal(no_rows(self.cache), torch.device("cpu")).check(divergence, temperature)

    def fit_to(self, tokenizer: PreTrainedTokenizerBase) -> None:
        wanted = {"tokenizer": describe_tokenizer(tokenizer), "vocab_size": vocabulary_size(tokenizer)}
        _refuse(self.cache, differences(self.cache.manifest, wanted), "tokenizer")
        if self.live is not None:
            self.live.fit_to(tokenizer)

    @property
    def max_length(self) -> int | None:
        return None if self.live is None else self.live.max_length

    def prepare(self, accelerator: Accelerator, student: nn.Module) -> None:
        if self._head is not None:
            self._head.module.to(accelerator.device)
        if self.live is None:
            return
        if accelerator.distributed_type in SHARDED:
            raise ValueError(
                "on_miss=live asks on one rank and not on another, and a sharded teacher needs all of them: capture "
                "first, or use DDP."
            )
        self._locks = accelerator.is_main_process
        self.live.prepare(accelerator, student)
        require_same_teacher(self.cache, self.live.describe())

    def require_documents_apart(self, collate: Collator, accelerator: Accelerator) -> None:
        if self.live is not None:
            self.live.require_documents_apart(collate, accelerator)

    def score(self, view: View, needs: Needs = HEAD) -> Signal:
        bits = view.fetched if view.fetched is not None else self._load(view)
        if bits is None or STORED.isdisjoint(bits):
            return self._score_live(view)
        return self._signal(bits, view.positions.sample.device)

    def _load(self, view: View) -> dict[str, Tensor] | None:
        """What is stored of a view; None where the live teacher must be asked."""
        stored, missing = self.reader.look_up(view)
        if missing and self.live is None:
            raise self.reader.missing_texts(view, missing, len(stored) + len(missing))
        return None if missing else decoded(self.cache, stored)

    def describe(self) -> dict[str, Any]:
        return {**self.cache.manifest["teacher"], "cache": self.cache.manifest["method"]}

    def flush(self) -> None:
        """What the live teacher has added is written, and found from now on."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self.cache.refresh()
            self._written.clear()
        if self._lock is not None:
            self._lock.lock.release()
            self._lock = None

    def _score_live(self, view: View) -> Signal:
        assert self.live is not None, "otherwise a missing text is an error, or masked"
        examples, manifest = list(examples_of(view)), self.cache.manifest
        signal, method, seed = self.live.score(view), self.cache.method, manifest["seed"] or 0
        selected = select(method, signal, examples, manifest["temperature"], seed)
        columns = []
        for example, parts in encode_examples(method, selected, examples):
            columns.append(parts)
            if example.key not in self._written and example.key not in self.cache:
                self._add(example, parts)
        return self._signal(decoded(self.cache, columns), view.positions.sample.device)

    def _add(self, example: Example, parts: dict[str, bytes]) -> None:
        if self._locks and self._lock is None:
            self._lock = locked(Path(self.cache.path), AT_WORK)
        if self._writer is None:
            self._writer = ShardWriter(Path(self.cache.path), self.cache.method, self.cache.identity)
        self._writer.add(example.key, example.rows, parts)
        self._written.add(example.key)
        if len(self._written) >= EXAMPLES_PER_SHARD:
            self.flush()

    def _signal(self, bits: Mapping[str, Tensor], device: torch.device) -> Signal:
        bits = {name: value.to(device) for name, value in bits.items()}
        if self._head is not None:
            dtype = torch.bfloat16 if bits["hidden"].dtype == torch.int16 else torch.float32
            return HiddenSignal(bits["hidden"].view(dtype).to(self._head.module.weight.dtype), self._head)
        floats = {name: value.view(torch.float32) for name, value in bits.items() if value.dtype == torch.int32}
        return SparseSignal(
            bits["ids"],
            floats["log_weights"],
            floats.get("log_tail"),
            self.cache.manifest["vocab_size"],
            self.cache.manifest["temperature"],
            floats["entropy"],
        )


def decoded(cache: TeacherCache, columns: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The tensors of a signal, floats as the bits that they are made of."""
    if not columns:
        return no_rows(cache)
    if isinstance(cache.method, Hidden):
        tensors: dict[str, Any] = {"hidden": decode_hidden(cache.method, columns, cache.manifest["width"])}
    else:
        tensors = decode(cache.method, columns)._asdict()
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.int64: torch.int64}
    return {name: value.view(bits[value.dtype]) for name, value in tensors.items() if value is not None}


def no_rows(cache: TeacherCache) -> dict[str, Tensor]:
    """The tensors of a signal about nothing."""
    if isinstance(cache.method, Hidden):
        return {"hidden": torch.zeros(0, cache.manifest["width"], dtype=torch.int32)}
    empty = {"ids": torch.zeros(0, 1, dtype=torch.long), "log_weights": torch.zeros(0, 1, dtype=torch.int32)}
    names = ("log_tail", "entropy") if cache.method.has_tail else ("entropy",)
    return empty | {name: torch.zeros(0, dtype=torch.int32) for name in names}


def require_same_teacher(cache: TeacherCache, description: dict[str, Any]) -> None:
    """Raises ValueError with each field in which the teacher asked for is not the cache's."""
    stored, wanted = map(_numbered, without_places(cache.manifest["teacher"], description))
    _refuse(cache, differences({"teacher": stored}, {"teacher": wanted}), "teacher")


def _numbered(description: dict[str, Any]) -> dict[str, Any]:
    """The members of an ensemble by their numbers, so that each is compared in what both know of it."""
    if "ensemble" not in description:
        return description
    members = {str(number): member for number, member in enumerate(description["ensemble"])}
    return description | {"ensemble": members}


def _refuse(cache: TeacherCache, changes: list[str], what: str) -> None:
    if changes:
        raise ValueError(
            f"{cache.path} was made by another {what}. {'; '.join(changes)}. Ask for what it was made with, or make it "
            f"anew: `llm-distill capture --teacher_cache {cache.path} --drop_stale --config …`."
        )


def _stored_head(cache: TeacherCache) -> LMHead:
    """The teacher's head, from its file."""
    record, again = cache.manifest["head"], "run `llm-distill capture` again with the same settings."
    try:
        content = cache.read(HEAD_FILE)
    except FileNotFoundError as error:
        raise ValueError(f"{cache.path}/{HEAD_FILE} is missing: {again}") from error
    if hashlib.sha256(content).hexdigest() != record["sha256"]:
        raise ValueError(f"{cache.path}/{HEAD_FILE} is damaged: {again}")
    tensors = load(content)
    vocab, width = tensors["weight"].shape
    module = nn.Linear(width, vocab, bias="bias" in tensors, device="meta")
    module.load_state_dict(tensors, assign=True)
    return LMHead(module.requires_grad_(False), cache.manifest["vocab_size"], record["scale"], record["soft_cap"])
