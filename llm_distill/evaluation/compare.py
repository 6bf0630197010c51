"""What each model gives to every token of a text: one forward of each, and never a `[rows, vocabulary]` tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from llm_distill.divergences import ReverseKL
from llm_distill.heads import LMHead
from llm_distill.losses.fused import fused_head_loss
from llm_distill.models import kept_of, vocabulary_size
from llm_distill.ranks import ranks
from llm_distill.rows import View
from llm_distill.signals import HiddenSignal, SparseSignal, TokenSignal
from llm_distill.teachers.base import Teacher

TEACHER, TEXT = "teacher", "text_index"
OF_A_MODEL = {"ce": "teacher_ce", "confidence": "teacher_confidence", "correct": "teacher_correct"}
"""A column, and what `fused_head_loss` calls the teacher's."""
BESIDE_THE_TEACHER = {"kl": "kl", "reverse_kl": "kd", "top1_agreement": "top1_agreement", "acceptance": "acceptance"}
"""A column, and what `fused_head_loss` calls it where the divergence is reverse KL."""


class HeldOutTexts(NamedTuple):
    """A dataset that is prepared as for training, and what makes batches of it."""

    dataset: Dataset
    """It has `input_ids`, and may have a column TEXT that says of which text a row is a part."""
    collate: Callable[[Sequence[Any]], Mapping[str, Any]]
    """It makes labels, which say what counts."""
    tokenizer: PreTrainedTokenizerBase
    batch_size: int = 8
    name: str = "texts"


class Scores(NamedTuple):
    """Of one model, for each token of a dataset that counts, in the order of the texts."""

    text: NDArray[np.int64]
    """Which text, [tokens]."""
    row: NDArray[np.int64]
    """Which row of the dataset, [tokens]: a long text has several."""
    position: NDArray[np.int64]
    """Which position of the row predicts the token, [tokens]."""
    token: NDArray[np.int64]
    """Its id, [tokens]."""
    num_bytes: NDArray[np.int64]
    """UTF-8 bytes of the tokens that count of each text, [texts]."""
    columns: dict[str, NDArray[np.float32]]
    """`ce` (nats), `confidence` (the largest probability) and `correct` (0 or 1); of a student beside its teacher also
    `kl` = KL(teacher‖student), `reverse_kl`, `top1_agreement` (0 or 1) and `acceptance`; each [tokens]."""

    def per_text(self, values: NDArray[Any] | None = None) -> NDArray[np.float64]:
        """The sum over the tokens of each text, [texts]; of no values, how many tokens."""
        return np.bincount(self.text, values, minlength=len(self.num_bytes)).astype(np.float64)


@torch.no_grad()
def compare(models: Mapping[str, nn.Module], teacher: Teacher | None, texts: HeldOutTexts) -> dict[str, Scores]:
    """The scores of each model and, under `teacher`, the teacher's; on several ranks each runs its share of the texts.

    Args:
        models: causal LMs on the device they shall run on, all of the texts' tokenizer.
        teacher: prepared, with signals of the whole vocabulary; without one there are only a model's own columns.
        texts: what they read.

    Raises:
        ValueError: no token of the texts counts.
    """
    vocab_size = vocabulary_size(texts.tokenizer)
    heads = {name: LMHead.of(model, vocab_size) for name, model in models.items()}
    was_training = [model for model in models.values() if model.training]
    for model in models.values():
        model.eval()
    try:
        scored = [_score_batch(models, heads, teacher, *batch) for batch in _sorted_batches(texts)]
    finally:
        for model in was_training:
            model.train()
    parts = [part for of_rank in gather_object([scored]) for part in of_rank if part]
    if not sum(len(part["row"]) for part in parts):
        raise ValueError(f"{texts.name}: none of its {len(texts.dataset)} texts has a token to predict.")
    return _join(parts, texts)


def _sorted_batches(texts: HeldOutTexts) -> Iterator[tuple[list[int], Mapping[str, Any]]]:
    """Texts of like length together, the longest first. Each rank has as many batches as the others: what shards a
    model makes them wait for each other; where a rank's share is over, a batch comes with no index.
    """
    state, dataset, batch_size = ranks(), texts.dataset, texts.batch_size
    lengths = [length for table in dataset.select_columns(["input_ids"]).with_format("arrow").iter(10_000)
               for length in pc.list_value_length(table["input_ids"]).to_pylist()]  # fmt: skip
    order = sorted(range(len(dataset)), key=lambda i: (-lengths[i], i))
    own = order[state.process_index :: state.num_processes]
    rounds = -(-len(dataset) // (batch_size * state.num_processes))
    bar = tqdm(range(rounds), desc=f"Scoring {texts.name}", leave=False, disable=not state.is_local_main_process)
    for start in bar:
        indices = own[start * batch_size : (start + 1) * batch_size]
        yield indices, texts.collate([dataset[i] for i in indices or order[:1]])


def _score_batch(
    models: Mapping[str, nn.Module],
    heads: Mapping[str, LMHead],
    teacher: Teacher | None,
    indices: list[int],
    batch: Mapping[str, Any],
) -> dict[str, Any]:
    device = next(next(iter(models.values())).parameters()).device
    view = View.of(batch).to(device)
    rows = view.positions
    signal = None if teacher is None else teacher.score(View.of_teacher(batch).to(device))
    if isinstance(signal, SparseSignal | TokenSignal):
        raise ValueError("the teacher tells a part of its distribution alone: load it whole to compare with it.")
    columns: dict[str, dict[str, Tensor]] = {}
    for name, model in models.items():
        hidden = kept_of(model, heads[name], view).hidden
        reference = HiddenSignal(hidden, heads[name]) if signal is None else signal  # itself, for its confidence
        _, metrics = fused_head_loss(hidden, heads[name], reference, ReverseKL(), targets=rows.targets)
        if signal is not None:
            columns[TEACHER] = {column: metrics[metric] for column, metric in OF_A_MODEL.items()}
        beside_teacher = {} if signal is None else BESIDE_THE_TEACHER
        columns[name] = {column: metrics[column] for column in OF_A_MODEL}
        if "outside_loss" in metrics:
            columns[name]["ce"] = metrics["ce"] - metrics["outside_loss"]  # over the vocabulary, as the teacher's
        columns[name] |= {column: metrics[metric] for column, metric in beside_teacher.items()}
    if not indices:
        return {}
    return {
        "row": np.asarray(indices)[rows.sample.cpu().numpy()],
        "position": rows.position.cpu().numpy(),
        "token": rows.targets.cpu().numpy(),
        "models": {
            name: {column: values.float().cpu().numpy() for column, values in of_model.items()}
            for name, of_model in columns.items()
        },
    }


def _join(parts: list[dict[str, Any]], texts: HeldOutTexts) -> dict[str, Scores]:
    """All ranks' batches as if the texts had come one after the other."""
    dataset = texts.dataset
    numbers = dataset[TEXT] if TEXT in dataset.column_names else range(len(dataset))
    text_of_row = np.unique(np.asarray(numbers), return_inverse=True)[1]  # some texts may have been left out
    joined = {key: np.concatenate([part[key] for part in parts]) for key in ("row", "position", "token")}
    order = np.lexsort((joined["position"], joined["row"]))
    row, position, token = (joined[key][order] for key in ("row", "position", "token"))
    text = text_of_row[row]
    ends = np.cumsum(np.bincount(text, minlength=text_of_row.max() + 1))
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    pieces = texts.tokenizer.batch_decode(np.split(token, ends[:-1]), **options)
    num_bytes = np.array([len(piece.encode()) for piece in pieces])
    return {
        name: Scores(
            *(text, row, position, token, num_bytes),
            columns={
                column: np.concatenate([part["models"][name][column] for part in parts])[order] for column in columns
            },
        )
        for name, columns in parts[0]["models"].items()
    }
