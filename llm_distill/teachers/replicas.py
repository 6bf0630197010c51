"""Requests to servers that hold the same model: spread over them, repeated where that can help, a dead one survived."""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, TypeVar

import urllib3
from torch.utils.data import get_worker_info

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
IN_FLIGHT = 32
"""Requests at a time, of one process."""
CONNECT_SECONDS = 5.0
ATTEMPTS_IN_TIMEOUT = 4
"""A server that does not answer for this part of the time allowed is asked again, or another one is."""
ATTEMPTS_HERE = 3
FIRST_REST, LONGEST_REST = 0.5, 30.0
"""Seconds, doubled with each failure in between."""

Answer = TypeVar("Answer")
_BEGINNING = threading.Lock()


class RefusedError(ValueError):
    """The server has understood and says no: asking again would not help."""

    status = 0


class PassingError(ConnectionError):
    """What may be gone when it is tried again."""

    def __init__(self, reason: str, rest: float | None = None) -> None:
        super().__init__(reason)
        self.rest = rest
        """The seconds that the server asks for."""


@dataclass
class _Server:
    url: str
    in_flight: int = 0
    failures: int = 0
    failed_at: float = 0.0
    rests_until: float = 0.0
    reason: str = ""


class Replicas:
    """Each request goes to the server with the fewest in flight. One that fails twice in a row rests, for longer each
    time, while its requests go to the others. The key comes from OPENAI_API_KEY, and is in no message.

    Threads, connections and what is known of the servers are made in each process anew, when first used there.

    Args:
        urls: where they are, `http://host:port`, with or without `/v1`; one, several, or several with commas between.
        timeout: seconds after which a request that no server has answered is an error.

    Raises:
        ValueError: what is no such address, or has a key in it.
    """

    def __init__(self, urls: str | Sequence[str], timeout: float = 600.0) -> None:
        if timeout <= 0:
            raise ValueError(f"timeout must be positive, got {timeout}.")
        self.urls, self.timeout = parse_urls(urls), timeout
        self._process: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"urls": self.urls, "timeout": self.timeout, "_process": None}

    def ask(self, path: str, body: Mapping[str, Any], stop: threading.Event | None = None) -> dict[str, Any]:
        """The answer of whichever server gives one.

        Raises:
            RefusedError: a server refuses, with its message.
            ConnectionError: none has answered in time, with the last reason of each.
        """
        self._begin_process()
        stop = stop or threading.Event()
        deadline = time.monotonic() + self.timeout
        while not stop.is_set():
            server, began = self._take(), time.monotonic()
            rest = max(server.rests_until - began, 0.0)
            try:
                if began + rest >= deadline:
                    reasons = "; ".join(f"{each.url}: {each.reason}" for each in self._servers if each.reason)
                    raise ConnectionError(f"no answer to {path} in {self.timeout:g} seconds. {reasons}.")
                if not rest:
                    answer = self.ask_one(server.url, path, body, min(deadline - began, self._attempt_seconds))
                    self._recovered(server)
                    return answer
            except PassingError as failure:
                self._rests(server, failure, began)
            finally:
                with self._lock:
                    server.in_flight -= 1
            if rest:
                stop.wait(rest + random.uniform(0, min(rest, FIRST_REST)))  # and not all at once
        raise ConnectionError("another request of the same batch has failed.")

    def ask_all(
        self, path: str, bodies: Sequence[Mapping[str, Any]], read: Callable[[dict[str, Any], int], Answer]
    ) -> list[Answer]:
        """What `read` makes of each answer and its number, in order; the first error ends them all."""
        self._begin_process()
        stop = threading.Event()
        waiting = [
            self._threads.submit(lambda n=n, body=body: read(self.ask(path, body, stop), n))  # type: ignore[misc]
            for n, body in enumerate(bodies)
        ]
        try:
            done = wait(waiting, return_when=FIRST_EXCEPTION).done
            return [each.result() for each in sorted(done, key=waiting.index)]
        finally:
            stop.set()
            for each in waiting:
                each.cancel()

    def ask_here(self, url: str, path: str, body: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
        """The answer of one server, asked a few times. Raises RefusedError; ConnectionError if it gives none."""
        for attempt in range(ATTEMPTS_HERE):
            try:
                return self.ask_one(url, path, body, seconds)
            except PassingError as failure:
                reason = failure
                time.sleep(random.uniform(0, FIRST_REST * 2.0**attempt))
        raise ConnectionError(f"{url} ({reason})") from reason

    def ask_one(self, url: str, path: str, body: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
        """One attempt at one server, a GET without a body. Raises RefusedError, or PassingError."""
        self._begin_process()
        key = os.environ.get(KEY_VARIABLE)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        try:
            response = self._pool.request(
                "GET" if body is None else "POST",
                url + path,
                body=None if body is None else json.dumps(body, separators=(",", ":")).encode(),
                headers=headers,
                timeout=urllib3.Timeout(connect=min(CONNECT_SECONDS, seconds), read=seconds),
                retries=False,
                redirect=False,
            )
        except urllib3.exceptions.HTTPError as error:
            raise PassingError(_reason(error)) from error
        if response.status == 200:
            try:
                answer = json.loads(response.data)
            except ValueError as error:
                raise PassingError(f"what it answers is not whole JSON ({error})") from error
            if isinstance(answer, dict):
                return answer
        said = _message(response.data)
        if key:
            said = said.replace(key, "…")
        if response.status in (408, 425, 429) or response.status >= 500:
            raise PassingError(f"HTTP {response.status} ({said})", _seconds(response.headers.get("Retry-After")))
        refusal = RefusedError(f"{url}{path} refuses with HTTP {response.status}: {said}")
        if response.status in (401, 403):
            given = f"the key in {KEY_VARIABLE}" if key else f"to answer without a key ({KEY_VARIABLE} is not set)"
            refusal = RefusedError(f"{url} refuses {given}: HTTP {response.status}. Set it to a key of this server.")
        refusal.status = response.status
        raise refusal

    @property
    def _attempt_seconds(self) -> float:
        return self.timeout / ATTEMPTS_IN_TIMEOUT

    def _begin_process(self) -> None:
        with _BEGINNING:
            if self._process == os.getpid():
                return
            self._lock = threading.Lock()
            self._servers = [_Server(url) for url in self.urls]
            self._pool = urllib3.PoolManager(num_pools=len(self.urls), maxsize=IN_FLIGHT)
            self._threads = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="teacher_requests")
            self._process = os.getpid()

    def _take(self) -> _Server:
        """The one that is up and has the fewest in flight; if none is, the one that rests least."""
        with self._lock:
            now = time.monotonic()
            order = random.sample(self._servers, len(self._servers))
            server = min(order, key=lambda each: (max(each.rests_until - now, 0), each.in_flight))
            server.in_flight += 1
            return server

    def _rests(self, server: _Server, failure: PassingError, began: float) -> None:
        with self._lock:
            server.reason = str(failure)
            if began < server.failed_at:  # of the same outage
                return
            server.failures += 1
            server.failed_at = time.monotonic()
            longest = min(LONGEST_REST, FIRST_REST * 2.0 ** (min(server.failures, 10) - 1))
            if server.failures == 1:  # it may just have closed a connection that nobody used
                longest = 0.0
            rest = random.uniform(0, longest) if failure.rest is None else failure.rest
            server.rests_until = server.failed_at + rest
            is_news = server.failures == 2 and failure.rest is None
        worker = get_worker_info()
        if is_news and (worker is None or worker.id == 0):
            others = f"{len(self.urls) - 1} others go on" if len(self.urls) > 1 else "there is no other"
            logger.warning("the teacher's server %s fails (%s): it is tried again, %s.", server.url, failure, others)

    def _recovered(self, server: _Server) -> None:
        with self._lock:
            server.failures, server.reason = 0, ""


def parse_urls(urls: str | Sequence[str]) -> tuple[str, ...]:
    """Addresses without `/v1`, each once.

    Raises:
        ValueError: none, one that is not http(s)://host, or one with a user, a key or a query in it.
    """
    given = urls.split(",") if isinstance(urls, str) else list(urls)
    found = [url.strip().rstrip("/").removesuffix("/v1") for url in given if url.strip()]
    for url in found:
        parsed = urllib3.util.parse_url(url)
        if parsed.auth or parsed.query:
            raise ValueError(
                f"the server's address for {parsed.host} has a user or a query in it, which would be seen in messages. "
                f"Give the key in the environment: {KEY_VARIABLE}."
            )
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"a server's address is like http://host:8000, got {url!r}.")
    if not found:
        raise ValueError(f"there is no server's address in {urls!r}.")
    return tuple(dict.fromkeys(found))


def _reason(error: Exception) -> str:
    """In a few words, without the machine's own names for connections."""
    text = str(error).rsplit(">: ", 1)[-1].rsplit("): ", 1)[-1]
    return f"{type(error).__name__}: {text}"[:200]


def _message(body: bytes) -> str:
    """What an OpenAI-compatible server says went wrong."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        text = str(error["message"] if "message" in error else error.get("detail", error))
    except (ValueError, AttributeError, TypeError):
        text = body.decode(errors="replace")
    return " ".join(text.split())[:400] or "without a word"


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in seconds; its form with a date is taken for none."""
    try:
        return max(0.0, float(retry_after or ""))
    except ValueError:
        return None
