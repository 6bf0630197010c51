"""What became of the rows of a dataset when it was prepared: max_length may leave nothing of them to learn."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, IterableDataset

from llm_distill.config import DistillationConfig
from llm_distill.data.problems import LENGTHS
from llm_distill.data.validate import BATCH
from llm_distill.ranks import ranks
from llm_distill.rows import IGNORED

logger = logging.getLogger(__name__)


class RowCounts(NamedTuple):
    """Of one dataset."""

    rows: int
    """Before it was prepared."""
    lost: int
    """Those in which nothing is left to learn, because max_length ends within their prompts or all is masked."""
    cut: int
    """Those that fill max_length: most likely they were longer."""

    def __str__(self) -> str:
        return f"nothing is left to learn in {self.lost:,} of {self.rows:,} rows, and {self.cut:,} fill max_length"


class StreamCounts:
    """What has become of a stream's rows, as far as it has come. In shared memory, as loaders in other processes count
    too. Of rows that are packed nothing is known, as some have come and wait for others.
    """

    def __init__(self, args: DistillationConfig) -> None:
        self.max_length, self.is_counted = args.max_length, not args.packing
        self._numbers = torch.zeros(3, dtype=torch.int64).share_memory_()

    def before(self, dataset: Any) -> Any:
        """What TRL is to prepare; a stream is counted on the way."""
        return dataset.filter(self._comes) if self._counts(dataset) else dataset

    def after(self, dataset: Any) -> Any:
        """The same, prepared."""
        return dataset.filter(self._is_left) if self._counts(dataset) else dataset

    def reset(self) -> None:
        """Begins anew, as what looks into a stream has it come again from its start."""
        self._numbers.zero_()

    def counts(self) -> RowCounts | None:
        """None if no row of a stream has come."""
        rows, left, cut = self._numbers.tolist()
        return RowCounts(rows, rows - left, cut) if rows else None

    def warn(self) -> None:
        """Tells of rows that are lost."""
        if (counts := self.counts()) and counts.lost and ranks().is_main_process:
            logger.warning("of the stream so far: %s=%s. A larger max_length keeps them.", counts, self.max_length)

    def _counts(self, dataset: Any) -> bool:
        return self.is_counted and isinstance(dataset, IterableDataset)

    def _comes(self, row: Mapping[str, Any]) -> bool:
        self._numbers[0] += 1
        return True

    def _is_left(self, row: Mapping[str, Any]) -> bool:
        self._numbers[1] += any(label != IGNORED for label in row["labels"][1:])
        self._numbers[2] += len(row["labels"]) == self.max_length
        return True


def count_rows_left(
    before: Mapping[str, Any], after: Mapping[str, Any], args: DistillationConfig
) -> dict[str, RowCounts]:
    """Of each dataset that was prepared, by name; warns of those of which rows are lost. Streams are not counted (see
    `StreamCounts`), nor rows that were cut into several, which loses none of them.
    """
    counts = {}
    for name, dataset in after.items():
        packs = args.packing if name == "train" or args.eval_packing is None else args.eval_packing
        if packs and args.packing_strategy == "wrapped":
            continue
        if (counted := _count(before.get(name), dataset, args.max_length)) is None:
            continue
        counts[name] = counted
        if counted.lost and ranks().is_main_process:
            logger.warning("the %s dataset: %s=%s. A larger max_length keeps them.", name, counted, args.max_length)
    return counts


def _count(before: Any, after: Any, max_length: int | None) -> RowCounts | None:
    if not (isinstance(before, Dataset) and isinstance(after, Dataset)) or "labels" not in after.column_names:
        return None
    is_packed = LENGTHS in after.column_names
    left = cut = documents = 0
    columns = ["labels", LENGTHS] if is_packed else ["labels"]
    for table in after.select_columns(columns).with_format("arrow").iter(batch_size=BATCH):
        labels = table["labels"].combine_chunks()
        lengths = table[LENGTHS].combine_chunks().flatten() if is_packed else pc.list_value_length(labels)
        lengths = lengths.to_numpy()
        lengths = lengths[lengths > 0]
        starts = np.cumsum(lengths) - lengths
        counts = labels.flatten().to_numpy() != IGNORED
        counts[starts] = False  # nothing predicts a first token
        left += int(np.logical_or.reduceat(counts, starts).sum()) if len(starts) else 0
        documents += len(lengths)
        cut += int((lengths == max_length).sum())
    if documents > len(before) or (is_packed and LENGTHS in before.column_names):
        return None  # split into several, or packed beforehand
    return RowCounts(len(before), len(before) - left, cut)
