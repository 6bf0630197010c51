"""A task and a few examples, in small: what the teacher writes is learned from beside them."""

from __future__ import annotations

from pathlib import Path

import few_samples
import pytest
from few_samples import Sizes, compare


def test_each_way_of_learning_is_shown_beside_the_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_samples, "FOLDER", tmp_path)
    has_three_digits = lambda prompt, completion, row: len(completion) == 3  # noqa: E731  so small, it cannot add
    monkeypatch.setattr(few_samples, "is_right", has_three_digits)
    sizes = Sizes(48, 16, taught=3000, held_out=20, teacher_steps=250, student_steps=4, asked=200, batch=32)
    right, table = compare([20], 1, sizes)
    assert list(right["students"]["20"]) == ["fine-tuned", "sequence-level", "then on-policy"]
    assert table.splitlines()[0] == "| examples | fine-tuned | sequence-level | then on-policy |"
    assert right["teacher"] > 0.5, "it writes sums of the form that it was taught"
