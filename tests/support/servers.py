"""Servers in processes of their own, on free ports of 127.0.0.1, for as long as a test needs them."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import urllib3
from warm import Program, warm_process


@dataclass
class RunningServer:
    url: str
    process: subprocess.Popen[bytes] | Program

    def kill(self) -> None:
        """At once, with all of its processes."""
        if isinstance(self.process, Program):
            self.process.kill()
        elif self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@contextmanager
def serving(
    command: Sequence[str | Path],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
    ready: str = "/v1/models",
    seconds: float = 60,
) -> Iterator[RunningServer]:
    """Runs `command`, in which PORT stands for a free port, and waits until it answers a GET of `ready`.

    A command of this Python runs in a fork of the warm process.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(port) if part == "PORT" else str(part) for part in command]
    process: subprocess.Popen[bytes] | Program
    with log.open("wb") as output:
        if command[0] == sys.executable:
            process = warm_process().start(*command[1:], output=output, **(environment or {}))
        else:
            environment = {**os.environ, **(environment or {})}
            process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True)
    server = RunningServer(f"http://127.0.0.1:{port}", process)
    try:
        end = time.monotonic() + seconds
        while not _answers(server.url + ready, headers):
            assert process.poll() is None, f"{command[0]} ended:\n{log.read_text()[-3000:]}"
            assert time.monotonic() < end, f"{command[0]} did not answer in {seconds} s:\n{log.read_text()[-3000:]}"
            time.sleep(0.2)
        yield server
    finally:
        server.kill()


def _answers(url: str, headers: Mapping[str, str] | None) -> bool:
    try:
        return urllib3.request("GET", url, headers=dict(headers or {}), retries=False, timeout=2).status == 200
    except urllib3.exceptions.HTTPError:
        return False
