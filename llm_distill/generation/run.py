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
from datasets import Dataset
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
from llm_distill.tables import Table

logger = logging.getLogger(__name__)

ACCEPTED, REJECTED, REPORT = "train.parquet", "rejected.parquet", "report.json"
ROWS_AT_ONCE = 2048


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
    engine: Engine, prompts: Sequence[Prompt], folder: str | Path, *, filters: Mapping[str, Filter] | None = None
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

    Raises:
        ValueError: no prompts, none that fits, a folder of another configuration, another run at work in it, several
            ranks for an engine that is one process.
        BudgetReachedError: after all files are written, if the budget was.
    """
    if not prompts:
        raise ValueError("there are no prompts: is the dataset empty, or every text shorter than prompt_tokens?")
    state, folder, filters = ranks(), Path(folder), filters or {}
    if state.num_processes > 1 and not engine.runs_on_every_rank:
        raise ValueError(
            f"a {type(engine).__name__} does all by itself, and this is a launch of {state.num_processes} ranks: run "
            "`llm-distill generate` (or --stage generate of the recipe) in one process."
        )
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
        out_of_budget: BudgetReachedError | None = None
        try:
            _write_answers(engine, prompts, folder, filters)
        except BudgetReachedError as error:
            out_of_budget = error
        state.wait_for_everyone()
        if state.is_main_process:
            _write_texts(prompts, folder, filters, settings)
        state.wait_for_everyone()
        report = read_report(folder)
    if not report.written and report.unanswered:
        raise ValueError(f"no prompt was answered: {'; '.join(report.unanswered)}.")
    if out_of_budget is not None:
        raise out_of_budget
    return report


def read_report(folder: str | Path) -> GenerationReport:
    return GenerationReport(**json.loads(Path(folder, REPORT).read_text()))


def _write_answers(engine: Engine, prompts: Sequence[Prompt], folder: Path, filters: Mapping[str, Filter]) -> None:
    state, entries = ranks(), JournalEntries(folder)
    state.wait_for_everyone()  # so that all have seen the same
    left = [prompt for prompt in prompts if prompt.id not in entries]
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
            entry = journal.append(answer, **provenance, time=time.time())
            tokens += sum(completion.tokens for completion in answer.completions)
            cost += answer.cost
            written += len(answer.completions)
            accepted += sum(reason is None for _, reason in apply_filters(entry, answer.completions, independent))
            bar.update()
            share = f", {accepted / max(written, 1):.0%} accepted" if independent else ""
            spent = f", cost {cost:.4f}" if cost else ""
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):,.0f} tokens/s{share}{spent}", refresh=False)


def apply_filters(
    entry: Mapping[str, Any], completions: Sequence[Completion], filters: Mapping[str, Filter]
) -> list[tuple[Candidate, str | None]]:
    """Each completion as the filters leave it, with the name of the one that rejected it."""
    prompt, row = entry["prompt"], entry["row"]
    candidates = [
        Candidate(prompt, row, completion.text, completion.finished, completion.tokens, completion.mean_log_prob)
        for completion in completions
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
    prompts: Sequence[Prompt], folder: Path, filters: Mapping[str, Filter], settings: dict[str, Any]
) -> None:
    """Filters all answers, and writes what is accepted, what is rejected, the report and the settings."""
    entries, count = JournalEntries(folder), len({prompt.id for prompt in prompts})
    unanswered, rejected = Counter[str](), Counter[str](dict.fromkeys(filters, 0))
    accepted = written = 0
    about = {"llm_distill": json.dumps(settings)}
    with (
        replacing(folder / ACCEPTED) as accepted_path,
        replacing(folder / REJECTED) as rejected_path,
        closing(_ParquetWriter(accepted_path, about)) as accepted_rows,
        closing(_ParquetWriter(rejected_path, about)) as rejected_rows,
        tqdm(total=count, desc="Filtering", unit=" prompts", disable=count < ROWS_AT_ONCE) as bar,
    ):
        for entry in entries.read(prompt.id for prompt in prompts):
            bar.update()
            written += len(entry["completions"])
            if entry["refused"]:
                unanswered[entry["refused"]] += 1
            for number, (candidate, reason) in enumerate(apply_filters(entry, entry["completions"], filters)):
                row = _row(entry, number, candidate)
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
        tokens=entries.tokens,
        cost=entries.cost,
        complete=all(prompt.id in entries for prompt in prompts),
    )
    write_atomically(folder / REPORT, (json.dumps(report._asdict(), indent=2) + "\n").encode())
    save_settings(folder, settings)


def _row(entry: Mapping[str, Any], number: int, candidate: Candidate) -> dict[str, Any]:
    is_chat = not isinstance(entry["prompt"], str)
    completion: Completion = entry["completions"][number]
    has_ids = completion.ids is not None and completion.text == candidate.text
    return {
        "prompt": entry["prompt"],
        "completion": [{"role": "assistant", "content": candidate.text}] if is_chat else candidate.text,
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
        **entry["row"],
    }


class _ParquetWriter:
    """Rows into a Parquet file, whose columns are those of the first ones."""

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        self._path, self._about = path, about
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= ROWS_AT_ONCE:
            self._flush()

    def close(self) -> None:
        self._flush()
        assert self._writer is not None, "it has flushed"
        self._writer.close()

    def _flush(self) -> None:
        rows, self._rows = self._rows, []
        if self._writer is None:
            schema = _without_nulls(pa.Table.from_pylist(rows).schema).with_metadata(self._about)
            self._writer = pq.ParquetWriter(self._path, schema, compression="zstd")
        if rows:
            self._writer.write_table(pa.Table.from_pylist(rows, self._writer.schema))


def _without_nulls(schema: pa.Schema) -> pa.Schema:
    """A column that was empty so far will hold what ours hold, or text."""
    known = {
        "mean_log_prob": pa.float64(),
        "prompt_ids": pa.list_(pa.int64()),
        "completion_ids": pa.list_(pa.int64()),
    }
    return pa.schema([f.with_type(known.get(f.name, pa.string())) if pa.types.is_null(f.type) else f for f in schema])


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
    return data.select_columns(["prompt", "completion"])


def _labelled(row: dict[str, Any]) -> dict[str, list[int]]:
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}
