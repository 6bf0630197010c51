"""One dataset of the gap report: the scores of all models on it, what they say, and where to look."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from llm_distill.evaluation.compare import TEXT, HeldOutTexts, Scores, compare
from llm_distill.evaluation.figures import DomainFigures, domain_figures
from llm_distill.evaluation.passages import furthest_passages
from llm_distill.ranks import ranks
from llm_distill.teachers.base import Teacher


def measure_domain(
    models: Mapping[str, nn.Module], teacher: Teacher, texts: HeldOutTexts, others: Mapping[str, Scores] | None = None
) -> DomainFigures:
    """Quality, likeness and calibration on one dataset, by models that share a tokenizer.

    Args:
        models: the `student` and, if there is one of this tokenizer, the `baseline`.
        others: of one with other tokens, its scores.

    Raises:
        ValueError: no token of the dataset counts.
    """
    scores = compare(models, teacher, texts) | dict(others or {})
    domain = domain_figures(scores, comparable=True)
    for token in domain["furthest_tokens"]:
        token["token"] = texts.tokenizer.decode([token.pop("id")])
    if ranks().is_main_process:
        domain["passages"] = furthest_passages(scores, models["student"], teacher, texts)
    return domain


def split_into_windows(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Whole texts as rows of at most `length` tokens, so that the end of a long one counts too. Each token is predicted
    once: a row begins with the last token of the one before, or with the start token of a tokenizer that has one.
    """
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], TEXT: []}
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for index, text in enumerate(dataset["text"]):
        ids = tokenizer(text)["input_ids"]
        start = ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []
        ids = [*ids, *(end if ids[-1:] != end else [])]
        step = length - 1
        for first in range(len(start), len(ids) - (not start), step):
            row = [*start, *ids[first : first + step + (not start)]]
            rows["input_ids"].append(row)
            rows["labels"].append(row)
            rows[TEXT].append(index)
    return Dataset.from_dict(rows)


def usable_rows(dataset: Dataset) -> Dataset:
    """The rows with something to read: a text, a prompt with its completion, or messages."""
    columns = [name for name in ("prompt", "completion", "messages", "text") if name in dataset.column_names]
    read = columns[:2] if columns[:1] == ["prompt"] else columns[:1]
    rows = dataset.select_columns(read) if read else []
    return dataset.select([i for i, row in enumerate(rows) if all(map(_is_content, row.values()))]) if read else dataset


def _is_content(value: Any) -> bool:
    """A text, or the messages of a conversation."""
    if isinstance(value, str):
        return bool(value.strip())
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and "role" in m for m in value)


def sample_texts(dataset: Any, most: int | None, seed: int = 0) -> Dataset:
    """At most that many texts from all over a dataset, in its order; of a stream the first."""
    if not isinstance(dataset, Dataset):
        return Dataset.from_list(list(dataset.take(most) if most else dataset))
    if most is None or len(dataset) <= most:
        return dataset
    return dataset.select(np.sort(np.random.default_rng(seed).permutation(len(dataset))[:most]))
