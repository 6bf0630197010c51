"""What must not leave this machine is found in files, and taken out of options."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_distill.leaks import find_leak, public_command, public_value, refuse_leaks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hf_abcdefghijklmnopqrstuvwxyz", "key"),
        ("https://me:secret@example.com/x", "key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "key"),
        ("see /home/me/models/llama", "/home/me/models/llama"),
        (str(Path(__file__)), "local path"),
        ("https://huggingface.co/home/me/models", None),
        ("/usr/bin/python", None),
        ("and/or, 1/2, </s>, a /b", None),
        ("{% if message.role == 'user' %}", None),
    ],
)
def test_what_is_secret_or_local_is_found(text: str, expected: str | None) -> None:
    what = find_leak(text)
    assert what is None if expected is None else expected in what


def test_the_pieces_of_a_vocabulary_are_no_leaks(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"/home/me/x": 1}}}))
    refuse_leaks(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"a": [{"b": "/home/me/x"}]}))
    with pytest.raises(ValueError, match=r"config.json, a\[0\].b: the local path /home/me/x"):
        refuse_leaks(tmp_path)


def test_options_are_told_without_places_and_secrets(tmp_path: Path) -> None:
    assert public_value({"teacher": str(tmp_path), "hub_token": "hf_x", "n": [1, "Qwen/Qwen3-8B"]}) == {
        "teacher": tmp_path.name,
        "n": [1, "Qwen/Qwen3-8B"],
    }
    assert public_value("http://10.0.0.1:8000/v1") == "http://HOST/v1"
    command = ["--hub_token", "hf_x", "--output_dir=/home/me/out", "--teacher", "/home/me/big", "--token=abc"]
    assert public_command(command) == ["--hub_token", "…", "--output_dir=out", "--teacher", "big", "--token=…"]
