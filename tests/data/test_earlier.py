"""Texts of earlier stages: a bounded file, a uniform sample, and a share of each stage."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from llm_distill.data.earlier import FILE, EarlierTexts


def stage(name: str, rows: int = 40, length: int = 20) -> Dataset:
    end = length * "ä\u2028"
    return Dataset.from_dict({"text": [f"{name} {i} {end}" for i in range(rows)]})


def test_a_share_of_a_stage_is_drawn_from_all_before_it(tmp_path: Path) -> None:
    earlier = EarlierTexts(tmp_path, 0.25, 2**20)
    assert earlier.add_to(stage("a"))["text"] == stage("a")["text"]  # there is nothing before the first
    for name in ("a", "b"):
        earlier.remember(stage(name))
    mixed = earlier.add_to(stage("c", 60))["text"]
    assert len(mixed) == 80
    assert len(set(mixed)) == 80
    drawn = Counter(text[0] for text in mixed)
    assert drawn["c"] == 60
    assert min(drawn["a"], drawn["b"]) > 2
    assert mixed == EarlierTexts(tmp_path, 0.25, 2**20).add_to(stage("c", 60))["text"]
    assert mixed != EarlierTexts(tmp_path, 0.25, 2**20, seed=1).add_to(stage("c", 60))["text"]
    assert set(mixed) <= {text for name in "abc" for text in stage(name, 60)["text"]}


def test_the_file_never_exceeds_its_bytes_and_its_sample_is_uniform(tmp_path: Path) -> None:
    """Chi-square of which of four stages the kept rows are from, over many seeds."""
    kept: Counter[str] = Counter()
    for seed in range(12):
        earlier = EarlierTexts(tmp_path / str(seed), 0.5, 2**13, seed)
        for name in "abcd":
            earlier.remember(stage(name, 60))
            assert (earlier.folder / FILE).stat().st_size <= 2**13
        kept.update(text[0] for text in earlier.add_to(stage("e", 240))["text"])
    del kept["e"]
    mean = sum(kept.values()) / 4
    assert mean > 60
    assert sum((count - mean) ** 2 / mean for count in kept.values()) < 11.3  # 1 % of chi-square with 3 degrees


def test_a_stage_that_is_learned_again_is_remembered_once(tmp_path: Path) -> None:
    earlier = EarlierTexts(tmp_path, 0.5, 2**20)
    earlier.remember(stage("a"))
    content = (tmp_path / FILE).read_bytes()
    earlier.remember(stage("a"))
    assert (tmp_path / FILE).read_bytes() == content


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    earlier = EarlierTexts(tmp_path, 0.5, 2**20)
    earlier.remember(stage("a"))
    with pytest.raises(ValueError, match="this stage has no rows"):
        earlier.add_to(stage("b", 0))
    with pytest.raises(ValueError, match="a stream lacks"):
        earlier.add_to(stage("b").to_iterable_dataset())
    with pytest.raises(ValueError, match="holds rows with text, and this stage has completion, prompt"):
        earlier.add_to(Dataset.from_dict({"prompt": ["a"], "completion": ["b"]}))
    with pytest.raises(ValueError, match="made for 1,048,576 bytes"):
        EarlierTexts(tmp_path, 0.5, 2**21).add_to(stage("b"))
    (tmp_path / FILE).write_text("a list of texts")
    with pytest.raises(ValueError, match="cannot be gone on from"):
        earlier.add_to(stage("b"))
