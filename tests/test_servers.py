"""The client of teachers and endpoints: what it repeats, what it does not, and what it never shows."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import pytest
import urllib3
from scripted import scripted

from llm_distill.servers import NoAnswerError, RefusedError, ServerPool, _connections_to

KEY = "sk-not-to-be-shown-anywhere"


def pool(*urls: str, **options: Any) -> ServerPool:
    return ServerPool(urls, **{"timeout": 5.0} | options)


def test_it_does_not_wait_past_the_time_allowed() -> None:
    began = time.monotonic()
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9: .*refused"):
        pool("http://127.0.0.1:9", timeout=1, patience=1).request("/v1/completions", {})
    assert time.monotonic() - began < 3


def test_it_tries_as_often_as_is_allowed_and_raises_the_last_reason() -> None:
    with scripted([(503, "busy"), (500, {"error": {"message": "out of memory"}})]) as server:
        with pytest.raises(NoAnswerError, match=r"HTTP 500 \(out of memory\)") as error:
            pool(server.url, attempts=3).request("/v1/completions", {"prompt": "a"})
        assert error.value.status == 500
        assert server.bodies == [{"prompt": "a"}] * 3


@pytest.mark.parametrize("unusable", ["{", [1], {"choices": []}], ids=str)
def test_an_answer_that_cannot_be_used_is_asked_for_again(unusable: Any) -> None:
    def read(answer: dict[str, Any]) -> int:
        if not answer["choices"]:
            raise NoAnswerError("no choices")
        return len(answer["choices"])

    with scripted([(200, unusable), (200, {"choices": [1, 2]})]) as server:
        assert pool(server.url).request("/v1/completions", {}, read) == 2
        assert len(server.paths) == 2


def test_a_refusal_is_not_repeated_and_does_not_show_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with scripted([(400, {"error": {"message": f"the key {KEY} may not ask for that"}})]) as server:
        with pytest.raises(RefusedError, match="/v1/completions refuses with HTTP 400: the key … may not ask") as error:
            pool(server.url).request("/v1/completions", {})
        assert error.value.status == 400
        assert KEY not in str(error.value) + error.value.reason
        assert [headers["Authorization"] for headers in server.headers] == [f"Bearer {KEY}"]


@pytest.mark.parametrize("part", ["status line", "headers", "body"])
def test_a_server_that_sends_a_byte_now_and_then_is_left(part: str) -> None:
    beginnings = {"status line": b"HTTP/1.1", "headers": b"HTTP/1.1 200 OK\r\nX-", "body": b"HTTP/1.1 200 OK\r\n\r\n"}
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def drip() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                connection.sendall(beginnings[part])
                for _ in range(100):
                    time.sleep(0.05)
                    connection.sendall(b" ")

        threading.Thread(target=drip, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(NoAnswerError, match=r"no whole answer in 0\.3 seconds"):
            pool(f"http://127.0.0.1:{listening.getsockname()[1]}", timeout=0.3, attempts=1).request("/v1/models")
        assert time.monotonic() - began < 3


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (200, r"/models is a web page .* usually ends in /v1"),
        (404, r"HTTP 404: a web page\. Is that the server's addr"),
    ],
)
def test_a_web_page_is_no_model(status: int, message: str) -> None:
    with (
        scripted([(status, " <html><body>Welcome</body></html>")]) as server,
        pytest.raises(RefusedError, match=message),
    ):
        pool(server.url).request("/models")


def test_a_server_that_has_moved_says_where_to() -> None:
    with (
        scripted([(308, "", {"Location": "https://elsewhere/v1/models"})]) as server,
        pytest.raises(RefusedError, match="HTTP 308: it has moved to https://elsewhere/v1/models"),
    ):
        pool(server.url).request("/v1/models")


@pytest.mark.parametrize(("asked", "least", "most"), [("0.6", 0.6, 5.0), ("soon", 0.0, 0.5)])
def test_it_waits_as_long_as_a_server_asks_in_seconds(asked: str, least: float, most: float) -> None:
    with scripted([(429, "", {"Retry-After": asked}), (200, {})]) as server:
        began = time.monotonic()
        assert pool(server.url).request("/v1/models") == {}
        assert least <= time.monotonic() - began < most


def test_a_request_that_nobody_waits_for_any_longer_ends() -> None:
    stop = threading.Event()
    threading.Timer(0.3, stop.set).start()
    with pytest.raises(ConnectionError, match="another request"):
        pool("http://127.0.0.1:9").request("/v1/models", stop=stop)


def test_the_environments_proxy_is_for_https_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for scheme in ("http", "https"):
        monkeypatch.setenv(f"{scheme}_proxy", "http://me:secret@proxy:3128")
    monkeypatch.setenv("no_proxy", "intranet")
    proxied = _connections_to("https://api.example.com/v1", 4)
    assert isinstance(proxied, urllib3.ProxyManager)
    assert (proxied.proxy.host, proxied.proxy.port) == ("proxy", 3128)
    assert proxied.proxy_headers["proxy-authorization"].startswith("Basic ")
    for url in ("http://10.0.0.1:8000", "https://intranet/v1"):
        assert not isinstance(_connections_to(url, 4), urllib3.ProxyManager)


def test_it_travels_to_other_processes() -> None:
    with scripted([(200, {"data": []})]) as server:
        used = pool(server.url, headers={"authorization": "Basic abc"})
        assert used.request("/v1/models") == {"data": []}
        assert pickle.loads(pickle.dumps(used)).request("/v1/models") == {"data": []}
        assert [headers["Authorization"] for headers in server.headers] == ["Basic abc"] * 2
