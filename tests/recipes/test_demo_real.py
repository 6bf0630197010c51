"""The demo on a real model, with a tiny one in its place; and the text that it is distilled on."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import demo_real
import pytest
from kinds_of_data import CHAT_TEMPLATE
from runs import save
from smollm2 import PASSAGE_CHARACTERS, documentation, passages_of, questions
from tiny import tiny_llama
from transformers import PreTrainedTokenizerBase

SMALL = {"QUESTIONS_ANSWERED": 8, "HELD_OUT_ANSWERS": 4, "ANSWER_TOKENS": 4, "PASSAGES": 8, "HELD_OUT_PASSAGES": 4}


def test_it_cuts_teaches_and_asks(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE
    save(tiny_llama(2, num_hidden_layers=3, max_position_embeddings=1024), tmp_path / "model", tokenizer)
    for name, value in SMALL.items():
        monkeypatch.setattr(demo_real, name, value)
    folder = tmp_path / "out"
    arguments = ["--model", str(tmp_path / "model"), "--layers", "2", "--output_dir", str(folder)]
    monkeypatch.setattr("sys.argv", ["demo_real.py", *arguments])
    demo_real.main()
    results = json.loads((folder / "results.json").read_text())
    assert results["layers"] == [3, 2]
    assert [entry["step"] for entry in results["curve"]] == [0, 1, 2, 3, 4]
    assert all(entry[kind]["kl"] > 0 for entry in results["curve"] for kind in ("answers", "documentation"))
    assert {*results["answers"]} == {*demo_real.ASKED}
    assert "| distilled | 2 |" in (folder / "results.md").read_text()
    assert (folder / "learning_curves.png").is_file()
    assert (folder / "student" / "model.safetensors").is_file()
    with pytest.raises(SystemExit):
        demo_real.main()  # the folder has a student


def test_passages_are_whole_paragraphs_and_none_is_on_both_sides() -> None:
    text = "\n\n".join(letter * 400 for letter in "abcde")
    passages = passages_of(text)
    assert [passage.count("\n\n") for passage in passages] == [2, 2, 1]
    assert all(len(passage) <= PASSAGE_CHARACTERS + 4 for passage in passages)
    paragraphs = [
        {part.strip() for text in rows["text"] for part in text.split("\n\n") if len(part) > 100}
        for rows in documentation().values()
    ]
    assert paragraphs[0]
    assert paragraphs[1]
    assert not paragraphs[0] & paragraphs[1]
    assert len({*questions()}) == len(questions()) == 400
