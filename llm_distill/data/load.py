"""Datasets by name: of the Hub, a folder, a file, or the embedded corpus."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from trl import ScriptArguments


HELD_OUT = ("test", "validation", "train")
"""Splits to evaluate on, the first that is there."""


def load_data(script: ScriptArguments, tokenizer: Callable[[], Any] | None = None) -> DatasetDict:
    """The dataset that `--dataset_name` means. Of a folder of generated texts, a student with the teacher's tokenizer
    (`tokenizer` loads it) gets the teacher's own tokens. A split may be a part, as `datasets` writes it: `test[:500]`.

    Raises:
        ValueError: it cannot be loaded, or has no training split of that name.
    """
    from datasets import DatasetDict

    name = script.dataset_name
    if Path(name, "generation.json").is_file() and tokenizer is not None:
        from llm_distill.generation.run import load_generated

        return DatasetDict({script.dataset_train_split: load_generated(name, tokenizer())})
    data = _loaded(name, script.dataset_config, script.dataset_streaming)
    for split in (script.dataset_train_split, script.dataset_test_split):
        if isinstance(data, DatasetDict):
            _add_part(data, split)
    if script.dataset_train_split not in data:
        raise ValueError(f"the dataset {name!r} has no split {script.dataset_train_split!r}, only {', '.join(data)}.")
    return data


def load_split(source: str) -> Dataset:
    """One split of a dataset, or a part of one: what `SOURCE:SPLIT` names; of `SOURCE` alone the first of HELD_OUT.

    Raises:
        ValueError: it cannot be loaded, or has no such split.
    """
    match = None if Path(source).exists() else re.fullmatch(r"(.+?):(\w+(?:\[.*\])?)", source)
    name, split = match.groups() if match else (source, "")
    data = _loaded(name)
    split = split or next((held_out for held_out in HELD_OUT if held_out in data), "")
    _add_part(data, split)
    if split not in data:
        wanted = f"no split {split!r}" if split else f"none of the splits {', '.join(HELD_OUT)}"
        raise ValueError(f"the dataset {name!r} has {wanted}, only {', '.join(data)}. Name one: {name}:SPLIT.")
    return data[split]


def _loaded(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict:
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetsError

    from llm_distill.data import corpus

    kinds = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
    try:
        if name == corpus.NAME:
            data = corpus.load_corpus(max_characters=corpus.TRIAL_CHARACTERS)
        elif Path(name).is_file() and Path(name).suffix in kinds:
            data = load_dataset(kinds[Path(name).suffix], data_files=name, streaming=streaming)
        else:
            data = load_dataset(name, name=config, streaming=streaming)
    except (OSError, ValueError, ConnectionError, DatasetsError, StopIteration) as error:  # the last of an empty file
        raise ValueError(
            f"the dataset {name!r} cannot be loaded: it is no file, no folder with data, no repository that can be "
            f"reached, and not `{corpus.NAME}`. ({error})"
        ) from error
    return data if streaming else DatasetDict(data)


def _add_part(data: DatasetDict, split: str) -> None:
    """Under its name, what `split` means, if it is a part of one that is there."""
    from datasets import ReadInstruction

    whole = split.partition("[")[0]
    if split not in data and whole in data:
        (part,) = ReadInstruction.from_spec(split).to_absolute({whole: len(data[whole])})
        data[split] = data[whole].select(range(part.from_, part.to))
