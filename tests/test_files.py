"""Files that are there whole or not at all, and in what two records differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_distill.files import differences, locked, replacing, write_atomically


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    write_atomically(path, b"old")

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half of the n")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["settings.json"]
    assert path.read_bytes() == b"old"
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_folder_has_one_owner(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run", "another run"),
        pytest.raises(ValueError, match=r"another run is writing into .*run. Wait"),
    ):
        locked(tmp_path / "run", "another run")
    with locked(tmp_path / "run", "another run"):
        pass


def test_a_field_that_only_one_record_has_may_count_or_not() -> None:
    stored, wanted = {"teacher": {"model": "a", "bits": None}, "seed": 0}, {"teacher": {"model": "b", "dtype": "x"}}
    assert differences(stored, wanted) == ["teacher.model: the cache has 'a', asked for is 'b'"]
    assert differences(stored, wanted, "it", ignore_missing=False) == [
        "teacher.model: it has 'a', asked for is 'b'",
        "seed: it has 0, asked for is None",
        "teacher.dtype: it has None, asked for is 'x'",
    ]
    assert not differences({"weights": [1, 2], "kd_weight": 1.0}, {"weights": (1, 2), "kd_weight": 1})
