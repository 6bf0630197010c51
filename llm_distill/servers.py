"""One client for OpenAI-compatible servers: its requests are spread over those that hold the same model, repeated where
that can help, and survive a dead server.

The key comes from OPENAI_API_KEY, and is in no message. Servers on https are reached through the proxy that the
environment names; those on http are one's own, and are reached directly.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any
from urllib.request import getproxies, proxy_bypass

import urllib3
from torch.utils.data import get_worker_info

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
CONCURRENCY = 32
CONNECT_SECONDS = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds, doubled with each failure in between."""
LONGEST_RETRY_AFTER = 60.0
"""Seconds: a server that asks for more time than this is tried after this."""
ADDRESS_HINT = "Is that the server's address? An endpoint's usually ends in /v1, and a teacher's has no path."
_STARTING = threading.Lock()


class RefusedError(ValueError):
    """The server has understood and says no, so another attempt would not help."""

    def __init__(self, message: str, status: int, reason: str = "") -> None:
        super().__init__(message)
        self.status, self.reason = status, reason


class UnbelievableError(ValueError):
    """An answer that cannot be: another one would be no truer."""


class NoAnswerError(ConnectionError):
    """An attempt that got no answer, or none that can be read. The next one may."""

    def __init__(self, reason: str, status: int = 0, retry_after: float | None = None) -> None:
        super().__init__(reason)
        self.status, self.retry_after = status, retry_after


@dataclass
class _Server:
    url: str
    in_flight: int = 0
    failures: int = 0
    """Since it last answered."""
    failed_at: float = 0.0
    rests_until: float = 0.0
    reason: str = ""


class ServerPool:
    """Servers of the same model. A request goes to the one with the fewest in flight; one that fails twice in a row
    rests, longer each time, while its requests go to the others.

    Threads, connections and what is known of the servers belong to one process, and are made when it first needs them.

    Args:
        urls: the addresses, which the path of a request is added to.
        timeout: seconds that one attempt may take.
        patience: seconds that a request may take with all of its attempts.
        attempts: how often a request is tried at most.
        concurrency: how many requests of one process may be in flight.
        headers: more headers for each request, in lower case: a password's takes the place of the key's.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        timeout: float,
        patience: float = math.inf,
        attempts: float = math.inf,
        concurrency: int = CONCURRENCY,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.urls, self.timeout, self.patience, self.attempts = tuple(urls), timeout, patience, attempts
        self._concurrency, self._headers = concurrency, dict(headers or {})
        self._process: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        own = ("_lock", "_servers", "_connections", "_threads")
        return {name: value for name, value in vars(self).items() if name not in own} | {"_process": None}

    def request(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        read: Callable[[dict[str, Any]], Any] | None = None,
        stop: threading.Event | None = None,
    ) -> Any:
        """The answer of whichever server gives one, to a GET if there is no body.

        Args:
            path: follows the server's address.
            body: sent as JSON.
            read: what it makes of the answer is returned instead; it may raise NoAnswerError to have another attempt.
            stop: ends the attempts when it is set.

        Raises:
            RefusedError: a server refuses, with its message.
            UnbelievableError: `read` has raised it; with the server's address in front.
            NoAnswerError: the last of `attempts` has failed.
            ConnectionError: no server has answered within `patience`; with the last reason of each.
        """
        self._start_process()
        stop, deadline, failures = stop or threading.Event(), time.monotonic() + self.patience, 0
        while not stop.is_set():
            server, began = self._take_server(), time.monotonic()
            pause = max(server.rests_until - began, 0.0)
            pause += random.uniform(0, min(pause, FIRST_PAUSE))  # or all would begin again at once
            try:
                if began + pause >= deadline:
                    reasons = "; ".join(f"{down.url}: {down.reason}" for down in self._servers if down.reason)
                    raise ConnectionError(f"no answer to {path} in {self.patience:g} seconds. {reasons}.")
                if not pause:
                    answer = self._attempt(server.url, path, body, min(self.timeout, deadline - began))
                    result = answer if read is None else read(answer)
                    self._note_answer(server)
                    return result
            except UnbelievableError as error:
                raise UnbelievableError(f"{server.url}: {error}") from error
            except NoAnswerError as failure:
                failures += 1
                self._note_failure(server, failure, began)
                if failures >= self.attempts:
                    raise
                pause = random.uniform(0, _longest_pause(failures))
            finally:
                with self._lock:
                    server.in_flight -= 1
            stop.wait(pause)
        raise ConnectionError("another request of the same batch has failed.")

    def request_all(
        self, path: str, bodies: Sequence[Mapping[str, Any]], reads: Sequence[Callable[[dict[str, Any]], Any]]
    ) -> list[Any]:
        """What each of `reads` makes of the answer to its body, in order. The first error ends all of them."""
        self._start_process()
        stop = threading.Event()
        futures = [
            self._threads.submit(self.request, path, body, read, stop) for body, read in zip(bodies, reads, strict=True)
        ]
        try:
            done = wait(futures, return_when=FIRST_EXCEPTION).done
            return [future.result() for future in futures if future in done]
        finally:
            stop.set()
            for future in futures:
                future.cancel()

    def _attempt(self, url: str, path: str, body: Mapping[str, Any] | None, seconds: float) -> dict[str, Any]:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{KEY_VARIABLE} is no key: it has a line break in it, or a letter that no key has.")
        headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
        send = functools.partial(
            self._connections[url].request,
            "GET" if body is None else "POST",
            url + path,
            body=None if body is None else json.dumps(body, separators=(",", ":")).encode(),
            headers=headers | self._headers,
            timeout=urllib3.Timeout(connect=min(CONNECT_SECONDS, seconds), read=seconds),
            retries=False,
            redirect=False,
        )
        try:
            response = _call_within(seconds, send)
        except (urllib3.exceptions.HTTPError, TimeoutError) as error:
            raise NoAnswerError(_reason_of(error)) from error
        status = response.status
        if status == 200 and response.data.lstrip().startswith(b"<"):
            raise RefusedError(f"{url}{path} is a web page and no model's server. {ADDRESS_HINT}", status, "a web page")
        if status == 200:
            try:
                answer = json.loads(response.data)
            except ValueError as error:
                raise NoAnswerError(f"what it answers is not whole JSON ({error})", status) from error
            if isinstance(answer, dict):
                return answer
            raise NoAnswerError("what it answers is no JSON object", status)
        reason = _message_in(response.data)
        if key:
            reason = reason.replace(key, "…")
        if status in (408, 409, 425, 429) or status >= 500:
            raise NoAnswerError(f"HTTP {status} ({reason})", status, _seconds(response.headers.get("Retry-After")))
        if status in (401, 403):
            given = f"the key in {KEY_VARIABLE}" if key else f"to answer without a key ({KEY_VARIABLE} is not set)"
            message = f"{url} refuses {given}: HTTP {status}. Set it in the environment to a key of this server."
            raise RefusedError(message, status)
        if 300 <= status < 400:
            reason = f"it has moved to {response.headers.get('Location')}"
        hint = f". {ADDRESS_HINT}" if status in (404, 405) else ""
        raise RefusedError(f"{url}{path} refuses with HTTP {status}: {reason}{hint}", status, reason)

    def _start_process(self) -> None:
        with _STARTING:
            if self._process == os.getpid():
                return
            self._lock = threading.Lock()
            self._servers = [_Server(url) for url in self.urls]
            self._connections = {url: _connections_to(url, self._concurrency) for url in self.urls}
            self._threads = ThreadPoolExecutor(self._concurrency, thread_name_prefix="teacher_requests")
            self._process = os.getpid()

    def _take_server(self) -> _Server:
        """The one that is up and has the fewest requests in flight; if none is up, the one that rests least."""
        with self._lock:
            now = time.monotonic()
            order = random.sample(self._servers, len(self._servers))
            server = min(order, key=lambda server: (max(server.rests_until - now, 0), server.in_flight))
            server.in_flight += 1
            return server

    def _note_failure(self, server: _Server, failure: NoAnswerError, began: float) -> None:
        with self._lock:
            server.reason = str(failure)
            if began < server.failed_at:  # of the same outage
                return
            server.failures += 1
            server.failed_at = time.monotonic()
            pause = failure.retry_after
            if pause is None:  # after one failure none: it may just have closed a connection that nobody used
                pause = random.uniform(0, _longest_pause(server.failures))
            server.rests_until = server.failed_at + pause
            is_news = server.failures == 2 and failure.retry_after is None
        worker = get_worker_info()
        if is_news and (worker is None or worker.id == 0):
            others = f"{len(self.urls) - 1} others go on" if len(self.urls) > 1 else "there is no other"
            logger.warning("the teacher's server %s fails (%s): it is tried again, %s.", server.url, failure, others)

    def _note_answer(self, server: _Server) -> None:
        with self._lock:
            server.failures, server.reason = 0, ""


def parse_url(url: str) -> urllib3.util.Url:
    """Raises ValueError if it is not http(s)://host; a password that is in it is not shown."""
    try:
        parsed = urllib3.util.parse_url(url.strip().rstrip("/"))
    except urllib3.exceptions.LocationParseError:
        parsed = urllib3.util.Url()
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"a server's address is like http://host:8000, got {url.rpartition('@')[2]!r}.")
    return parsed


def _call_within(seconds: float, function: Callable[[], Any]) -> Any:
    """Its result; TimeoutError if it takes longer. A client's own timeout is for each read, and a server that sends a
    byte now and then would never meet it.
    """
    result = Future[Any]()

    def call() -> None:
        try:
            result.set_result(function())
        except Exception as error:  # raised where it is waited for
            result.set_exception(error)

    threading.Thread(target=call, daemon=True).start()
    try:
        return result.result(seconds)
    except TimeoutError as error:
        raise TimeoutError(f"no whole answer in {seconds:.3g} seconds") from error


def _connections_to(url: str, size: int) -> urllib3.PoolManager:
    host = parse_url(url).host or ""
    proxy = getproxies().get("https") if url.startswith("https:") and not proxy_bypass(host) else None
    if proxy is None:
        return urllib3.PoolManager(maxsize=size)
    password = urllib3.util.parse_url(proxy).auth
    headers = urllib3.util.make_headers(proxy_basic_auth=password) if password else None
    return urllib3.ProxyManager(proxy, maxsize=size, proxy_headers=headers)


def _longest_pause(failures: int) -> float:
    """Seconds, after so many failures in a row: none after the first."""
    return 0.0 if failures < 2 else min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** (min(failures, 10) - 1))


def _reason_of(error: Exception) -> str:
    """In a few words, without the machine's own names for connections."""
    text = str(error).rsplit(">: ", 1)[-1].rsplit("): ", 1)[-1]
    return f"{type(error).__name__}: {text}"[:200]


def _message_in(body: bytes) -> str:
    """What an OpenAI-compatible server says went wrong."""
    try:
        error = json.loads(body)
        error = error.get("error", error)
        text = str(error["message"] if "message" in error else error.get("detail", error))
    except (ValueError, AttributeError, TypeError):
        text = "a web page" if body.lstrip().startswith(b"<") else body.decode(errors="replace")
    return " ".join(text.encode(errors="replace").decode().split())[:400] or "without a word"


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` in seconds; its form with a date is taken for none."""
    try:
        return min(max(0.0, float(retry_after or "")), LONGEST_RETRY_AFTER)
    except ValueError:
        return None
