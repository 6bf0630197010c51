"""A file that is there and broken says what is broken, and a part of a split that has no rows is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from trl import ScriptArguments

from llm_distill.data.load import load_data, load_split


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def load(path: Path, **options: Any) -> Any:
    return load_data(ScriptArguments(dataset_name=str(path), **options))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 of a.jsonl is not JSON: Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2 of a.jsonl is not an object"),
        ("a.json", b'[{"text": "a"},\n{"text": }]', "a.json is not JSON: Expecting value: line 2"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "line 1 of a.jsonl is not JSON: 'utf-8' codec"),
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.csv", b"", "a.csv is empty"),
        ("a.csv", b'text\n"unclosed\n', "is there and cannot be read.*EOF inside string"),
        ("a.csv", b"text,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("a.txt", b"caf\xe9\n", "not in UTF-8"),
        ("a.parquet", b"PARQ", "is there and cannot be read.*Parquet"),
        ("a.md", b"text", "must end in one of .json, .jsonl"),
        ("folder/train.jsonl", b'{"text": "a"}\n{"text": \n', "line 2 of train.jsonl is not JSON"),
    ],
)
def test_a_broken_file_says_what_is_broken(
    tmp_path: Path, name: str, content: bytes, words: str, streaming: bool
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    named = path.parent if "/" in name else path
    with pytest.raises(ValueError, match=f"'{named}' cannot be loaded: .*{words}"):
        load(named, dataset_streaming=streaming)


def test_a_name_may_have_brackets(tmp_path: Path) -> None:
    path = tmp_path / "e[1].jsonl"
    path.write_text('{"text": "a"}\n')
    assert load(path)["train"].to_list() == load_split(str(path)).to_list() == [{"text": "a"}]


@pytest.mark.parametrize("part", ["train[:0]", "train[5:9]", "train[2:1]"])
def test_a_part_without_rows_is_refused(tmp_path: Path, part: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 2)
    with pytest.raises(ValueError, match=r"'train\[.*\]' has no rows: there are 2 in 'train'"):
        load(path, dataset_train_split=part)
    with pytest.raises(ValueError, match="has no rows"):
        load_split(f"{path}:{part}")


@pytest.mark.parametrize("part", ["train[:1]+train[1:]", "train[", "train[:200%]"])
def test_what_is_no_part_is_said_with_an_example(tmp_path: Path, part: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n' * 2)
    with pytest.raises(ValueError, match=r"is no part of 'train', such as train\[:500\]"):
        load(path, dataset_train_split=part)
