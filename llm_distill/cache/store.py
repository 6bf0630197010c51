"""A cache on disk: Parquet shards of one row per example, found by key.

A shard is written beside its place, named by the hash of its bytes and moved there whole, so that whatever bears such a
name can be told to be intact. Its footer holds its keys and which cache it is of: to open a cache is to read footers.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem
from huggingface_hub import snapshot_download

from llm_distill.cache import manifest as manifests
from llm_distill.cache.codec import ZSTD_LEVEL, columns
from llm_distill.cache.keys import KeyIndex
from llm_distill.cache.methods import Method, make_method
from llm_distill.rows import KEY_BYTES
from llm_distill.tables import printable

GROUP_BYTES = 2**19
"""What is compressed, and read, together: small, because examples are read in any order."""
PARTS = [manifests.FILE, "shard-*.parquet", manifests.HEAD_FILE]
"""What of a repository is downloaded."""
GROUPS_KEPT, SHARDS_KEPT = 16, 256
SHARD_NAME = re.compile(r"shard-[0-9a-f]{32}\.parquet")
AT_WORK = "another capture, or a training run with on_miss=live,"
"""Who may be writing into the folder of a cache."""
KEYS, ROWS, OF = b"llm_distill.keys", b"llm_distill.rows", b"llm_distill.cache"


class DamagedShardError(ValueError):
    """A file of a cache is not what was written."""


class ShardWriter:
    """Writes one shard. As long as it is not closed nothing of it counts."""

    def __init__(self, folder: Path, method: Method, identity: str) -> None:
        self._folder, self._identity = folder, identity
        self._temporary = folder / f".partial-{uuid.uuid4().hex}.parquet"
        names = columns(method)
        self._schema = _schema(method)
        self._file = pq.ParquetWriter(
            self._temporary,
            self._schema,
            compression=dict.fromkeys(names, "zstd"),
            compression_level=dict.fromkeys(names, ZSTD_LEVEL),
            use_dictionary=False,
            write_statistics=False,
        )
        self._keys: list[bytes] = []
        self._rows = 0
        self._pending: list[dict[str, Any]] = []
        self._pending_bytes = 0

    def add(self, key: bytes, rows: int, parts: dict[str, bytes]) -> None:
        self._keys.append(key)
        self._rows += rows
        self._pending.append({"key": key, "rows": rows, "crc": _crc(key, rows, parts), **parts})
        self._pending_bytes += sum(map(len, parts.values()))
        if self._pending_bytes >= GROUP_BYTES:
            self._flush()

    def close(self) -> str | None:
        """Its name, once it is on the disk for good; None if it is empty."""
        self._flush()
        self._file.add_key_value_metadata(
            {KEYS: base64.b64encode(b"".join(self._keys)), ROWS: str(self._rows), OF: self._identity}
        )
        self._file.close()
        if not self._keys:
            self.abandon()
            return None
        with self._temporary.open("rb+") as file:
            os.fsync(file.fileno())
        name = f"shard-{file_hash(self._temporary)[:32]}.parquet"
        os.replace(self._temporary, self._folder / name)
        _sync_folder(self._folder)
        return name

    def abandon(self) -> None:
        self._file.is_open = False  # nothing more is written
        self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        if self._pending:
            table = pa.Table.from_pylist(self._pending, self._schema)
            self._file.write_table(table, row_group_size=len(table))
        self._pending, self._pending_bytes = [], 0


class Shard(NamedTuple):
    """What the footer of a shard says."""

    name: str
    keys: np.ndarray
    """[examples] of KEY_BYTES."""
    group_starts: np.ndarray
    """The first example of each row group."""
    identity: str
    rows: int
    """Of all its examples."""


class TeacherCache:
    """A cache that is there: `key in cache`, `load`, `verify`.

    Args:
        path: a folder, or anything that fsspec opens (`hf://datasets/user/name` reads over the network what is
            needed).

    Raises:
        ValueError: no cache, one of another format, a damaged file, or shards that are another cache's.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.files, self._root = fsspec.core.url_to_fs(self.path)
        self.is_local = isinstance(self.files, LocalFileSystem)
        self.is_downloaded = False
        try:
            text = self.files.cat_file(f"{self._root}/{manifests.FILE}")
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ValueError(
                f"{self.path} is not a teacher cache: there is no {manifests.FILE} in it. Make one with "
                f"`llm-distill capture --teacher_cache {self.path} --config …`."
            ) from error
        except Exception as error:
            if self.is_local:
                raise
            raise ConnectionError(f"{self.path} cannot be reached. ({error})") from error
        self.manifest = manifests.parse_manifest(text, f"{self.path}/{manifests.FILE}")
        self.method = make_method(**self.manifest["method"])
        self.identity = manifests.identity(self.manifest)
        self.shards: list[Shard] = []
        self.refresh()

    @classmethod
    def open(cls, name: str | os.PathLike[str]) -> TeacherCache:
        """A folder, a URL, or the id of a dataset repository on the Hub, which is downloaded once.

        Raises:
            ValueError: nothing like that is there.
        """
        name = os.fspath(name)
        if "://" in name or os.path.isdir(name) or name.count("/") != 1 or name.startswith((".", "~", "/")):
            cache = cls(name)
        else:
            cache = cls(_downloaded(name))
            cache.is_downloaded = True
        listed = {shard["name"] for shard in cache.manifest.get("shards", ())}
        if missing := sorted(listed - {shard.name for shard in cache.shards}):
            raise ValueError(
                f"{name} lacks {len(missing)} of its {len(listed)} shards, such as {missing[0]}: `llm-distill capture` "
                "makes them again; of a repository, the push is under way or broke off and must be made again."
            )
        return cache

    def refresh(self) -> None:
        """Reads the footers of the shards that are there now."""
        self.files.invalidate_cache(self._root)
        names = sorted(Path(p).name for p in self.files.glob(f"{self._root}/shard-*.parquet"))
        with ThreadPoolExecutor(min(32, 4 * (os.cpu_count() or 1))) as pool:
            known = {shard.name: shard for shard in self.shards}
            self.shards = list(pool.map(lambda name: known.get(name) or self._footer(name), names))
        if strange := [shard.name for shard in self.shards if shard.identity != self.identity]:
            raise ValueError(
                f"{self.path}: {', '.join(strange[:3])} belong to another cache. Move them out of the folder."
            )
        self.index = KeyIndex(np.concatenate([np.zeros((0, KEY_BYTES), np.uint8), *(s.keys for s in self.shards)]))
        self._first = np.cumsum([0, *(len(shard.keys) for shard in self.shards)])
        self._open_files: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def __len__(self) -> int:
        """How many examples."""
        return len(self.index)

    def __contains__(self, key: bytes) -> bool:
        return key in self.index

    def load(self, key: bytes) -> dict[str, Any] | None:
        """The columns of one example: `rows`, and the method's, as bytes. None if it is not there.

        Raises:
            DamagedShardError: it is there and cannot be read.
        """
        number = self.index.find(key)
        if number is None:
            return None
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        place = number - int(self._first[shard])
        starts = self.shards[shard].group_starts
        group = int(np.searchsorted(starts, place, side="right")) - 1
        row = self._group(shard, group).slice(place - int(starts[group]), 1).to_pylist()
        if not row or row[0]["key"] != key:
            raise self._damaged(self.shards[shard].name, "its rows are not those that its footer lists")
        return self._checked(shard, row[0])

    def examples(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """All of them, in the order in which they lie there."""
        for number, shard in enumerate(self.shards):
            for group in range(len(shard.group_starts)):
                for row in self._group(number, group).to_pylist():
                    yield row["key"], self._checked(number, row)

    def read(self, name: str) -> bytes:
        """Another file of the cache."""
        return self.files.cat_file(f"{self._root}/{name}")

    def verify(self) -> list[str]:
        """The names of the files whose bytes are not those that were written."""
        damaged = [shard.name for shard in self.shards if not self._is_intact(shard.name)]
        if "head" in self.manifest:
            content = (
                self.read(manifests.HEAD_FILE) if self.files.exists(f"{self._root}/{manifests.HEAD_FILE}") else b""
            )
            if hashlib.sha256(content).hexdigest() != self.manifest["head"]["sha256"]:
                damaged.append(manifests.HEAD_FILE)
        return damaged

    @property
    def num_rows(self) -> int:
        """How many tokens are answered for."""
        return sum(shard.rows for shard in self.shards)

    def record_contents(self) -> None:
        """Writes into the manifest what is there."""
        folder = Path(self.path)
        shards = [
            {
                "name": shard.name,
                "examples": len(shard.keys),
                "rows": shard.rows,
                "bytes": (folder / shard.name).stat().st_size,
            }
            for shard in self.shards
        ]
        self.manifest |= {"examples": len(self), "rows": self.num_rows, "bytes": self.num_bytes, "shards": shards}
        manifests.write_manifest(folder, self.manifest)

    def summary(self) -> str:
        """What it is, in a few lines."""
        teacher, size = self.manifest["teacher"], self.num_bytes
        name = teacher.get("model") or teacher.get("architecture") or f"{len(teacher.get('ensemble', []))} teachers"
        return printable(
            f"{self.path}: {self.method} of {name} at temperature {self.manifest['temperature']:g}\n"
            f"{len(self):,} texts, {self.num_rows:,} tokens, {size / 1e6:,.1f} MB in {len(self.shards):,} shards: "
            f"{size / max(self.num_rows, 1):.1f} bytes a token"
        )

    @property
    def num_bytes(self) -> int:
        """On disk, of all shards."""
        return sum(self.files.size(f"{self._root}/{shard.name}") for shard in self.shards)

    def _footer(self, name: str) -> Shard:
        try:
            with self._file(name) as file:
                footer = file.metadata
                own = footer.metadata or {}
                keys = np.frombuffer(base64.b64decode(own[KEYS], validate=True), np.uint8).reshape(-1, KEY_BYTES)
                rows, identity = int(own[ROWS]), own[OF].decode()
                if not file.schema_arrow.equals(_schema(self.method)):
                    raise ValueError("its columns are not those of the method")
                sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        except Exception as error:
            raise self._unreadable(name, error) from error
        if sum(sizes) != len(keys):
            raise self._damaged(name, f"{len(keys)} keys for {sum(sizes)} rows")
        return Shard(name, keys, np.cumsum([0, *sizes[:-1]]), identity, rows)

    def _is_intact(self, name: str) -> bool:
        if self.is_local:
            return is_intact(Path(self._root, name))
        with self.files.open(f"{self._root}/{name}") as file:
            return name == shard_name(hashlib.file_digest(file, "sha256").hexdigest())

    def _file(self, name: str) -> pq.ParquetFile:
        path = f"{self._root}/{name}"
        if self.is_local:
            return pq.ParquetFile(path, memory_map=True)
        return pq.ParquetFile(self.files.open(path, cache_type="none"), pre_buffer=True)  # a request for a group

    def _group(self, shard: int, group: int) -> pa.Table:
        if (shard, group) in self._groups:
            self._groups.move_to_end((shard, group))
            return self._groups[shard, group]
        name = self.shards[shard].name
        try:
            if shard not in self._open_files:
                self._open_files[shard] = self._file(name)
            self._open_files.move_to_end(shard)
            table = self._open_files[shard].read_row_group(group, use_threads=False)
        except Exception as error:
            raise self._unreadable(name, error) from error
        self._groups[shard, group] = table
        if len(self._groups) > GROUPS_KEPT:
            self._groups.popitem(last=False)
        if len(self._open_files) > SHARDS_KEPT:
            self._open_files.popitem(last=False)[1].close()
        return table

    def _checked(self, shard: int, row: dict[str, Any]) -> dict[str, Any]:
        key, crc, rows = row.pop("key"), row.pop("crc"), row["rows"]
        if crc != _crc(key, rows, {name: column for name, column in row.items() if name != "rows"}):
            raise self._damaged(self.shards[shard].name, "a checksum does not fit")
        return row

    def _unreadable(self, name: str, error: Exception) -> Exception:
        if self.is_local or isinstance(error, (KeyError, ValueError)):  # and pyarrow's
            return self._damaged(name, str(error))
        return ConnectionError(f"{self.path}/{name} cannot be reached. ({error})")

    def _damaged(self, name: str, reason: str) -> DamagedShardError:
        return DamagedShardError(
            f"{self.path}/{name} is damaged ({reason}). `llm-distill capture` with the settings of this cache makes it "
            "again, and it alone."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open_files": OrderedDict(), "_groups": OrderedDict()}


def _downloaded(repo_id: str) -> str:
    try:
        return snapshot_download(repo_id, repo_type="dataset", allow_patterns=PARTS)
    except Exception as error:  # of the HTTP client, of huggingface_hub: they have no base in common
        raise ValueError(
            f"there is no teacher cache {repo_id!r}: neither a folder of this name nor a dataset repository that can "
            f"be reached. ({error})"
        ) from error


def is_intact(path: Path) -> bool:
    """Whether a shard's bytes are those that it is named by."""
    return path.is_file() and path.name == shard_name(file_hash(path))


def shard_name(sha256: str) -> str:
    return f"shard-{sha256[:32]}.parquet"


def cache_of(path: Path) -> str | None:
    """The identity of the cache that an intact shard belongs to."""
    return (pq.read_metadata(path).metadata or {}).get(OF, b"").decode() or None


def _schema(method: Method) -> pa.Schema:
    own = [("key", pa.binary()), ("rows", pa.uint32()), ("crc", pa.uint32())]
    return pa.schema(own + [(name, pa.binary()) for name in columns(method)])


def _crc(key: bytes, rows: int, parts: dict[str, bytes]) -> int:
    """Of one example, whole: so that nothing wrong is read wherever in the file a bit has flipped."""
    crc = zlib.crc32(key + rows.to_bytes(4, "little"))
    for column in parts.values():
        crc = zlib.crc32(column or b"", crc)
    return crc


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """So that the new name survives a power cut too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
