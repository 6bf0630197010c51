"""Runs that teach each other by their checkpoints: what they say, when it is taken up, and that one may die."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import codistilled_worker
import pytest
import torch
from codistilled_worker import make_run
from launch import start_ranks, wait_for_ranks
from runs import first_batch, logged, logits_at, make_trainer
from tiny import tiny_llama
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from llm_distill import LiveTeacher
from llm_distill.cli.build import build_capture
from llm_distill.data.corpus import train_tokenizer
from llm_distill.rows import View


def test_the_first_run_learns_from_the_text_alone_and_the_second_from_the_firsts_last_checkpoint(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    first = make_run(tmp_path, "first", tokenizer, max_steps=4)
    first.train()
    alone = make_trainer(
        tmp_path / "alone", tokenizer, tiny_llama(1, hidden=16), None, ce_weight=1.0, kd_weight=0.0, max_steps=4
    )
    alone.train()
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(first.model.state_dict()[name], weight)
    assert logged(first, "kd") == pytest.approx([0] * 4, abs=1e-6)
    assert set(logged(first, "peers")) == {0}

    second = make_run(tmp_path, "second", tokenizer, seed=2)
    view = View.of(first_batch(second))
    signal = second.teacher.score(view)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "first" / "checkpoint-4")
    torch.testing.assert_close(signal.head(signal.hidden), logits_at(saved, view))
    second.train()
    assert min(logged(second, "kd")) > 0.01
    assert min(logged(second, "peer_age")) > 0


def test_a_newer_checkpoint_is_taken_up_and_one_that_cannot_be_read_is_passed_over(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path, "first", tokenizer, max_steps=4).train()
    newer = shutil.move(tmp_path / "first" / "checkpoint-4", tmp_path / "checkpoint-4")
    teacher = make_run(tmp_path, "second", tokenizer, seed=2).teacher
    taken = [teacher._taken["first"][0].folder.name]
    broken = tmp_path / "first" / "checkpoint-3"
    shutil.copytree(newer, broken)
    (broken / "model.safetensors").write_bytes(b"torn")
    for _ in range(2):
        teacher.update()
    taken.append(teacher._taken["first"][0].folder.name)
    assert "checkpoint-3 is passed over" in caplog.text
    shutil.move(newer, tmp_path / "first" / "checkpoint-4")
    for _ in range(2):
        teacher.update()
    assert [*taken, teacher._taken["first"][0].folder.name] == ["checkpoint-2", "checkpoint-2", "checkpoint-4"]


def test_a_run_that_is_killed_teaches_as_it_was_and_comes_back(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shared = tmp_path / "shared"
    shared.mkdir()

    def start(name: str, steps: int, resume: bool) -> Any:
        return start_ranks(codistilled_worker.__file__, str(shared), name, str(steps), json.dumps(resume))

    (killed,) = start("b", 10_000, False)
    wait_for_a_checkpoint(shared / "b")
    survivor = start("aaa", 24, False)
    wait_for_a_checkpoint(shared / "aaa")
    killed.kill()
    last = int(max((shared / "b").glob("checkpoint-*"), key=lambda path: int(path.name[11:])).name[11:])
    back = start("b", last + 6, True)
    assert wait_for_ranks([*survivor, *back]) == [0, 0]
    logs = {name: [e for e in json.loads((shared / f"{name}.json").read_text()) if "kd" in e] for name in ("aaa", "b")}
    assert [entry["step"] for entry in logs["aaa"]] == list(range(1, 25))
    assert {entry["peers"] for entry in logs["aaa"]} == {1}
    assert logs["b"][-1]["step"] == last + 6
    assert logs["b"][-1]["peers"] == 1
    assert min(entry["kd"] for entry in logs["b"][-6:]) > 1e-4


def wait_for_a_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while not any(folder.glob("checkpoint-*")):
        assert time.monotonic() < deadline, f"none in {folder} in time"
        time.sleep(0.02)


def test_the_folder_of_another_kind_of_run_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    teacher = LiveTeacher(tiny_llama(2), tokenizer)
    make_trainer(tmp_path / "other", tokenizer, tiny_llama(1), teacher, save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match="a run that does not learn from others"):
        make_run(tmp_path / "other", "mine", tokenizer)


def test_a_run_with_another_tokenizer_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, texts: Any
) -> None:
    make_run(tmp_path, "first", tokenizer).train()
    with pytest.raises(ValueError, match="different ids"):
        make_run(tmp_path, "second", train_tokenizer(texts.select(range(200, 400)), 320))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_strategy": "no"}, "never hear of this run"),
        ({"teacher_codistilled": "elsewhere"}, r"Try output_dir=elsewhere.mine"),
        ({"teacher_ema_decay": 0.9}, "teacher_ema_decay names another teacher"),
        ({"teacher_model_name_or_path": "a/b"}, "give no other one"),
        ({"kd_weight": 0.0}, "kd_weight is 0"),
    ],
)
def test_what_cannot_be_is_refused(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_run(tmp_path, "mine", tokenizer, **options)


def test_they_are_not_captured(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    args = make_run(tmp_path, "mine", tokenizer).args
    with pytest.raises(ValueError, match="are not captured"):
        build_capture(None, args, None)  # type: ignore[arg-type]
