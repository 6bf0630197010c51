"""Texts of earlier stages of training, which are learned from again beside new ones, so that less is forgotten."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, concatenate_datasets

from llm_distill.data.replay import Reservoir
from llm_distill.files import replacing
from llm_distill.ranks import run_on_first_rank

FILE = "earlier_texts.jsonl"
HEADER_BYTES, ROW_BYTES = 4096, 32
"""Room in the file for its first line, and in each other line for what stands beside the row."""
STAGES_NAMED = 40
"""Of so many stages, the last ones, the first line tells which they were."""


@dataclass
class EarlierTexts:
    """A uniform sample of the rows of all stages so far, in a file of bounded size.

    Args:
        folder: where the file lies, or will.
        share: of the rows of a stage that are earlier ones, below 1.
        max_bytes: of the file.
        seed: of which rows a stage learns from again, and in the first stage of what is kept.
    """

    folder: Path
    share: float
    max_bytes: int
    seed: int = 0
    stage: Dataset = field(init=False, repr=False)
    """The rows that `add_to` was given last."""

    def add_to(self, dataset: Dataset) -> Dataset:
        """The rows of a new stage with earlier ones among them: their share, or as many as there are.

        Raises:
            ValueError: a stream, no rows, other columns than before, or a file that is none of ours.
        """
        if not isinstance(dataset, Dataset):
            raise ValueError("earlier_texts: a share of the rows of a stage needs their number, which a stream lacks.")
        if not len(dataset):
            raise ValueError("this stage has no rows: leave it out of the sequence, or give it texts.")
        self.stage = dataset
        reservoir, _ = self._read()
        count = round(len(dataset) * self.share / (1 - self.share))
        rows = [json.loads(text) for text in reservoir.sample(count, self.seed + reservoir.seen)]
        if not rows:
            return dataset
        if set(rows[0]) != set(dataset.column_names):
            raise ValueError(
                f"{self.folder / FILE} holds rows with {', '.join(sorted(rows[0]))}, and this stage has "
                f"{', '.join(sorted(dataset.column_names))}: keep each kind of data in a folder of its own."
            )
        again = Dataset.from_list(rows, features=dataset.features)
        return concatenate_datasets([dataset, again]).shuffle(seed=self.seed)

    def remember(self, dataset: Dataset) -> None:
        """Adds a stage that has been learned, once. Raises ValueError for a row larger than the file may be."""
        texts = [json.dumps(row, ensure_ascii=False) for row in dataset]
        name = hashlib.sha256("\n".join(texts).encode()).hexdigest()[:32]

        def add() -> None:
            reservoir, stages = self._read()
            if name not in stages:
                reservoir.add(texts)
                self._write(reservoir, [*stages, name])

        run_on_first_rank(add)

    def _read(self) -> tuple[Reservoir[str], list[str]]:
        """What is kept, and of which stages."""
        path, capacity = self.folder / FILE, self.max_bytes - HEADER_BYTES
        if not path.is_file():
            return Reservoir[str](capacity, self.seed, _size_of), []
        try:
            header, *rows = map(json.loads, path.read_text(encoding="utf-8").rstrip("\n").split("\n"))
            if header["max_bytes"] != self.max_bytes:
                raise ValueError(f"it was made for {header['max_bytes']:,} bytes, and asked for are {self.max_bytes:,}")
            reservoir = Reservoir[str](capacity, header["seed"], _size_of)
            kept = [(place, json.dumps(row, ensure_ascii=False)) for place, row in rows]
            reservoir.load({"seen": header["seen"], "limit": header["limit"], "kept": kept})
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be gone on from: {error}. Name another folder.") from error
        return reservoir, header["stages"]

    def _write(self, reservoir: Reservoir[str], stages: list[str]) -> None:
        state: dict[str, Any] = reservoir.state()
        header = {"max_bytes": self.max_bytes, "seed": reservoir.seed, "seen": state["seen"], "limit": state["limit"]}
        lines = [json.dumps(header | {"stages": stages[-STAGES_NAMED:]})]
        lines += [f"[{place}, {text}]" for place, text in state["kept"]]
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(self.folder / FILE) as temporary:
            temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _size_of(text: str) -> int:
    """Bytes of a row's line."""
    return len(text.encode()) + ROW_BYTES
