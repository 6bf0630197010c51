"""What CXX names in the tests: g++ that compiles the same row kernels once, however many processes ask for them.

`python cxx.py FOLDER …` keeps them in FOLDER.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path


def main() -> None:
    folder, *arguments = sys.argv[1:]
    command = ["g++", *arguments]
    sources = [argument for argument in arguments if argument.endswith("row_kernels.cpp")]
    if not sources:  # somebody else's
        os.execvp(command[0], command)
    place = arguments.index("-o") + 1
    library = arguments.pop(place)
    known = Path(folder) / hashlib.sha256(repr(arguments).encode() + Path(sources[0]).read_bytes()).hexdigest()
    if not known.exists():
        mine = f"{known}.{os.getpid()}"
        subprocess.run([*command[: place + 1], mine, *command[place + 2 :]], check=True)
        os.rename(mine, known)
    shutil.copyfile(known, library)


if __name__ == "__main__":
    main()
