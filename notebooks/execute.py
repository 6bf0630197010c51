"""`python notebooks/execute.py [NOTEBOOK …]`: runs notebooks in place, by default all, and says how long each took."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SETTINGS = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}
"""Bars are no output to keep (the table of a run is), and nothing is downloaded."""
FIRST = "import logging, llm_distill.trainer; logging.getLogger('transformers.trainer_utils').setLevel('ERROR')"
"""Run before the first cell: what libraries say when they start, and of a tokenizer whose end token is the model's."""


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook at `path`, run in `folder`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        record_timing=False,
        store_widget_state=False,
        extra_arguments=[f"--IPKernelApp.exec_lines={FIRST}"],
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=os.environ | SETTINGS)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _can_be_kept(output)]
    del notebook.metadata["language_info"]  # differs between Python's versions
    return notebook


def _can_be_kept(output: nbformat.NotebookNode) -> bool:
    """Neither blank lines nor a bar, which is nothing without its kernel."""
    is_bar = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return not is_bar and bool(output.get("text", "said").strip())


if __name__ == "__main__":
    for path in [Path(name) for name in sys.argv[1:]] or sorted(HERE.glob("*.ipynb")):
        began = time.perf_counter()
        executed = execute(path, HERE)
        nbformat.write(executed, path)
        print(f"{path.name}: {time.perf_counter() - began:.0f} s, {path.stat().st_size / 1000:.0f} kB")
