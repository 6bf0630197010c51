"""What reaches the Hub: the real client against a small Hub on 127.0.0.1, in a process of its own as a user has it."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tiny import tiny_llama
from torch import equal
from transformers import AutoModelForCausalLM, AutoTokenizer

from llm_distill.hub import write_model_card

TOKEN = "hf_dummy"
PERSON = "somebodyprivate"
"""The user's name, in the environment and in every local path."""


@dataclass
class Hub:
    """Keeps what is committed to it in `folder`."""

    folder: Path
    url: str = ""
    commits: int = 0
    tokens: set[str | None] = field(default_factory=set)

    def answer(self, path: str, body: bytes) -> dict[str, object] | None:
        if path == "/api/repos/create":
            return {"url": f"{self.url}/{json.loads(body)['organization']}/{json.loads(body)['name']}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.startswith("/api/models/somebody/student/preupload/"):
            files = json.loads(body)["files"]
            return {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
        if path.startswith("/api/models/somebody/student/commit/"):
            self.commits += 1
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    target = self.folder / line["value"]["path"]
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(base64.b64decode(line["value"]["content"]))
            return {"commitUrl": f"{self.url}/somebody/student/commit/1", "commitOid": "1", "pullRequestUrl": None}
        return None


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    remote = Hub(tmp_path / "remote")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if self.command == "POST":
                remote.tokens.add(self.headers["Authorization"])
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer = remote.answer(self.path.split("?")[0], body)
            content = json.dumps(answer).encode()
            self.send_response(200 if answer else 404)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        remote.url = f"http://127.0.0.1:{server.server_port}"
        Thread(target=server.serve_forever, daemon=True).start()
        yield remote
        server.shutdown()


def test_push_uploads_what_a_user_needs_and_nothing_private(hub: Hub, saved: Path, tmp_path: Path) -> None:
    home = tmp_path / PERSON
    home.mkdir()
    data = home / "data.jsonl"
    data.write_text(4 * '{"text": "def f(x):\\n    return x + 1"}\n')
    options = {
        "model_name_or_path": saved / "student",
        "teacher_model_name_or_path": saved / "teacher",
        "dataset_name": data,
        "output_dir": home / "out",
        "max_steps": 2,
        "save_steps": 1,
        "push_to_hub": True,
        "hub_model_id": "somebody/student",
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
    }
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": TOKEN,
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "USER": PERSON,
        "LOGNAME": PERSON,
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "llm_distill.cli", "train", *flags]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-5000:]
    assert hub.tokens == {f"Bearer {TOKEN}"}

    uploaded = [path for path in hub.folder.rglob("*") if path.is_file()]
    files = {path.relative_to(hub.folder).as_posix(): path.read_bytes() for path in uploaded}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= files.keys()
    assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    for name, content in files.items():
        for secret in (TOKEN, PERSON, str(saved)):
            assert secret.encode() not in content, f"{secret} in {name}"
    assert hub.commits == 1

    trained, remote = (load_file(folder / "model.safetensors") for folder in (home / "out", hub.folder))
    assert trained.keys() == remote.keys()
    assert all(equal(trained[name], remote[name]) for name in trained)
    card = ModelCard.load(hub.folder / "README.md")
    assert {"llm-distill", "knowledge-distillation"} <= set(card.data.tags)
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    AutoTokenizer.from_pretrained(hub.folder)
    AutoModelForCausalLM.from_pretrained(hub.folder)


def test_the_card_shows_the_figures_of_each_dataset(tmp_path: Path) -> None:
    history = [{"eval_code_ce": 2.0, "eval_code_teacher_ce": 1.5, "eval_prose_ce": 3.0}, {"eval_code_ce": 1.75}]
    record = {"objective.kd_weight": 1.0, "teacher.model": "big", "teacher.parameters": 7_000_000}
    card = {"name": "small", "dataset_name": None, "tags": [], "record": record, "log_history": history}
    write_model_card(tmp_path, model=tiny_llama(1), **card)
    text = (tmp_path / "README.md").read_text()
    assert "| cross-entropy (nats a token) on code | 1.75 |" in text
    assert "| the teacher's cross-entropy on code | 1.5 |" in text
    assert "| cross-entropy (nats a token) on prose | 3 |" in text
    assert "from `big` (7.0 M parameters)" in text
