"""The report's figures as modules of `evaluate`: `evaluate.load(str(METRICS / "calibration"))`, and combinable.

    metrics = evaluate.combine([evaluate.load(str(METRICS / name)) for name in ("held_out_loss", "teacher_likeness")])
    metrics.add_batch(**rows_of(scores["student"]))
    metrics.compute()

They take a row for each text, of the columns of `Scores`; `rows_of` gives those of what `compare` has measured.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_distill.evaluation.compare import Scores

METRICS = Path(__file__).parent


def rows_of(scores: Scores) -> dict[str, list[Any]]:
    """A row for each text: its columns, each a list over its tokens, and its `num_bytes`."""
    ends = np.cumsum(scores.per_text()).astype(int)[:-1]
    columns = {name: np.split(values, ends) for name, values in scores.columns.items()}
    return columns | {"num_bytes": scores.num_bytes.tolist()}


def scores_of(num_bytes: NDArray[np.int64] | None = None, **columns: Iterable[Any]) -> Scores:
    """Back from rows."""
    rows = {name: [np.asarray(row, dtype=np.float32) for row in values] for name, values in columns.items()}
    lengths = [len(row) for row in next(iter(rows.values()))]
    if any([len(row) for row in texts] != lengths for texts in rows.values()):
        raise ValueError(f"{', '.join(rows)}: each text must have as many tokens in one as in the others.")
    text = np.repeat(np.arange(len(lengths)), lengths)
    return Scores(
        text=text,
        row=text,
        position=np.concatenate([np.arange(length) for length in lengths]),
        token=np.zeros_like(text),
        num_bytes=np.zeros(len(lengths), dtype=np.int64) if num_bytes is None else num_bytes,
        columns={name: np.concatenate(texts) for name, texts in rows.items()},
    )
