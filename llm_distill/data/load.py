"""Datasets by name: of the Hub, a folder, a file, or the embedded corpus."""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from trl import ScriptArguments


KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""What reads a file, by the end of its name."""
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


def load_split(source: str, preferred: Sequence[str] = HELD_OUT) -> Dataset:
    """One split of a dataset, or a part of one: what `SOURCE:SPLIT` names; of `SOURCE` alone the first of `preferred`.

    Raises:
        ValueError: it cannot be loaded, or has no such split.
    """
    match = None if Path(source).exists() else re.fullmatch(r"(.+?):(\w+(?:\[.*\])?)", source)
    name, split = match.groups() if match else (source, "")
    data = _loaded(name)
    split = split or next((name for name in preferred if name in data), "")
    _add_part(data, split)
    if split not in data:
        wanted = f"no split {split!r}" if split else f"none of the splits {', '.join(preferred)}"
        raise ValueError(f"the dataset {name!r} has {wanted}, only {', '.join(data)}. Name one: {name}:SPLIT.")
    return data[split]


def _loaded(name: str, config: str | None = None, streaming: bool = False) -> DatasetDict:
    from datasets import DatasetDict, load_dataset
    from datasets.exceptions import DatasetsError

    from llm_distill.data import corpus

    path = Path(name)
    try:
        if name == corpus.NAME:
            data = corpus.load_corpus(max_characters=corpus.TRIAL_CHARACTERS)
        elif path.is_file() and path.suffix in KINDS:
            data = load_dataset(KINDS[path.suffix], data_files=glob.escape(name), streaming=streaming)
        else:
            data = load_dataset(name, name=config, streaming=streaming)
        for split in data.values() if path.exists() else ():
            _require_readable(split)
    except (OSError, ValueError, DatasetsError, StopIteration) as error:  # the last of an empty file
        raise ValueError(f"the dataset {name!r} cannot be loaded: {_reason(path, error)}") from error
    return data if streaming else DatasetDict(data)


def _require_readable(split: Any) -> None:
    """Raises ValueError where a file's bytes are no text, or the first rows of a stream are none."""
    from datasets import Dataset

    if isinstance(split, Dataset):
        for table in split.with_format("arrow").iter(batch_size=10_000):
            table.validate(full=True)
    else:
        next(iter(split), None)


def _reason(path: Path, error: BaseException) -> str:
    """Why a file, a folder or a repository cannot be loaded, in a line."""
    from llm_distill.data import corpus

    while error.__cause__ is not None:
        error = error.__cause__
    if not path.exists():
        nowhere = f"it is no file, no folder with data, no repository that can be reached, and not `{corpus.NAME}`. "
        return f"{nowhere if isinstance(error, OSError) else ''}({error})"
    if path.is_file() and path.suffix not in KINDS:
        return f"the file is there, and its name must end in one of {', '.join(KINDS)}."
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    if empty := [file.name for file in files if file.is_file() and file.suffix in KINDS and not file.stat().st_size]:
        return f"{empty[0]} is empty."
    broken = (_broken_json(file) for file in files if KINDS.get(file.suffix) == "json")
    if problem := next(filter(None, broken), None):
        return problem
    if isinstance(error, UnicodeDecodeError):
        return f"it is not in UTF-8: save it so. ({error})"
    return f"it is there and cannot be read. ({str(error) or 'It has no rows.'})"


def _broken_json(path: Path) -> str | None:
    """What is wrong with the first line that is not JSON, if one is not; of one long list, where it breaks off."""
    with path.open("rb") as file:
        if file.read(64).lstrip().startswith(b"["):
            try:
                json.loads(path.read_bytes())
            except ValueError as error:
                return f"{path.name} is not JSON: {error}."
            return None
        file.seek(0)
        for number, line in enumerate(file, 1):
            try:
                if line.strip() and not isinstance(json.loads(line), dict):
                    return f'line {number} of {path.name} is not an object with columns, such as {{"text": …}}.'
            except ValueError as error:
                return f"line {number} of {path.name} is not JSON: {getattr(error, 'msg', error)}."
    return None


def _add_part(data: DatasetDict, split: str) -> None:
    """Under its name, what `split` means, if it is a part of one that is there."""
    from datasets import ReadInstruction

    whole = split.partition("[")[0]
    if split in data or whole not in data:
        return
    rows = len(data[whole])
    try:
        (part,) = ReadInstruction.from_spec(split).to_absolute({whole: rows})
    except ValueError as error:
        raise ValueError(
            f"{split!r} is no part of {whole!r}, such as {whole}[:500] or {whole}[:10%]: {error}"
        ) from error
    if part.from_ >= part.to:
        raise ValueError(f"{split!r} has no rows: there are {rows:,} in {whole!r}.")
    data[split] = data[whole].select(range(part.from_, part.to))
