"""The one place where labels are shifted."""

from __future__ import annotations

import torch

from llm_distill.rows import count_rows, counted_rows


def test_a_batch_in_which_one_token_counts_has_exactly_the_row_that_predicts_it() -> None:
    labels = torch.full((3, 6), -100)
    labels[1, 4] = 7
    rows = counted_rows(labels)
    assert (rows.sample.tolist(), rows.position.tolist(), rows.targets.tolist()) == ([1], [3], [7])
    assert count_rows(labels) == 1


def test_the_first_token_is_predicted_by_nothing() -> None:
    labels = torch.tensor([[5, -100, -100]])
    assert len(counted_rows(labels).targets) == count_rows(labels) == 0


def test_rows_come_in_reading_order() -> None:
    labels = torch.tensor([[1, 2, -100, 3], [-100, -100, 4, 5]])
    rows = counted_rows(labels)
    assert rows.sample.tolist() == [0, 0, 1, 1]
    assert rows.position.tolist() == [0, 2, 1, 2]
    assert rows.targets.tolist() == [2, 3, 4, 5]
