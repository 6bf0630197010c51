"""A server on 127.0.0.1 that gives one prepared answer after the other, and remembers what it was sent."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


@dataclass
class Scripted:
    url: str = ""
    paths: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Message] = field(default_factory=list)


@contextmanager
def scripted(answers: Sequence[tuple[int, Any] | tuple[int, Any, dict[str, str]]]) -> Iterator[Scripted]:
    """Each answer is a status, what becomes JSON (a string is sent as it is), and headers; the last one is repeated."""
    server, left = Scripted(), deque(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server.paths.append(self.path)
            server.bodies.append(json.loads(body or "{}"))
            server.headers.append(self.headers)
            status, content, *headers = left.popleft() if len(left) > 1 else left[0]
            content = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers[0] if headers else {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}"
        Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        http.shutdown()
