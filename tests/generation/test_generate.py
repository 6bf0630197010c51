"""Each prompt is answered once, whatever happens on the way, and its texts say where they come from."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, load_dataset
from tiny import make_config, tiny_llama
from transformers import AutoTokenizer
from writing import GREEDY, write_alone

from llm_distill import DistillationTrainer
from llm_distill.generation import (
    Prompt,
    Sampling,
    TransformersEngine,
    generate,
    load_generated,
    make_filters,
    make_prompt,
    prompts_of,
    run,
)
from llm_distill.generation.engines.base import Answer, Engine
from llm_distill.generation.journal import Journal, JournalEntries
from llm_distill.generation.run import ACCEPTED, REJECTED
from llm_distill.models import LanguageModel


def test_a_run_leaves_texts_with_where_they_come_from(
    teacher: LanguageModel, prompts: list[Prompt], tmp_path: Path
) -> None:
    sampling = Sampling(num_completions=2, max_new_tokens=6)
    report = generate(TransformersEngine(teacher, sampling), prompts, tmp_path / "run")
    assert (report.prompts, report.written, report.accepted, report.complete) == (9, 18, 18, True)
    data = load_dataset("parquet", data_files=str(tmp_path / "run" / ACCEPTED))["train"]
    assert [row["prompt"] for row in data] == [prompt.content for prompt in prompts for _ in range(2)]
    assert [row["line"] for row in data][:4] == [0, 0, 1, 1]
    assert {row["teacher"] for row in data} == {"teacher"}
    settings = json.loads((tmp_path / "run" / "generation.json").read_text())
    assert settings["teacher"] == teacher.describe()
    assert settings["sampling"]["temperature"] == 1.0
    assert str(tmp_path) not in json.dumps(settings)


def test_a_folder_knows_its_teacher_by_its_weights(saved: Path, prompts: list[Prompt], tmp_path: Path) -> None:
    place, moved = tmp_path / "teacher", tmp_path / "moved"

    def write() -> None:
        generate(TransformersEngine(LanguageModel.load(str(place)), GREEDY), prompts, tmp_path / "run")

    shutil.copytree(saved / "teacher", place)
    write()
    place = place.rename(moved)
    write()
    tiny_llama(7).save_pretrained(place)
    with pytest.raises(ValueError, match=r"another configuration.*teacher\.weights"):
        write()


def test_the_students_labels_are_the_teachers_tokens(
    teacher: LanguageModel, prompts: list[Prompt], tmp_path: Path, saved: Path
) -> None:
    generate(TransformersEngine(teacher, GREEDY), prompts, tmp_path / "run")
    data = load_generated(tmp_path / "run", AutoTokenizer.from_pretrained(saved / "student"))
    for row, prompt in zip(data, prompts, strict=True):
        learned = [label for label in row["labels"] if label != -100]
        assert [learned] == write_alone(teacher, prompt)
        assert row["input_ids"] == teacher.tokenizer(prompt.content)["input_ids"] + learned


def test_another_tokenizer_gets_the_text(
    teacher: LanguageModel, prompts: list[Prompt], tmp_path: Path, texts: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    from llm_distill.data.corpus import train_tokenizer

    generate(TransformersEngine(teacher, GREEDY), prompts, tmp_path / "run")
    data = load_generated(tmp_path / "run", train_tokenizer(texts, 300))
    assert data.column_names == ["prompt", "completion"]
    assert "cut off by max_new_tokens" in caplog.text


@pytest.mark.parametrize(
    "weights", [{"kd_weight": 0.0, "ce_weight": 1.0}, {"kd_weight": 1.0, "ce_weight": 0.5}], ids=str
)
def test_a_student_learns_from_the_texts(
    teacher: LanguageModel, prompts: list[Prompt], tmp_path: Path, saved: Path, weights: dict[str, float]
) -> None:
    generate(TransformersEngine(teacher, GREEDY), prompts, tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(saved / "student")
    trainer = DistillationTrainer(
        str(saved / "student"),
        str(saved / "teacher") if weights["kd_weight"] else None,
        make_config(tmp_path / "out", max_steps=8, **weights),
        train_dataset=load_generated(tmp_path / "run", tokenizer),
        processing_class=tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


class Counting(Engine):
    """Real answers by another engine; remembers what it was asked."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.asked = engine, []
        self.sampling, self.tokenizer = engine.sampling, engine.tokenizer

    def describe(self) -> dict[str, Any]:
        return self.engine.describe()

    def write(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        self.asked += [prompt.id for prompt in prompts]
        yield from self.engine.write(prompts)


class Silent(Engine):
    """Never answers."""

    sampling = GREEDY

    def describe(self) -> dict[str, Any]:
        return {"model": "silent"}

    def write(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        raise AssertionError("nothing was to be asked")


def test_what_is_there_is_not_written_again(teacher: LanguageModel, prompts: list[Prompt], tmp_path: Path) -> None:
    engine, folder = Counting(TransformersEngine(teacher, GREEDY)), tmp_path / "run"
    generate(engine, prompts[:5], folder)
    report = generate(engine, prompts, folder, filters=make_filters({"length": {"min_tokens": 6}}))
    assert engine.asked == [prompt.id for prompt in prompts]
    assert report.rejected["length"] + report.accepted == report.written == 9


def test_other_columns_are_todays_and_filters_judge_them_anew(
    teacher: LanguageModel, prompts: list[Prompt], tmp_path: Path
) -> None:
    engine = Counting(TransformersEngine(teacher, GREEDY))
    right = make_filters({"verifier": {"check": lambda prompt, text, row: row["line"] == "right"}})
    for line, accepted in (("wrong", 0), ("right", len(prompts))):
        mended = [prompt._replace(row={"line": line}) for prompt in prompts]
        assert generate(engine, mended, tmp_path / "run", filters=right).accepted == accepted
    assert len(engine.asked) == len(prompts)
    assert set(load_dataset("parquet", data_files=str(tmp_path / "run" / ACCEPTED))["train"]["line"]) == {"right"}


def test_columns_are_those_of_all_rows(
    teacher: LanguageModel, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "ROWS_AT_ONCE", 2)
    values = [None, None, None, 3, 4.5, None, {"a": [1]}, "text", None]
    rows = [{"level": value} | ({"late": n} if n > 4 else {}) for n, value in enumerate(values)]
    varied = [prompt._replace(row=row) for prompt, row in zip(prompts, rows, strict=True)]
    generate(TransformersEngine(teacher, GREEDY), varied, tmp_path / "run")
    data = load_dataset("parquet", data_files=str(tmp_path / "run" / ACCEPTED))["train"]
    assert data["level"] == values
    assert data["late"] == [None] * 5 + [5, 6, 7, 8]


def test_what_no_file_can_hold_is_refused_before_anything_is_written(prompts: list[Prompt], tmp_path: Path) -> None:
    strange = [prompts[0]._replace(row={"thing": "\ud83d"})]
    with pytest.raises(ValueError, match="the columns prompt, thing cannot be handed on in a Parquet file"):
        generate(Silent(), strange, tmp_path / "run")
    with pytest.raises(ValueError, match="some prompts are texts and others conversations"):
        generate(Silent(), [*prompts, make_prompt([{"role": "user", "content": "a"}], {})], tmp_path / "run")


def test_a_full_disk_is_said_and_what_has_arrived_stays(
    teacher: LanguageModel, prompts: list[Prompt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, append = Counting(TransformersEngine(teacher, GREEDY)), Journal.append

    def append_until_full(journal: Journal, answer: Answer, **provenance: Any) -> None:
        if answer.prompt == prompts[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(journal, answer, **provenance)

    with monkeypatch.context() as full:
        full.setattr(Journal, "append", append_until_full)
        with pytest.raises(OSError, match=r"run could not be written \(No space left on device\)\. What has arrived"):
            generate(engine, prompts, tmp_path / "run")
    assert generate(engine, prompts, tmp_path / "run").complete
    assert len(JournalEntries(tmp_path / "run")) == len(prompts)


def test_rejected_texts_are_kept_with_the_reason(teacher: LanguageModel, prompts: list[Prompt], tmp_path: Path) -> None:
    chosen = {"length": {"min_tokens": 7}, "finished": {}}
    report = generate(TransformersEngine(teacher, GREEDY), prompts, tmp_path / "run", filters=make_filters(chosen))
    assert report.accepted == 0
    rows = load_dataset("parquet", data_files=str(tmp_path / "run" / REJECTED))["train"]
    assert set(rows["reason"]) == {"length"}
    with pytest.raises(ValueError, match="no accepted text to train on"):
        load_generated(tmp_path / "run")


def test_a_prompt_that_does_not_fit_is_left_out_and_counted(teacher: LanguageModel, tmp_path: Path) -> None:
    prompts = list(prompts_of([{"prompt": "x = 1"}, {"prompt": "abc " * 200}]))
    report = generate(TransformersEngine(teacher, GREEDY), prompts, tmp_path / "run")
    assert report.written == 1
    assert report.unanswered == {"with 6 new tokens longer than the teacher's context of 128": 1}
    with pytest.raises(ValueError, match="no prompt was answered: with 6 new tokens longer"):
        generate(TransformersEngine(teacher, GREEDY), prompts[1:], tmp_path / "other")


def test_a_torn_line_is_asked_again_and_a_changed_one_is_found(
    teacher: LanguageModel, prompts: list[Prompt], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    generate(TransformersEngine(teacher, GREEDY), prompts, folder)
    (journal,) = folder.glob("journal-*.jsonl")
    whole = journal.read_bytes()
    journal.write_bytes(whole[:-7])
    assert len(JournalEntries(folder)) == 8
    engine = Counting(TransformersEngine(teacher, GREEDY))
    assert generate(engine, prompts, folder).complete
    assert len(engine.asked) == 1
    journal.write_bytes(whole.replace(b"completions", b"complexions", 1))
    with pytest.raises(ValueError, match=r"journal-\w+\.jsonl is damaged at byte 0"):
        JournalEntries(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: (LanguageModel(tiny_llama(7), t.tokenizer), GREEDY), r"teacher\.weights: the folder has"),
        (lambda t: (t, Sampling(max_new_tokens=7, temperature=0)), r"sampling\.max_new_tokens: the folder has 6"),
    ],
    ids=["teacher", "sampling"],
)
def test_a_folder_of_another_configuration_is_refused(
    teacher: LanguageModel, prompts: list[Prompt], tmp_path: Path, change: Any, message: str
) -> None:
    generate(TransformersEngine(teacher, GREEDY), prompts[:2], tmp_path / "run")
    other, sampling = change(teacher)
    with pytest.raises(ValueError, match=message):
        generate(TransformersEngine(other, sampling), prompts, tmp_path / "run")


def test_strange_folders_and_empty_data_are_refused(
    teacher: LanguageModel, prompts: list[Prompt], tmp_path: Path
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    engine = TransformersEngine(teacher, GREEDY)
    with pytest.raises(ValueError, match=r"has other things in it: thesis\.tex"):
        generate(engine, prompts, tmp_path)
    with pytest.raises(ValueError, match="there are no prompts"):
        generate(engine, [], tmp_path / "new")
    with pytest.raises(ValueError, match="is not a folder of generated texts"):
        load_generated(tmp_path)
