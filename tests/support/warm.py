"""`python warm.py SOCKET`: a process that has imported the libraries and forks for each program that it is to run.

To start Python with torch, transformers and TRL takes eight seconds, and the tests have a hundred programs. In a fork
of this process a program begins at once, and is a process of its own all the same. llm_distill is not imported here,
so that a program which does without it can be run too. What is imported is left out of what Python looks through for
garbage: two fifths of what a test takes are such searches otherwise.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import os
import runpy
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

COMMAND = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as warm:
    warm.connect({address!r})
    arguments = ["-m", "llm_distill.cli", *sys.argv[1:]]
    request = dict(arguments=arguments, folder=os.getcwd(), environment=dict(os.environ))
    socket.send_fds(warm, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
    pid, status = warm.makefile()
    sys.exit(int(status) % 256)
"""


@dataclass
class Program:
    """One that runs in a fork of the warm process, or has."""

    pid: int
    _connection: socket.socket
    _output: IO[bytes]
    _errors: IO[bytes]
    _status: int | None = None

    def wait(self, timeout: float = 300) -> int:
        """Its exit status, negative for a signal.

        Raises:
            TimeoutError: it runs on.
        """
        if self._status is None:
            self._connection.settimeout(timeout)
            self._status = int(self._connection.recv(16))
            self._connection.close()
        return self._status

    def poll(self) -> int | None:
        """The same, or None while it runs."""
        has_ended = self._status is not None or select.select([self._connection], [], [], 0)[0]
        return self.wait() if has_ended else None

    def kill(self) -> None:
        """At once."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it was faster
                os.kill(self.pid, signal.SIGKILL)
        self.wait()

    def output(self) -> str:
        """What it has written so far."""
        return _content(self._output)

    def errors(self) -> str:
        """What it has written to standard error."""
        return _content(self._errors)


def _content(file: IO[bytes]) -> str:
    """All of it. The file's place stays, which is where a program writes on."""
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode(errors="replace")


class WarmProcess:
    """Ends with the process that has started it. `environment` is added to that of the tests."""

    def __init__(self, **environment: str) -> None:
        self._environment = environment
        self._folder = Path(tempfile.mkdtemp(prefix="warm-"))
        self.address = str(self._folder / "socket")
        command = [sys.executable, __file__, self.address]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, env=os.environ | environment)
        self._ends_with = process.stdin
        while not os.path.exists(self.address):
            assert process.poll() is None, "it has ended"
            time.sleep(0.05)

    def start(
        self,
        *arguments: str | Path,
        folder: Path | None = None,
        output: IO[bytes] | None = None,
        **environment: str,
    ) -> Program:
        """`python *arguments` in a fork: `-c PROGRAM …`, `-m MODULE …` or `SCRIPT …`.

        Args:
            output: takes all that it writes.
        """
        request = {
            "arguments": [str(argument) for argument in arguments],
            "folder": str(folder or Path.cwd()),
            "environment": os.environ | self._environment | environment,
        }
        errors = output or tempfile.TemporaryFile()  # noqa: SIM115
        output = output or tempfile.TemporaryFile()  # noqa: SIM115
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self.address)
        with open(os.devnull) as nothing:
            descriptors = [nothing.fileno(), output.fileno(), errors.fileno()]
            socket.send_fds(connection, [json.dumps(request).encode() + b"\n"], descriptors)
        pid = b""
        while not pid.endswith(b"\n"):
            pid += connection.recv(1)
        return Program(int(pid), connection, output, errors)

    def install_command(self) -> Path:
        """The folder of an `llm-distill` that runs here."""
        command = self._folder / "llm-distill"
        command.write_text(COMMAND.format(python=sys.executable, address=self.address))
        command.chmod(command.stat().st_mode | stat.S_IXUSR)
        return self._folder


@functools.cache
def warm_process() -> WarmProcess:
    return WarmProcess()


def run_python(*arguments: str | Path, folder: Path | None = None, **environment: str) -> str:
    """What `python *arguments` prints.

    Raises:
        AssertionError: it fails; with the end of what it wrote.
    """
    program = warm_process().start(*arguments, folder=folder, **environment)
    assert program.wait(540) == 0, f"{program.output()[-2000:]}\n{program.errors()[-4000:]}"
    return program.output()


def serve(address: str) -> None:
    """Until standard input ends."""
    import bitsandbytes  # noqa: F401
    import datasets  # noqa: F401
    import evaluate  # noqa: F401
    import matplotlib.pyplot
    import peft  # noqa: F401
    import rouge_score.rouge_scorer  # noqa: F401
    import torch.distributed.tensor  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401
    from trl import SFTTrainer  # noqa: F401

    if importlib.util.find_spec("deepspeed"):  # which accelerate then imports in every run
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        importlib.import_module("deepspeed")
    matplotlib.use("Agg")
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address + ".new")
        server.listen()
        os.rename(address + ".new", address)
        while sys.stdin not in select.select([server, sys.stdin], [], [])[0]:
            connection, _ = server.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                server.close()
                answer(connection)
            connection.close()
    shutil.rmtree(Path(address).parent)


def answer(connection: socket.socket) -> None:
    """In a fork, which forks again: tells the program's process id and then its exit status, and ends."""
    message, descriptors, *_ = socket.recv_fds(connection, 2**20, 3)
    while not message.endswith(b"\n"):
        message += connection.recv(2**20)
    request = json.loads(message)
    pid = os.fork()
    if pid == 0:
        connection.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os._exit(run(**request))
    try:
        connection.sendall(b"%d\n" % pid)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    finally:
        os._exit(0)


def run(arguments: Sequence[str], folder: str, environment: Mapping[str, str]) -> int:
    """Runs what Python is asked to run, in this process; gives its exit status."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    kind, *rest = arguments
    status = 0
    try:
        if kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            sys.argv = ["-m", *rest[1:]]
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(arguments)
            sys.path.insert(0, str(Path(kind).parent))
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # as Python does when it ends: threads are waited for
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    serve(sys.argv[1])
