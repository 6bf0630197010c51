"""What goes wrong between a client and a server, on demand: a proxy on 127.0.0.1 in a thread of the test."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import urllib3

FAULTS = ("slow", "reset", "429", "500", "truncated", "not_json", "other_model")

Fault = str | Callable[[Any], Any] | None


class Server(ThreadingHTTPServer):
    """Takes as many connections at once as a client opens."""

    daemon_threads = True
    request_queue_size = 128


class FaultyProxy:
    """`with FaultyProxy(url) as proxy`: what is sent to `proxy.url` goes on to `url`, but for the faults.

    Each POST below /v1 takes the next of `faults` (None or none left: it is passed on):

    - slow: the answer comes after `slow_seconds`;
    - reset: the connection is torn down;
    - 429, with `Retry-After: retry_after`; 500;
    - truncated: half of the answer, and the connection is closed; not_json: half of it, as if it were whole;
    - other_model: the answer says that another model gave it;
    - a function: the answer is what it makes of it.
    """

    def __init__(
        self, target: str, faults: Iterable[Fault] = (), *, slow_seconds: float = 1.0, retry_after: float = 1.0
    ) -> None:
        self.target, self.faults = target.rstrip("/"), deque(faults)
        self.slow_seconds, self.retry_after = slow_seconds, retry_after
        self.met: Counter[Fault] = Counter()
        """How often each fault has happened,"""
        self.passed = 0
        """and how many of these POSTs were passed on."""
        self.times: list[float] = []
        """When each of them came."""
        self._lock = threading.Lock()
        self._pool = urllib3.PoolManager(maxsize=64)
        self._server = Server(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _next_fault(self) -> Fault:
        with self._lock:
            self.times.append(time.monotonic())
            fault = self.faults.popleft() if self.faults else None
            if fault is None:
                self.passed += 1
            else:
                self.met[fault] += 1
            return fault

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                self._send(*proxy._forward("GET", self.path, None, self.headers))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                fault = proxy._next_fault() if self.path.startswith("/v1/") else None
                if fault == "reset":
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    return
                if fault in ("429", "500"):
                    error = json.dumps({"error": {"message": "injected", "code": int(fault)}}).encode()
                    self._send(int(fault), error, {"Retry-After": f"{proxy.retry_after:g}"} if fault == "429" else {})
                    return
                status, answer, _ = proxy._forward("POST", self.path, body, self.headers)
                length = len(answer)
                if fault == "slow":
                    time.sleep(proxy.slow_seconds)
                elif fault == "truncated":
                    answer, self.close_connection = answer[: length // 2], True
                elif fault == "not_json":
                    answer = answer[: length // 2]
                    length = len(answer)
                elif fault == "other_model":
                    answer = json.dumps({**json.loads(answer), "model": "another"}).encode()
                    length = len(answer)
                elif callable(fault):
                    answer = json.dumps(fault(json.loads(answer))).encode()
                    length = len(answer)
                self._send(status, answer, {}, length)

            def _send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body) if length is None else length))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                """The test says what matters."""

        return Handler

    def _forward(self, method: str, path: str, body: bytes | None, headers: Any) -> tuple[int, bytes, dict[str, str]]:
        kept = {name: headers[name] for name in ("Content-Type", "Authorization") if name in headers}
        try:
            answer = self._pool.request(method, self.target + path, body=body, headers=kept, retries=False, timeout=300)
        except urllib3.exceptions.HTTPError:
            return 502, b"the server is gone", {}
        return answer.status, answer.data, {}
