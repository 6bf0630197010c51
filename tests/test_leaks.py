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
        ("-----BEGIN ENCRYPTED PRIVATE KEY-----", "key"),
        ("github_pat_" + 22 * "A" + "_" + 59 * "b", "key"),
        ("hf_oauth_" + 30 * "x", "key"),
        ("api_org_" + 34 * "a", "key"),
        ("gsk_" + 50 * "a", "key"),
        ("nvapi-" + 60 * "a", "key"),
        ("sk-ant-api03-" + 80 * "a", "key"),
        ("AKIA" + 16 * "A", "key"),
        ("xoxb-123456789012-1234567890123-" + 24 * "a", "key"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc_def-ghi", "key"),
        ("curl -H 'Authorization: Bearer " + 20 * "a1" + "'", "key"),
        ("postgres://me:secret@example.com/x", "key"),
        ("see /home/me/models/llama", "/home/me/models/llama"),
        (str(Path(__file__)), "local path"),
        ("file:///home/bob/x", "/home/bob/x"),
        ("data:/home/bob/x", "/home/bob/x"),
        ("/nfs/home/bob/x", "/nfs/home/bob/x"),
        ("see ~/private/x", "~/private/x"),
        (r"C:\Users\bob\x", r"C:\Users\bob\x"),
        ("D:/data/models/x", "D:/data/models/x"),
        ("https://huggingface.co/home/me/models", None),
        ("/usr/bin/python", None),
        ("and/or, 1/2, </s>, a /b", None),
        ("{% if message.role == 'user' %}", None),
        ("ssh://git@github.com/a/b, me@example.com, http://a.b/c?x=/home/me", None),
        ("task-oriented-dialogue-generation, hf_transformers_backend, the bearer responsibilities", None),
    ],
)
def test_what_is_secret_or_local_is_found(text: str, expected: str | None) -> None:
    what = find_leak(text)
    assert what is None if expected is None else expected in what


def test_the_pieces_of_a_vocabulary_are_no_leaks(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"/home/me/x": 1}}}))
    (tmp_path / "vocab.json").write_text(json.dumps({"/home/me/x": 1}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n/home /me/x\n")
    (tmp_path / "vocab.txt").write_text("/home/me/x\n")
    refuse_leaks(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("config.json", '{"a": [{"b": "/home/me/x"}]}', r"config.json, a\[0\].b: the local path /home/me/x"),
        ("config.json", '{"a": "/home/me/x"', "config.json, line 1: the local path"),
        ("config.json", '{"remote": {"authToken": "correct-horse"}}', "remote.authToken: a key"),
        ("run.yaml", "kwargs: {password: correct-horse}", "kwargs.password: a key"),
        ("tokenizer.json", '{"model": {"vocab": {"hf_abcdefghijklmnopqrst": 1}}}', "model: a key"),
        ("vocab.txt", "see the notes in /home/me/x", "vocab.txt, line 1: the local path"),
        ("tokenizer.model", "\n\x00hf_abcdefghijklmnopqrst", "a piece: a key"),
        ("model.py", "path = '/home/me/x'", "model.py, line 1"),
    ],
)
def test_every_file_is_searched(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=expected):
        refuse_leaks(tmp_path)


def test_the_tokens_of_a_tokenizer_are_no_secrets(tmp_path: Path) -> None:
    content = {"eos_token": "endoftext", "image_token": "<image_soft_token>", "max_new_tokens": 8}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    refuse_leaks(tmp_path)
    assert public_value(content).keys() == {"eos_token", "max_new_tokens"}


def test_options_are_told_without_places_and_secrets(tmp_path: Path) -> None:
    assert public_value({"teacher": str(tmp_path), "hub_token": "hf_x", "n": [1, "Qwen/Qwen3-8B"]}) == {
        "teacher": tmp_path.name,
        "n": [1, "Qwen/Qwen3-8B"],
    }
    assert public_value("http://10.0.0.1:8000/v1,http://b/v1/") == "http://HOST/v1,http://HOST/v1"
    assert public_value("https://host/SECRET-PATH/v1?key=x") == "https://HOST"
    assert public_value({"init": {"token": "x", "n": 1}, "extra_headers": {"X-Api-Key": "x"}}) == {"init": {"n": 1}}
    assert public_value([r"C:\Users\me\big", "file:///home/me/big", "hf://datasets/a/b"]) == [
        "big",
        "big",
        "hf://datasets/a/b",
    ]
    command = ["--hub_token", "hf_x", "--output_dir=/home/me/out", "--teacher", "/home/me/big", "--token=abc"]
    assert public_command(command) == ["--hub_token", "…", "--output_dir=out", "--teacher", "big", "--token=…"]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--hub-token", "x"], ["--hub-token", "…"]),
        (["--hub-token=x"], ["--hub-token=…"]),
        (["--init_kwargs", '{"token": "x", "n": 1}'], ["--init_kwargs", '{"n": 1}']),
        (["--init_kwargs={'apiKey': 'x', 'n': 1}"], ['--init_kwargs={"n": 1}']),
        (["--init_kwargs", "{broken"], ["--init_kwargs", "…"]),
        (["--data", r"mail=C:\Users\me\mail.csv"], ["--data", "mail=mail.csv"]),
        (["--teacher_server_url", "https://me:x@h/SECRET/v1"], ["--teacher_server_url", "https://HOST/v1"]),
        (["--eos_token", "<end>", "--max_new_tokens", "8"], ["--eos_token", "<end>", "--max_new_tokens", "8"]),
    ],
)
def test_a_command_is_told_without_secrets_in_whatever_form(given: list[str], told: list[str]) -> None:
    assert public_command(given) == told
