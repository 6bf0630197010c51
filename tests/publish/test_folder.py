"""The output folder of a run: nothing in it is overwritten, and a checkpoint is there whole or not at all."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llm_distill.publish.folder import (
    last_checkpoint,
    require_output_folder,
    require_unused,
    why_torn,
    written_aside,
)


@pytest.mark.parametrize(
    ("folder", "named"),
    [
        (".", "the folder in which you are"),
        ("..", "the folder in which you are"),
        ("/", "the folder in which you are"),
        ("~", "your home"),
        ("notes.txt", "is a file"),
        ("notes.txt/below", "is a file"),
        ("teacher/", "the teacher"),
        ("link", "the teacher"),
        ("org/model", "the student"),
    ],
)
def test_what_a_run_reads_and_where_a_person_lives_is_no_place_for_a_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, named: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("notes.txt").touch()
    Path("teacher").mkdir()
    Path("link").symlink_to("teacher")
    inputs = {"the teacher": str(tmp_path / "teacher"), "the student": "org/model", "the dataset": None}
    with pytest.raises(ValueError, match=f"{named}.*another output_dir"):
        require_output_folder(folder, inputs)
    require_output_folder("teacher/student", inputs)
    require_output_folder("new", inputs)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model-00001-of-00002.safetensors", "a model"),
        ("pytorch_model.bin", "a model"),
        ("tokenizer.json", "a model"),
        ("manifest.json", "a teacher cache"),
        ("generation.json", "generated texts"),
        ("dataset_info.json", "a dataset"),
        ("run.yaml", "record of a run"),
    ],
)
def test_what_no_run_has_left_stays(tmp_path: Path, name: str, what: str) -> None:
    for harmless in ("notes.md", "report.json", "eval_results.json"):
        (tmp_path / harmless).touch()
    require_unused(tmp_path)
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"holds .*{what}.*{name}.*another output_dir"):
        require_unused(tmp_path)


def test_a_finished_student_stays(tmp_path: Path) -> None:
    (tmp_path / "distillation.json").write_text("{}")
    require_unused(tmp_path)  # of a run that was stopped before it saved anything
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(ValueError, match="the student of an earlier run, which would be overwritten"):
        require_unused(tmp_path)


def make_checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": "model-1.safetensors"}}))
    save_file({"weight": torch.zeros(100)}, folder / "model-1.safetensors")
    torch.save({"state": torch.zeros(100)}, folder / "optimizer.pt")
    torch.save({"cpu": torch.zeros(100)}, folder / "rng_state.pth")
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("name", "tear"),
    [
        ("trainer_state.json", Path.unlink),
        ("trainer_state.json", cut),
        ("model-1.safetensors", Path.unlink),
        ("model-1.safetensors", cut),
        ("optimizer.pt", cut),
        ("rng_state.pth", cut),
        ("model.safetensors.index.json", cut),
    ],
)
def test_a_torn_checkpoint_is_passed_over_by_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, tear: Callable[[Path], None]
) -> None:
    whole, torn = make_checkpoint(tmp_path / "checkpoint-9"), make_checkpoint(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path) == torn
    tear(torn / name)
    assert why_torn(torn)
    with caplog.at_level(logging.WARNING):
        assert last_checkpoint(tmp_path) == whole
    assert "checkpoint-10 is passed over" in caplog.text


def test_what_is_written_aside_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "checkpoint-1")

    def write(error: type[BaseException] | None) -> None:
        with written_aside(tmp_path, is_writer=True) as aside:
            make_checkpoint(aside / "checkpoint-1")
            (aside / "checkpoint-1" / "new").touch()
            assert not (tmp_path / "checkpoint-1" / "new").exists()
            if error is not None:
                raise error

    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error):
            write(error)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
        assert not (tmp_path / "checkpoint-1" / "new").exists()
    write(None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "new").exists()
