"""The teacher writes, filters keep, and every step is on disk: `llm-distill generate`."""

from __future__ import annotations

import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from llm_distill.files import locked, write_atomically
from llm_distill.generation.endpoint import BudgetReachedError
from llm_distill.generation.engines import Completion, Engine, Sampling, describe_sampling
from llm_distill.generation.filters import Each, Filter, Private, Sample
from llm_distill.generation.prompts import Prompt
from llm_distill.generation.store import Entries, Journal, open_folder, read_settings, save_settings
from llm_distill.models import describe_tokenizer
from llm_distill.ranks import ranks
from llm_distill.rows import IGNORED
from llm_distill.tables import Table

logger = logging.getLogger(__name__)

ACCEPTED, REJECTED, REPORT = "train.parquet", "rejected.parquet", "report.json"
ROWS_AT_ONCE = 2048


class Report(NamedTuple):
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
    sampling: Sampling,
    *,
    filters: Mapping[str, Filter] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Report:
    """Has every prompt answered that is not yet, filters all answers anew, and leaves in `folder`

    - `train.parquet`: what was accepted, with prompt, completion and where each comes from,
    - `rejected.parquet`: the others, each with its `reason`,
    - `report.json`: how many of what,
    - `generation.json` and journals: the settings and the answers as they came.

    Args:
        engine: who writes; transformers on every rank of accelerate, others in one process.
        prompts: the same on every rank.
        folder: of this run; the same call goes on where a kill stopped it.
        sampling: the engine's.
        filters: by name, in the order in which they are asked.
        tokenizer: the teacher's, if it is known: what `load_generated` compares a student's with.

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
        "sampling": describe_sampling(sampling),
        "tokenizer": None if tokenizer is None else describe_tokenizer(tokenizer),
        "llm_distill": version("llm-distill"),
    }
    with locked(folder, "another run") if state.is_main_process else nullcontext():
        if state.is_main_process:
            open_folder(folder, settings)
        state.wait_for_everyone()
        stopped: BudgetReachedError | None = None
        try:
            _write(engine, prompts, folder, filters, sampling, state)
        except BudgetReachedError as error:
            stopped = error
        state.wait_for_everyone()
        report = None
        if state.is_main_process:
            report = _filter(prompts, folder, filters, settings)
        state.wait_for_everyone()
        report = report or read_report(folder)
    if not report.written and report.unanswered:
        raise ValueError(f"no prompt was answered: {'; '.join(report.unanswered)}.")
    if stopped is not None:
        raise stopped
    return report


def read_report(folder: str | Path) -> Report:
    return Report(**json.loads(Path(folder, REPORT).read_text()))


def _write(
    engine: Engine,
    prompts: Sequence[Prompt],
    folder: Path,
    filters: Mapping[str, Filter],
    sampling: Sampling,
    state: PartialState,
) -> None:
    answered = Entries(folder)
    state.wait_for_everyone()  # so that all have seen the same
    left = [prompt for prompt in prompts if prompt.id not in answered]
    own = left[state.process_index :: state.num_processes]
    if not left:
        return
    engine.check()
    alone = {name: keep for name, keep in filters.items() if isinstance(keep, Each | Private)}
    teacher = engine.describe().get("model")
    began, tokens, accepted, written, cost = time.perf_counter(), 0, 0, 0, answered.cost
    show = state.is_main_process
    with (
        closing(Journal(folder)) as journal,
        tqdm(total=len(own), desc="Writing", unit=" prompts", disable=not show) as bar,
    ):
        for answer in engine.write(own):
            said = {"seed": sampling.seed, "time": time.time(), "teacher": teacher}
            entry = journal.append(answer, **said)
            tokens += sum(each.tokens for each in answer.completions)
            cost += answer.cost
            written += len(answer.completions)
            accepted += sum(reason is None for _, reason in judged(entry, answer.completions, alone)[0])
            bar.update()
            share = f", {accepted / max(written, 1):.0%} accepted" if alone else ""
            spent = f", cost {cost:.4f}" if cost else ""
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):,.0f} tokens/s{share}{spent}", refresh=False)


def judged(
    entry: Mapping[str, Any], completions: Sequence[Completion], filters: Mapping[str, Filter]
) -> tuple[list[tuple[Sample, str | None]], list[bool]]:
    """Each completion as the filters leave it, with the name of the one that rejected it; and whether it is changed."""
    samples = [
        Sample(entry["prompt"], each.text, entry["row"], each.finished, each.tokens, each.mean_log_prob)
        for each in completions
    ]
    verdicts: list[tuple[Sample, str | None]] = [(sample, None) for sample in samples]
    for name, keep in filters.items():
        places = [place for place, (_, reason) in enumerate(verdicts) if reason is None]
        if not places:
            break
        for place, kept in zip(places, keep([verdicts[place][0] for place in places]), strict=True):
            verdicts[place] = (verdicts[place][0], name) if kept is None else (kept, None)
    return verdicts, [verdict.text != sample.text for (verdict, _), sample in zip(verdicts, samples, strict=True)]


def _filter(prompts: Sequence[Prompt], folder: Path, filters: Mapping[str, Filter], settings: dict[str, Any]) -> Report:
    entries = Entries(folder)
    asked = {prompt.id for prompt in prompts}
    unanswered, rejected = Counter[str](), Counter[str](dict.fromkeys(filters, 0))
    accepted = written = 0
    about = {"llm_distill": json.dumps(settings)}
    with (
        _ParquetFile(folder / ACCEPTED, about) as good,
        _ParquetFile(folder / REJECTED, about) as bad,
        tqdm(total=len(asked), desc="Filtering", unit=" prompts", disable=len(asked) < ROWS_AT_ONCE) as bar,
    ):
        for entry in entries.read(prompt.id for prompt in prompts):
            bar.update()
            written += len(entry["completions"])
            if entry["refused"]:
                unanswered[entry["refused"]] += 1
            verdicts, changed = judged(entry, entry["completions"], filters)
            for number, (sample, reason) in enumerate(verdicts):
                row = _row(entry, number, sample, changed[number])
                if reason is None:
                    accepted += 1
                    good.add(row)
                else:
                    rejected[reason] += 1
                    bad.add({**row, "reason": reason})
    complete = all(prompt.id in entries for prompt in prompts)
    report = Report(
        len(asked), dict(unanswered), written, accepted, dict(rejected), entries.tokens, entries.cost, complete
    )
    write_atomically(folder / REPORT, (json.dumps(report._asdict(), indent=2) + "\n").encode())
    save_settings(folder, settings)
    return report


def _row(entry: Mapping[str, Any], number: int, sample: Sample, is_changed: bool) -> dict[str, Any]:
    chat = not isinstance(entry["prompt"], str)
    completion: Completion = entry["completions"][number]
    return {
        "prompt": entry["prompt"],
        "completion": [{"role": "assistant", "content": sample.text}] if chat else sample.text,
        "prompt_id": entry["prompt_id"],
        "sample": number,
        "finished": sample.finished,
        "tokens": sample.tokens,
        "mean_log_prob": sample.mean_log_prob,
        "seed": entry["seed"],
        "time": entry["time"],
        "teacher": entry["teacher"],
        "prompt_ids": None if is_changed or completion.ids is None else entry["prompt_ids"],
        "completion_ids": None if is_changed else completion.ids,
        **entry["row"],
    }


class _ParquetFile:
    """Rows into a Parquet file, which appears whole or not at all."""

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        self._path, self._about = path, about
        self._temporary = path.with_name(f".partial-{path.name}")
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[dict[str, Any]] = []

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= ROWS_AT_ONCE:
            self._flush()

    def __enter__(self) -> _ParquetFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()
        if kind is None:
            self._temporary.replace(self._path)
        else:
            self._temporary.unlink(missing_ok=True)

    def _flush(self) -> None:
        table = pa.Table.from_pylist(self._rows)
        if self._writer is None:
            schema = _without_nulls(table.schema).with_metadata(self._about)
            self._writer = pq.ParquetWriter(self._temporary, schema, compression="zstd")
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, self._writer.schema))
        self._rows = []


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
    known = tokenizer is not None and settings["tokenizer"] == describe_tokenizer(tokenizer)
    if known and not data.data.column("completion_ids").null_count:
        return data.map(_tokens_of, remove_columns=data.column_names, desc="Taking the teacher's tokens")
    if unfinished := len(data) - sum(data["finished"]):
        logger.warning(
            "%d of %d texts were cut off by max_new_tokens, and the student's tokenizer is another one or they were "
            "changed: it will be taught to stop there. The filter `finished` leaves them out.",
            unfinished,
            len(data),
        )
    return data.select_columns(["prompt", "completion"])


def _tokens_of(row: dict[str, Any]) -> dict[str, list[int]]:
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * len(prompt) + completion}
