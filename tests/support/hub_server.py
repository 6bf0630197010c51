"""A small Hub on 127.0.0.1 for the real client, which runs in a process of its own as a user has it."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import re
import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from warm import WarmProcess

TOKEN = "hf_dummy"
PERSON = "somebodyprivate"
"""The user's name, in the environment and in every local path."""
TEACHER = "lab/teacher"
REVISION = "0123456789abcdef0123456789abcdef01234567"
REPO = "somebody/cache"
Answer = tuple[int, dict[str, str], bytes]


@dataclass
class Hub:
    """Model and dataset repositories with one branch, and the card of a teacher."""

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Of each repository."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    large: bool = False
    """Whether shards and weights are large files."""
    cut: set[str] = field(default_factory=set)
    """Files at which the connection breaks; large ones by their SHA-256 or their shard's name."""
    commits: list[list[str]] = field(default_factory=list)
    puts: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)
    """How many bytes of each file have been read."""
    marks: list[int] = field(default_factory=list)
    """How many of shards when the program said `tell("mark")`."""
    tokens: set[str | None] = field(default_factory=set)
    """Of all that wrote."""
    lock: Any = field(default_factory=Lock)

    def answer(self, method: str, path: str, headers: Any, body: bytes) -> Answer | None:
        """None breaks the connection."""
        if path == "/api/repos/create":
            return self.create(json.loads(body), headers["Authorization"])
        if path == "/api/validate-yaml":
            return as_json({"errors": [], "warnings": []})
        if path == "/mend":
            self.cut = set()
            return 200, {}, b""
        if path == "/mark":
            self.marks.append(sum(size for name, size in self.sent.items() if name.endswith(".parquet")))
            return 200, {}, b""
        if found := re.fullmatch(r"/objects/(\w+)", path):
            return self.put(found[1], body)
        if found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body)["objects"])
        if found := re.fullmatch(rf"/{TEACHER}/resolve/{REVISION}/README.md", path):
            return self.read("teacher", b"---\nlicense: apache-2.0\n---\n", REVISION, method, headers["Range"])
        if found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            return self.resolve(found[1], found[2], method, headers["Range"])
        if found := re.fullmatch(r"/api/(datasets/|models/)([^/]+/[^/]+)(?:/(\w[\w-]*)/[^/]+)?/?", path):
            if found[2] not in self.files:
                return 404, {"X-Error-Code": "RepoNotFound"}, b""
            return self.api(found[1].replace("models/", ""), found[2], found[3], body)
        if found := re.fullmatch(r"/api/models/[^/]+/[^/]+/tree/[^/]+/.+", path):
            return 404, {"X-Error-Code": "EntryNotFound"}, b""  # there are no folders
        return 404, {}, b""

    def create(self, asked: dict[str, Any], token: str | None) -> Answer:
        if token is None:
            return 401, {}, b'{"error": "Invalid username or password."}'
        if asked["organization"] != "somebody":
            return 403, {}, b'{"error": "You do not have the rights."}'
        repo = f"{asked['organization']}/{asked['name']}"
        status = 409 if repo in self.files else 200
        self.files.setdefault(repo, {".gitattributes": b""})
        kind = "datasets/" if asked.get("type") == "dataset" else ""
        return as_json({"url": f"{self.url}/{kind}{repo}"}, status)

    def put(self, oid: str, content: bytes) -> Answer | None:
        if self.cut & {oid, shard_name(oid)}:
            return None
        assert hashlib.sha256(content).hexdigest() == oid
        self.objects[oid] = content
        self.puts[shard_name(oid)] += 1
        return 200, {}, b""

    def batch(self, asked: list[dict[str, Any]]) -> Answer:
        for each in asked:
            if each["oid"] not in self.objects:
                each["actions"] = {"upload": {"href": f"{self.url}/objects/{each['oid']}"}}
        return as_json({"transfer": "basic", "objects": asked})

    def api(self, kind: str, repo: str, action: str | None, body: bytes) -> Answer | None:
        files = self.files[repo]
        if action == "preupload":
            asked = [each["path"] for each in json.loads(body)["files"]]
            is_large = [self.large and path.endswith((".parquet", ".safetensors")) for path in asked]
            return as_json(
                {
                    "files": [
                        {
                            "path": path,
                            "uploadMode": "lfs" if large else "regular",
                            "shouldIgnore": False,
                            "oid": object_id(files[path], large) if path in files else None,
                        }
                        for path, large in zip(asked, is_large, strict=True)
                    ]
                }
            )
        if action == "auth-check":
            return (200 if repo.startswith("somebody/") else 403), {}, b""
        if action == "commit":
            return self.commit(kind, repo, [json.loads(line) for line in body.splitlines()])
        if action == "tree":
            return as_json([self.entry(path, content) for path, content in sorted(files.items())])
        if action == "paths-info":
            return as_json([self.entry(p, files[p]) for p in json.loads(body)["paths"] if p in files])
        siblings = [{"rfilename": path} for path in sorted(files)]
        return as_json({"id": repo, "sha": self.revision(repo), "private": False, "tags": [], "siblings": siblings})

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": path, "size": len(content), "oid": object_id(content, False)}

    def commit(self, kind: str, repo: str, lines: list[dict[str, Any]]) -> Answer | None:
        added = {line["value"]["path"]: line for line in lines if line["key"] in ("file", "lfsFile")}
        if self.cut & added.keys():
            return None
        for path, line in added.items():
            is_large = line["key"] == "lfsFile"
            self.files[repo][path] = (
                self.objects[line["value"]["oid"]] if is_large else base64.b64decode(line["value"]["content"])
            )
        for line in lines:
            if line["key"] == "deletedFile":
                del self.files[repo][line["value"]["path"]]
        self.commits.append(sorted(added))
        sha = self.revision(repo)
        url = f"{self.url}/{kind}{repo}/commit/{sha}"
        return as_json({"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})

    def revision(self, repo: str) -> str:
        ids = {path: object_id(content, False) for path, content in self.files[repo].items()}
        return hashlib.sha1(json.dumps(ids, sort_keys=True).encode()).hexdigest()

    def resolve(self, repo: str, path: str, method: str, wanted: str | None) -> Answer:
        if path not in self.files.get(repo, {}):
            return 404, {"X-Error-Code": "EntryNotFound" if repo in self.files else "RepoNotFound"}, b""
        return self.read(path, self.files[repo][path], self.revision(repo), method, wanted)

    def read(self, path: str, content: bytes, revision: str, method: str, wanted: str | None) -> Answer:
        headers = {"X-Repo-Commit": revision, "ETag": f'"{object_id(content, False)}"', "Accept-Ranges": "bytes"}
        status, size = 200, len(content)
        if wanted:
            first, last = (int(part) if part else size - 1 for part in wanted.removeprefix("bytes=").split("-"))
            content, status = content[first : last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{first + len(content) - 1}/{size}"
        if method == "GET":
            with self.lock:
                self.sent[path] += len(content)
        return status, headers, content


def as_json(content: object, status: int = 200) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def object_id(content: bytes, is_large: bool) -> str:
    if is_large:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def shard_name(sha256: str) -> str:
    return f"shard-{sha256[:32]}.parquet"


class HubServer(ThreadingHTTPServer):
    """Serves one Hub after the other."""

    hub: Hub


class Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if re.search(r"/(create|preupload|commit|batch)\b", self.path):
            hub.tokens.add(self.headers["Authorization"])
        answer = hub.answer(self.command, unquote(urlsplit(self.path).path), self.headers, body)
        if answer is None:
            self.close_connection = True
            return
        status, headers, content = answer
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="session")
def hub_server() -> Iterator[HubServer]:
    """At one address, as libraries read it when they are imported."""
    with HubServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def hub(hub_server: HubServer) -> Hub:
    """A new one."""
    hub_server.hub = Hub(f"http://127.0.0.1:{hub_server.server_port}")
    return hub_server.hub


@pytest.fixture(scope="session")
def home_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home") / PERSON


@pytest.fixture
def home(home_folder: Path) -> Path:
    """A person's, with nothing in it."""
    shutil.rmtree(home_folder, ignore_errors=True)
    home_folder.mkdir()
    return home_folder


@functools.cache
def warm_process_in(environment: frozenset[tuple[str, str]]) -> WarmProcess:
    """As libraries read most of it when they are imported, each environment has a process of its own."""
    return WarmProcess(**dict(environment))


def python(hub: Hub, home: Path, program: str, *arguments: str, **more: str) -> list[str]:
    """The lines that a program prints in a process of its own, where its first arguments are `home` and `REPO`."""
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "0",
        "HF_TOKEN": TOKEN,
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "USER": PERSON,
        "LOGNAME": PERSON,
        **more,
    }
    warm = warm_process_in(frozenset(environment.items()))
    running = warm.start("-c", textwrap.dedent(program), home, REPO, *arguments)
    assert running.wait() == 0, running.errors()[-5000:]
    return running.output().splitlines()
