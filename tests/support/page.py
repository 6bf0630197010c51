"""`python page.py BLOCKS`: runs the blocks of a page of the documentation, in order, in one Python session.

BLOCKS is a JSON file with a list of (language, file, text). A block that names a file is written there.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    session: dict[str, Any] = {"__name__": "__main__"}
    for language, file, text in json.loads(Path(sys.argv[1]).read_text()):
        print(f"\n--- {language} {file}\n{text}", flush=True)
        if file:
            Path(file).write_text(text)
        elif language == "python":
            exec(compile(text, "a block of the page", "exec"), session)
        else:
            subprocess.run(["bash", "-euo", "pipefail", "-c", text], check=True)


if __name__ == "__main__":
    main()
