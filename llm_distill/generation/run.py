"""The teacher writes, filters keep, and every step is on disk: `llm-distill generate`."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Json, List, Value
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from llm_distill.files import locked, replacing, write_atomically
from llm_distill.generation.engines.base import Completion, Engine
from llm_distill.generation.engines.endpoint import BudgetReachedError
from llm_distill.generation.filters import Candidate, Filter, IndependentFilter
from llm_distill.generation.journal import Journal, JournalEntries, open_folder, read_settings, save_settings
from llm_distill.generation.prompts import Prompt
from llm_distill.models import describe_tokenizer
from llm_distill.ranks import ranks
from llm_distill.rows import IGNORED
from llm_distill.servers import RefusedError
from llm_distill.tables import Table

logger = logging.getLogger(__name__)

ACCEPTED, REJECTED, REPORT = "train.parquet", "rejected.parquet", "report.json"
ROWS_AT_ONCE = 2048
TRAINED = ("prompt", "completion", "tools", "chat_template_kwargs")
"""Columns that a training run reads, of those that are there."""
FEATURES = {
    "prompt_id": Value("string"),
    "sample": Value("int64"),
    "finished": Value("bool"),
    "tokens": Value("int64"),
    "mean_log_prob": Value("float64"),
    "seed": Value("int64"),
    "time": Value("float64"),
    "teacher": Value("string"),
    "prompt_ids": List(Value("int64")),
    "completion_ids": List(Value("int64")),
}
"""Of the columns that all datasets of generated texts have."""
MESSAGE_FEATURES = {"reasoning_content": Value("string"), "tool_calls": List(Json())}
"""Of what a message may have besides role and content."""


class GenerationReport(NamedTuple):
    """What came of a run, over all its parts."""

    prompts: int
    unanswered: dict[str, int]
    """Prompts without a completion, by reason."""
    written: int
    """Completions."""
    accepted: int
    rejected: dict[str, int]
    """By the filter that rejected them."""
    tokens: int
    cost: float
    complete: bool

    def as_markdown(self) -> str:
        accepted = f"{self.accepted:,} ({self.accepted / max(self.written, 1):.1%})"
        rejected = [(f"rejected: {name}", f"{count:,}") for name, count in self.rejected.items()]
        rows = [("written", f"{self.written:,}"), *rejected, ("accepted", accepted)]
        text = Table(["", "completions"], rows).markdown()
        for reason, count in self.unanswered.items():
            text += f"\n\nWithout an answer: {count:,} prompts, {reason}."
        cost = f", cost {self.cost:.4f}" if self.cost else ""
        return f"{text}\n\n{self.prompts:,} prompts, {self.tokens:,} tokens{cost}."


def generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    folder: str | Path,
    *,
    filters: Mapping[str, Filter] | None = None,
    retry_refused: bool = False,
) -> GenerationReport:
    """Has every prompt answered that is not yet, filters all answers anew, and leaves in `folder`

    - `train.parquet`: what was accepted, with prompt, completion and where each comes from,
    - `rejected.parquet`: the others, each with its `reason`,
    - `report.json`: how many of what,
    - `generation.json` and journals: the settings and the answers as they came.

    Args:
        engine: who writes; transformers on every rank of accelerate, others in one process.
        prompts: the same on every rank.
        folder: of this run; the same call goes on where a kill stopped it.
        filters: by name, in the order in which they are asked.
        retry_refused: asks those prompts again that were refused, or whose answers could not be used.

    Raises:
        ValueError: no prompts, none that fits, columns that a file cannot hold, a folder of another configuration,
            another run at work in it, several ranks for an engine that is one process.
        BudgetReachedError, RefusedError, ConnectionError: the budget is used up, or the server answers no longer. What
            has arrived until then is filtered and written before.
        OSError: the disk is full, or cannot be written. What has arrived stays.
    """
    if not prompts:
        raise ValueError("there are no prompts: is the dataset empty, or every text shorter than prompt_tokens?")
    state, folder, filters = ranks(), Path(folder), filters or {}
    if state.num_processes > 1 and not engine.runs_on_every_rank:
        raise ValueError(
            f"a {type(engine).__name__} does all by itself, and this is a launch of {state.num_processes} ranks: run "
            "`llm-distill generate` (or --stage generate of the recipe) in one process."
        )
    features = _features_of(prompts)
    settings = {
        "teacher": engine.describe(),
        "sampling": asdict(engine.sampling),
        "tokenizer": None if engine.tokenizer is None else describe_tokenizer(engine.tokenizer),
        "llm_distill": version("llm-distill"),
    }
    with locked(folder, "another run") if state.is_main_process else nullcontext():
        if state.is_main_process:
            open_folder(folder, settings)
        state.wait_for_everyone()
        interruption: BudgetReachedError | RefusedError | ConnectionError | None = None
        try:
            try:
                _write_answers(engine, prompts, folder, filters, retry_refused)
            except (BudgetReachedError, RefusedError, ConnectionError) as error:
                interruption = error
            state.wait_for_everyone()
            if state.is_main_process:
                _write_texts(prompts, folder, filters, settings, features)
        except OSError as error:
            raise OSError(
                f"{folder} could not be written ({error.strerror or error}). What has arrived stays, and the same "
                "command goes on."
            ) from error
        state.wait_for_everyone()
        report = read_report(folder)
    if interruption is not None:
        raise interruption
    if not report.written and report.unanswered:
        raise ValueError(f"no prompt was answered: {'; '.join(report.unanswered)}.")
    return report


def read_report(folder: str | Path) -> GenerationReport:
    return GenerationReport(**json.loads(Path(folder, REPORT).read_text()))


def _write_answers(
    engine: Engine, prompts: Sequence[Prompt], folder: Path, filters: Mapping[str, Filter], retry_refused: bool
) -> None:
    state, entries = ranks(), JournalEntries(folder)
    state.wait_for_everyone()  # so that all have seen the same
    again = entries.refused if retry_refused else ()
    left = [prompt for prompt in prompts if prompt.id not in entries or prompt.id in again]
    if not left:
        return
    engine.check()
    left = left[state.process_index :: state.num_processes]
    independent = {name: keep for name, keep in filters.items() if isinstance(keep, IndependentFilter)}
    provenance = {"seed": engine.sampling.seed, "teacher": engine.describe().get("model")}
    began, tokens, accepted, written, cost = time.perf_counter(), 0, 0, 0, entries.cost
    with (
        closing(Journal(folder)) as journal,
        tqdm(total=len(left), desc="Writing", unit=" prompts", disable=not state.is_main_process) as bar,
    ):
        for answer in engine.write(left):
            journal.append(answer, **provenance, time=time.time())
            tokens += sum(completion.tokens for completion in answer.completions)
            cost += answer.cost
            written += len(answer.completions)
            accepted += sum(
                reason is None for _, reason in apply_filters(answer.prompt, answer.completions, independent)
            )
            bar.update()
            share = f", {accepted / max(written, 1):.0%} accepted" if independent else ""
            spent = f", cost {cost:.4f}" if cost else ""
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):,.0f} tokens/s{share}{spent}", refresh=False)


def apply_filters(
    prompt: Prompt, completions: Sequence[Completion], filters: Mapping[str, Filter]
) -> list[tuple[Candidate, str | None]]:
    """Each completion as the filters leave it, with the name of the one that rejected it."""
    candidates = [
        Candidate(prompt.content, prompt.row, text, finished, tokens, mean_log_prob, extra)
        for text, finished, tokens, _, mean_log_prob, extra in completions
    ]
    reasons: list[str | None] = [None] * len(candidates)
    for name, keep in filters.items():
        places = [place for place, reason in enumerate(reasons) if reason is None]
        if not places:
            break
        for place, candidate in zip(places, keep([candidates[place] for place in places]), strict=True):
            if candidate is None:
                reasons[place] = name
            else:
                candidates[place] = candidate
    return list(zip(candidates, reasons, strict=True))


def _write_texts(
    prompts: Sequence[Prompt],
    folder: Path,
    filters: Mapping[str, Filter],
    settings: dict[str, Any],
    features: dict[str, Any],
) -> None:
    """Filters all answers, and writes what is accepted, what is rejected, the report and the settings."""
    entries, by_id = JournalEntries(folder), {prompt.id: prompt for prompt in prompts}
    unanswered, rejected = Counter[str](), Counter[str](dict.fromkeys(filters, 0))
    accepted = written = tokens = 0
    about, count = {"llm_distill": json.dumps(settings)}, len(by_id)
    is_chat = not isinstance(prompts[0].content, str)
    message = {"role": Value("string"), "content": Value("string")}
    message |= {name: MESSAGE_FEATURES[name] for name in MESSAGE_FEATURES if name in entries.extra}
    features = {**features, "completion": List(message) if is_chat else Value("string")}
    with (
        replacing(folder / ACCEPTED) as accepted_path,
        replacing(folder / REJECTED) as rejected_path,
        closing(_ParquetWriter(accepted_path, features, about)) as accepted_rows,
        closing(_ParquetWriter(rejected_path, {**features, "reason": Value("string")}, about)) as rejected_rows,
        tqdm(total=count, desc="Filtering", unit=" prompts", disable=count < ROWS_AT_ONCE) as bar,
    ):
        for entry in entries.read(by_id):
            bar.update()
            prompt, completions = by_id[entry["prompt_id"]], entry["completions"]
            written += len(completions)
            tokens += sum(completion.tokens for completion in completions)
            if entry["refused"]:
                unanswered[entry["refused"]] += 1
            for number, (candidate, reason) in enumerate(apply_filters(prompt, completions, filters)):
                row = _row(prompt, entry, number, candidate)
                if reason is None:
                    accepted += 1
                    accepted_rows.add(row)
                else:
                    rejected[reason] += 1
                    rejected_rows.add({**row, "reason": reason})
    report = GenerationReport(
        prompts=count,
        unanswered=dict(unanswered),
        written=written,
        accepted=accepted,
        rejected=dict(rejected),
        tokens=tokens,
        cost=entries.cost,
        complete=all(prompt.id in entries for prompt in prompts),
    )
    write_atomically(folder / REPORT, (json.dumps(report._asdict(), indent=2) + "\n").encode())
    save_settings(folder, settings)


def _row(prompt: Prompt, entry: Mapping[str, Any], number: int, candidate: Candidate) -> dict[str, Any]:
    completion: Completion = entry["completions"][number]
    has_ids = completion.ids is not None and completion.text == candidate.text
    message = {"role": "assistant", "content": candidate.text, **(candidate.extra or {})}
    return {
        "prompt": prompt.content,
        "completion": candidate.text if isinstance(prompt.content, str) else [message],
        "prompt_id": entry["prompt_id"],
        "sample": number,
        "finished": candidate.finished,
        "tokens": candidate.tokens,
        "mean_log_prob": candidate.mean_log_prob,
        "seed": entry["seed"],
        "time": entry["time"],
        "teacher": entry["teacher"],
        "prompt_ids": entry["prompt_ids"] if has_ids else None,
        "completion_ids": completion.ids if has_ids else None,
        **prompt.row,
    }


def _features_of(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Of the columns of what is written, but for the completion: from all rows, as a column may be empty in the first.

    Raises:
        ValueError: texts among conversations, or a column that no file can hold.
    """
    if len({isinstance(prompt.content, str) for prompt in prompts}) > 1:
        raise ValueError("some prompts are texts and others conversations: as_chat=true makes the texts conversations.")
    names = {"prompt": None, **dict.fromkeys(name for prompt in prompts for name in prompt.row)}
    rows = [{name: {"prompt": prompt.content, **prompt.row}.get(name) for name in names} for prompt in prompts]
    try:
        inferred = Dataset.from_list(rows, on_mixed_types="use_json").features
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"the columns {', '.join(names)} cannot be handed on in a Parquet file ({error}). Leave out of the dataset "
            "what is neither text nor numbers."
        ) from error
    return {"prompt": inferred.pop("prompt"), **FEATURES, **inferred}


class _ParquetWriter:
    """Rows into a Parquet file."""

    def __init__(self, path: Path, features: dict[str, Any], about: dict[str, str]) -> None:
        self._features = Features(features)
        schema = self._features.arrow_schema
        self._writer = pq.ParquetWriter(
            path, schema.with_metadata({**(schema.metadata or {}), **about}), compression="zstd"
        )
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append({name: row.get(name) for name in self._features})
        if len(self._rows) >= ROWS_AT_ONCE:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(Dataset.from_list(self._rows, features=self._features).data.table)
        self._rows = []


def load_generated(folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Dataset:
    """What was accepted, to train on.

    With a student's `tokenizer` that is the teacher's, rows are the teacher's own tokens (`input_ids`, and `labels` for
    those that it wrote): nothing is tokenised again, and a text that was cut off has no end token that the teacher
    never wrote. Otherwise they are `prompt` and `completion`, as texts or messages.

    Raises:
        ValueError: no such folder, or nothing was accepted.
    """
    settings = read_settings(folder)
    path = Path(folder, ACCEPTED)
    if not path.is_file():
        raise ValueError(f"{folder} has no {ACCEPTED} yet: run `llm-distill generate` to its end.")
    data = Dataset(pq.read_table(path).replace_schema_metadata(None))
    if not len(data):
        raise ValueError(f"{folder} holds no accepted text to train on: {path.parent / REPORT} says why.")
    is_teachers = tokenizer is not None and settings["tokenizer"] == describe_tokenizer(tokenizer)
    if is_teachers and not data.data.column("completion_ids").null_count:
        return data.map(_labelled, remove_columns=data.column_names, desc="Taking the teacher's tokens")
    if unfinished := len(data) - sum(data["finished"]):
        logger.warning(
            "%d of %d texts were cut off by max_new_tokens, and the student's tokenizer is another one or they were "
            "changed: it will be taught to stop there. The filter `finished` leaves them out.",
            unfinished,
            len(data),
        )
    return data.select_columns([name for name in TRAINED if name in data.column_names])


def _labelled(row: dict[str, Any]) -> dict[str, list[int]]:
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}
