"""Where a model speaks: the one place where labels are shifted.

Position t predicts token t+1, so the positions that count are those whose *next* label is not -100. They are found once
a view; everything after this file speaks of N rows and never of padding, masks or shifts again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = -100
KEY_BYTES = 16
SIGNAL = "signal"
"""Where a batch carries what its teacher's reader has fetched for it; see `Teacher.reader`."""
TEACHER = "teacher"
"""Where a batch carries what the teacher reads in place of the student's text: a batch too; see `View.of_teacher`."""
SKIPPED = "skipped"
"""In what lies under SIGNAL, if labels were masked there: of how many rows, [batch]."""
TEACHER_OF_ROW = "teacher_of_row"
"""In what lies under SIGNAL, where each row has a teacher of its own: its number among those of a mixture, [batch]."""
WRITTEN = "written"
"""Where a batch says which of its sequences the student wrote, [batch]; no model sees it."""
WEIGHTS = "weights"
"""Where a batch says what each of its labels weighs in the loss, [batch, time], if it is not 1 each."""

GROUPS = "groups"
"""Where a batch, and what its teacher reads in other tokens, says in which group of tokens each label is, [batch,
time]: those of one number end at the same byte; -1 is none."""

NO_INPUTS = ("labels", SIGNAL, TEACHER, WRITTEN, WEIGHTS, GROUPS)
"""What a batch carries that no model's forward takes."""

Batch = Mapping[str, Any]
"""What the collator made: `input_ids`, `labels` and either `attention_mask` or, packed, `position_ids`."""


class Positions(NamedTuple):
    """The N positions that count, in reading order."""

    sample: Int[Tensor, " rows"]
    """Which sequence of the batch."""
    position: Int[Tensor, " rows"]
    """Which position t in it."""
    targets: Int[Tensor, " rows"]
    """The token at t+1."""
    start: Int[Tensor, " rows"]
    """At which position of that sequence its text begins: later than 0 after padding, or after other documents."""
    weights: Float[Tensor, " rows"] | None = None
    """What each weighs in the loss; None for 1 each."""

    def select(self, rows: Tensor) -> Positions:
        """The same of some rows, by a mask or by their numbers."""
        return Positions._make(None if values is None else values[rows] for values in self)


class View(NamedTuple):
    """What a model reads, and where it speaks. Student and teacher may have different views of the same N tokens."""

    inputs: Batch
    """What the model's forward takes."""
    positions: Positions
    fetched: Mapping[str, Tensor] | None = None
    """What the teacher's reader has put beside it, where the batch was made."""
    groups: tuple[Int[Tensor, " student_rows"], Int[Tensor, " rows"]] | None = None
    """Where the teacher reads other tokens: the group of each of the student's rows, and of each of its own."""

    @classmethod
    def of(cls, batch: Batch) -> View:
        """The view of a batch in which its labels say what counts. The device waits once, to count the rows."""
        inputs = {name: value for name, value in batch.items() if name not in NO_INPUTS}
        positions = counted_rows(batch["labels"], text_starts(inputs))
        if WEIGHTS in batch:
            positions = positions._replace(weights=batch[WEIGHTS][positions.sample, positions.position + 1])
        return cls(inputs, positions, batch.get(SIGNAL))

    @classmethod
    def of_teacher(cls, batch: Batch) -> View:
        """What the teacher reads of a batch: what the student reads, or another text with the same tokens that count,
        or the same text in other tokens.

        Raises:
            ValueError: other tokens count.
        """
        if TEACHER not in batch:
            return cls.of(batch)
        view = cls.of(batch[TEACHER])._replace(fetched=batch.get(SIGNAL))
        if GROUPS in batch:
            rows = counted_rows(batch["labels"]), view.positions
            groups = batch[GROUPS], batch[TEACHER][GROUPS]
            student, teacher = (of[at.sample, at.position + 1] for of, at in zip(groups, rows, strict=True))
            return view._replace(groups=(student, teacher))
        if not torch.equal(view.positions.targets, counted_rows(batch["labels"]).targets):
            raise ValueError(
                f"what the teacher reads of a batch (`{TEACHER}`) has other tokens that count than what the student "
                "reads. Both must have the same ones, row by row: mend the collator that made it."
            )
        return view

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that attention sees: the longest document, if several are packed."""
        return self.inputs.get("max_length_q", self.inputs["input_ids"].shape[1])

    def to(self, device: Any) -> View:
        """The same on another device."""
        return View(*send_to_device(tuple(self), device))


def counted_rows(labels: Int[Tensor, "batch time"], starts: Int[Tensor, "batch time"] | None = None) -> Positions:
    """The positions whose next label counts, with that label; `starts` says where the text at each position begins."""
    next_labels = labels[:, 1:]
    sample, position = (next_labels != IGNORED).nonzero(as_tuple=True)
    start = torch.zeros_like(position) if starts is None else starts[sample, position]
    return Positions(sample, position, next_labels[sample, position], start)


def text_starts(inputs: Batch) -> Int[Tensor, "batch time"]:
    """Where in its sequence the text at each position begins."""
    ids = inputs["input_ids"]
    if "attention_mask" in inputs:
        return inputs["attention_mask"].long().argmax(1, keepdim=True).expand_as(ids)
    if "position_ids" in inputs:
        return torch.arange(ids.shape[1], device=ids.device) - inputs["position_ids"]
    return torch.zeros_like(ids)


class Text(NamedTuple):
    """Rows that count in one text: a sequence, or one document of a packed one."""

    rows: slice
    sample: int
    """Which sequence it is in."""
    tokens: slice
    """Where it stands in that sequence, up to the last position that counts."""


def texts_of(positions: Positions) -> list[Text]:
    """The texts of a batch, in their order. The device waits once."""
    sample, position, start = torch.stack([positions.sample, positions.position, positions.start]).tolist()
    edges = [i for i in range(len(sample)) if i == 0 or (sample[i], start[i]) != (sample[i - 1], start[i - 1])]
    ends = [*edges[1:], len(sample)]
    return [
        Text(slice(first, end), sample[first], slice(start[first], position[end - 1] + 1))
        for first, end in zip(edges, ends, strict=False)
    ]


def count_rows(labels: Int[Tensor, "batch time"]) -> Int[Tensor, ""]:
    """How many positions count: what a batch's loss is divided by."""
    return (labels[:, 1:] != IGNORED).sum()


def weigh_rows(batch: Batch) -> Tensor:
    """What the positions that count weigh together: their number, unless the batch has weights."""
    if WEIGHTS not in batch:
        return count_rows(batch["labels"])
    return batch[WEIGHTS][:, 1:][batch["labels"][:, 1:] != IGNORED].sum(dtype=torch.float64)


class Example(NamedTuple):
    """What attention sees as one sequence: a row without its padding, or one document of a packed row."""

    key: bytes
    sample: int
    """Which row of the batch it is in."""
    positions: np.ndarray
    """Where it stands in that row, [tokens]."""
    counted: np.ndarray
    """Whether the next token is learned at each of its positions, [tokens]."""

    @property
    def rows(self) -> int:
        """How many of its positions count."""
        return int(self.counted.sum())


def examples_of(view: View) -> Iterator[Example]:
    """The sequences of a view that have rows that count, in the order of its positions.

    A signal is stored and looked up by their keys, never by a place in a dataset: so a cache filled from unpacked data
    serves packed training, in any order, batch size and number of ranks.
    """
    ids = _numpy(view.inputs["input_ids"])
    counts = np.zeros(ids.shape, dtype=bool)
    counts[_numpy(view.positions.sample), _numpy(view.positions.position)] = True
    for sample in np.flatnonzero(counts.any(1)):
        for positions in _sequences(view.inputs, int(sample), ids.shape[1]):
            counted = counts[sample, positions]
            if counted.any():
                yield Example(example_key(ids[sample, positions], counted), int(sample), positions, counted)


def example_key(input_ids: np.ndarray, counted: np.ndarray) -> bytes:
    """16 bytes of BLAKE2b over the ids, as little-endian 32-bit numbers, and a bit for each position that counts.

    Args:
        input_ids: [tokens].
        counted: [tokens], whether the next token is learned there.
    """
    digest = hashlib.blake2b(digest_size=KEY_BYTES, person=b"llm_distill v1")
    digest.update(len(input_ids).to_bytes(8, "little"))
    digest.update(input_ids.astype("<i4").tobytes())
    digest.update(np.packbits(counted, bitorder="little").tobytes())
    return digest.digest()


def _sequences(inputs: Batch, sample: int, length: int) -> list[np.ndarray]:
    if "attention_mask" in inputs:
        return [np.flatnonzero(_numpy(inputs["attention_mask"])[sample])]
    if "position_ids" not in inputs:
        return [np.arange(length)]
    starts = np.flatnonzero(_numpy(inputs["position_ids"])[sample] == 0)
    return np.split(np.arange(length), starts[starts > 0])


def _numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy()
