"""`python warm.py SOCKET`: a process that has imported everything and forks for each program that it is asked to run.

To start Python with torch, transformers and TRL takes ten seconds, and the documentation has dozens of commands. The
same code runs in a fork of this process in a tenth of a second. `run_page` and the `llm-distill` that pages find on
their PATH are its clients.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

COMMAND = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as warm:
    warm.connect({address!r})
    request = dict(argv=["llm-distill", *sys.argv[1:]], folder=os.getcwd(), environment=dict(os.environ))
    socket.send_fds(warm, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
    sys.exit((warm.recv(1) or b"\\1")[0])
"""


@contextlib.contextmanager
def warm_process(folder: Path) -> Iterator[str]:
    """Where it listens. `folder` gets `bin/llm-distill`, which runs there."""
    address = str(folder / "warm")
    process = subprocess.Popen([sys.executable, __file__, address])
    command = folder / "bin" / "llm-distill"
    command.parent.mkdir()
    command.write_text(COMMAND.format(python=sys.executable, address=address))
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    try:
        while not os.path.exists(address):
            assert process.poll() is None, "it has ended"
            time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.wait()


def run_page(address: str, blocks: Sequence[tuple[str, str, str]], folder: Path, path: str) -> None:
    """Runs blocks (language, file to be written, text) in order, in one Python session; PATH begins with `path`.

    Raises:
        AssertionError: one fails; with what it wrote.
    """
    environment = os.environ | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    request = {"argv": [], "blocks": blocks, "folder": str(folder), "environment": environment}
    with socket.socket(socket.AF_UNIX) as warm, (folder / ".output").open("w+b") as output:
        warm.settimeout(540)
        warm.connect(address)
        socket.send_fds(warm, [json.dumps(request).encode() + b"\n"], [output.fileno()] * 3)
        failed = warm.recv(1) != b"\0"
        output.seek(0)
        assert not failed, output.read().decode(errors="replace")[-6000:]


def _serve(address: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import llm_distill.capture.report
    import llm_distill.cli
    import llm_distill.generation.run
    import llm_distill.trainer  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the forks
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address + ".new")
        server.listen()
        os.rename(address + ".new", address)
        while True:
            connection, _ = server.accept()
            if os.fork() == 0:
                server.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                _answer(connection)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """In a fork: takes the client's folder, environment and files, runs, tells the exit status, ends."""
    said, descriptors, *_ = socket.recv_fds(connection, 2**20, 3)
    while not said.endswith(b"\n"):
        said += connection.recv(2**20)
    request = json.loads(said)
    for mine, theirs in enumerate(descriptors):
        os.dup2(theirs, mine)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    status = 1
    try:
        if request["argv"]:
            from llm_distill.cli import main

            sys.argv = request["argv"]
            main()
        else:
            _run_blocks(request["blocks"])
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    connection.sendall(bytes([status]))
    os._exit(status)


def _run_blocks(blocks: Sequence[tuple[str, str, str]]) -> None:
    session: dict[str, Any] = {"__name__": "__main__"}
    for language, file, text in blocks:
        print(f"\n--- {language} {file}\n{text}", flush=True)
        if file:
            Path(file).write_text(text)
        elif language == "python":
            exec(compile(text, "a block of the page", "exec"), session)
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
