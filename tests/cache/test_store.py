"""A cache on disk: found by what a text is, whole or refused, never silently wrong."""

from __future__ import annotations

import json
import os
import pickle
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_distill.cache import DamagedShardError, TeacherCache, TopK
from llm_distill.cache.codec import decode, encode
from llm_distill.cache.keys import KeyIndex
from llm_distill.cache.manifest import identity, write_manifest
from llm_distill.cache.methods import describe_method
from llm_distill.cache.store import ShardWriter
from llm_distill.files import differences
from llm_distill.rows import View, example_key, examples_of

METHOD = TopK(4)
MANIFEST: dict[str, Any] = {
    "teacher": {"model": "teacher", "revision": None, "dtype": "float32"},
    "tokenizer": {"vocabulary": "v", "chat_template": None},
    "vocab_size": 50,
    "temperature": 1.0,
    "method": describe_method(METHOD),
    "seed": None,
    "data": {"max_length": 64},
}


def key_of(number: int) -> bytes:
    return example_key(np.array([number]), np.array([True]))


def add_shard(folder: Path, numbers: range, rows: int = 3) -> str:
    writer = ShardWriter(folder, METHOD, identity(MANIFEST))
    for number in numbers:
        log_p = torch.randn(rows, 50, generator=torch.Generator().manual_seed(number)).log_softmax(-1)
        writer.add(key_of(number), rows, encode(METHOD, METHOD(log_p, torch.zeros(rows, 2))))
    name = writer.close()
    assert name is not None
    return name


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache of two shards."""
    write_manifest(tmp_path, MANIFEST)
    add_shard(tmp_path, range(40))
    add_shard(tmp_path, range(40, 100))
    return tmp_path


def test_keys_are_the_same_in_every_version_and_process() -> None:
    ids, counted = np.array([5, 300, 70_000]), np.array([True, True, False])
    assert example_key(ids, counted).hex() == "db76aed527fb65d00ef58db90485fcf5"
    with ProcessPoolExecutor(1) as pool:
        assert pool.submit(example_key, ids, counted).result() == example_key(ids, counted)


def test_a_key_says_which_tokens_and_which_of_them_count() -> None:
    ids, counted = np.arange(8), np.arange(8) < 4
    keys = {example_key(ids, counted), example_key(ids[:7], counted[:7]), example_key(ids, ~counted)}
    keys |= {example_key(ids[::-1], counted), example_key(np.arange(16), np.arange(16) < 4)}
    assert len(keys) == 5
    assert example_key(ids.astype(np.int32), counted) == example_key(ids, counted)


def test_a_text_has_one_key_padded_left_or_right_or_packed() -> None:
    first, second = [3, 4, 5, 6], [7, 8, 9]
    right = {
        "input_ids": torch.tensor([first, [*second, 0]]),
        "labels": torch.tensor([[-100, -100, 5, 6], [*second, -100]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
    }
    left = {
        "input_ids": torch.tensor([first, [0, *second]]),
        "labels": torch.tensor([[-100, -100, 5, 6], [-100, *second]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]]),
    }
    left["labels"][1, 1] = -100  # nothing predicts it either way
    packed = {
        "input_ids": torch.tensor([[*first, *second]]),
        "labels": torch.tensor([[-100, -100, 5, 6, -100, 8, 9]]),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2]]),
    }
    keys = [[(example.key, example.rows) for example in examples_of(View.of(batch))] for batch in (right, left, packed)]
    assert keys[0] == keys[1] == keys[2]
    assert [rows for _, rows in keys[0]] == [2, 2]


def test_a_text_in_which_nothing_counts_is_no_example() -> None:
    batch = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([[-100, -100], [3, 4]])}
    assert [example.sample for example in examples_of(View.of(batch))] == [1]


def test_keys_that_begin_alike_are_told_apart() -> None:
    keys = np.zeros((3, 16), np.uint8)
    keys[1, 15], keys[2, 0] = 1, 255
    index = KeyIndex(keys)
    assert [index.find(key.tobytes()) for key in keys] == [0, 1, 2]
    assert bytes(15) + b"\2" not in index
    assert bytes(15) + b"\2" in index.with_keys([bytes(15) + b"\2"])


def test_every_example_is_found_and_is_what_was_stored(folder: Path) -> None:
    cache = TeacherCache(folder)
    assert (len(cache), cache.num_rows, len(cache.shards)) == (100, 300, 2)
    for number in random.Random(0).sample(range(100), 100):
        stored = cache.load(key_of(number))
        log_p = torch.randn(3, 50, generator=torch.Generator().manual_seed(number)).log_softmax(-1)
        assert stored is not None
        assert stored.pop("rows") == 3
        assert stored == encode(METHOD, METHOD(log_p, torch.zeros(3, 2)))
    assert cache.load(key_of(1000)) is None
    assert sorted(key for key, _ in cache.examples()) == sorted(map(key_of, range(100)))


def test_many_groups_are_read_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_distill.cache.store.GROUP_BYTES", 200)
    write_manifest(tmp_path, MANIFEST)
    for start in range(0, 90, 30):
        add_shard(tmp_path, range(start, start + 30))
    monkeypatch.setattr("llm_distill.cache.store.GROUPS_KEPT", 2)
    monkeypatch.setattr("llm_distill.cache.store.SHARDS_KEPT", 2)
    cache = TeacherCache(tmp_path)
    assert len(cache.shards[0].group_starts) >= 5
    for number in random.Random(0).choices(range(90), k=300):
        assert decode(METHOD, [cache.load(key_of(number)) or {}]).ids.shape == (3, 4)
    assert len(cache._groups) == len(cache._open_files) == 2


def read_some(cache: TeacherCache, seed: int) -> bool:
    numbers = random.Random(seed).choices(range(100), k=50)
    return all(cache.load(key_of(number)) is not None for number in numbers)


def test_processes_read_it_at_once(folder: Path) -> None:
    cache = TeacherCache(folder)
    assert read_some(cache, 0)
    with ProcessPoolExecutor(4) as pool:
        assert all(pool.map(read_some, [cache] * 8, range(8)))
    assert read_some(pickle.loads(pickle.dumps(cache)), 1)


def test_the_same_content_is_the_same_file(tmp_path: Path) -> None:
    names = {add_shard(tmp_path, range(20)) for _ in range(2)}
    assert len(names) == len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_byte_in_a_shard_is_found(folder: Path, seed: int) -> None:
    path = max(folder.glob("shard-*"), key=lambda path: path.stat().st_size)
    good, place = path.read_bytes(), random.Random(seed)
    clean = dict(TeacherCache(folder).examples())
    for _ in range(100):
        at = place.randrange(len(good))
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << place.randrange(8)]) + good[at + 1 :])
        try:
            cache = TeacherCache(folder)
            assert cache.verify() == [path.name]
            read = {key: cache.load(key) for key in clean}
        except DamagedShardError as error:
            assert path.name in str(error)  # noqa: PT017
            assert "llm-distill capture" in str(error)  # noqa: PT017
        except ValueError as error:
            assert "belong to another cache" in str(error)  # noqa: PT017
        else:  # what is read is right, or it is not found
            assert all(columns in (None, clean[key]) for key, columns in read.items()), at


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_byte_in_the_manifest_is_found(folder: Path, seed: int) -> None:
    path = folder / "manifest.json"
    good = path.read_bytes()
    parsed = json.loads(good)
    for at in random.Random(seed).sample(range(len(good)), 30):
        bad = good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :]
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=r"damaged|not the manifest|newer|format version"):
            TeacherCache(folder)
    path.write_bytes(good)
    assert TeacherCache(folder).manifest.items() <= parsed.items()


def test_a_manifest_of_somebody_else_is_whole_or_refused_and_steers_no_terminal(folder: Path) -> None:
    manifest = TeacherCache(folder).manifest
    write_manifest(folder, {name: value for name, value in manifest.items() if name != "method"})
    with pytest.raises(ValueError, match="is damaged"):
        TeacherCache(folder)
    for shard in folder.glob("shard-*"):
        shard.unlink()
    write_manifest(folder, manifest | {"teacher": {"model": "big\x1b[2J"}})
    assert "of big\ufffd[2J" in TeacherCache(folder).summary()


def test_a_torn_file_is_never_read(folder: Path) -> None:
    path = next(folder.glob("shard-*"))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DamagedShardError, match=path.name):
        TeacherCache(folder)


def test_what_is_not_closed_does_not_count(folder: Path) -> None:
    writer = ShardWriter(folder, METHOD, identity(MANIFEST))
    stored = TeacherCache(folder).load(key_of(1))
    assert stored is not None
    writer.add(key_of(777), stored.pop("rows"), stored)
    assert key_of(777) not in TeacherCache(folder)
    writer.abandon()
    assert not list(folder.glob(".partial-*"))


def test_shards_of_another_cache_are_refused(folder: Path) -> None:
    write_manifest(folder, {**MANIFEST, "temperature": 2.0})
    with pytest.raises(ValueError, match="belong to another cache"):
        TeacherCache(folder)


def test_a_cache_of_an_older_format_is_refused(folder: Path) -> None:
    write_manifest(folder, {**MANIFEST, "version": 1})
    with pytest.raises(
        ValueError, match=r"has format version 1, which .* no longer reads: capture again, with --drop_stale"
    ):
        TeacherCache(folder)


def test_a_cache_of_a_newer_format_is_refused(folder: Path) -> None:
    write_manifest(folder, {**MANIFEST, "version": 3})
    with pytest.raises(ValueError, match="format version 3, and this version of llm-distill reads up to 2: upgrade"):
        TeacherCache(folder)


@pytest.mark.parametrize("content", [None, "{}", "[1]", '{"format": "another"}'])
def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"not a teacher cache|not the manifest of a teacher cache"):
        TeacherCache.open(tmp_path)


def test_a_name_that_nobody_has_is_refused() -> None:
    with pytest.raises(ValueError, match="neither a folder of this name nor a dataset repository"):
        TeacherCache.open("nobody/nothing")
    with pytest.raises(ValueError, match="is not a teacher cache"):
        TeacherCache.open("./nothing")


def test_differences_name_field_and_both_values() -> None:
    wanted = {"teacher": {"model": "teacher", "revision": "abc", "unknown": 1}, "vocab_size": 50}
    assert differences(MANIFEST, wanted) == ["teacher.revision: the cache has None, asked for is 'abc'"]


def test_a_thousand_shards_open_at_once(tmp_path: Path) -> None:
    write_manifest(tmp_path, MANIFEST)
    name = add_shard(tmp_path, range(20))
    for number in range(999):
        os.link(tmp_path / name, tmp_path / f"shard-{number:032x}.parquet")
    assert len(TeacherCache(tmp_path)) == 20_000
