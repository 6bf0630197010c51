"""The notebooks run, and what is committed of them is what a reader should see."""

from __future__ import annotations

import base64
import itertools
import re
import sys
from pathlib import Path

import demo
import nbformat
import pytest

ROOT = Path(demo.__file__).parents[1]
sys.path.append(str(ROOT / "notebooks"))
from execute import execute  # noqa: E402

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
STEPS = re.compile(r"(?<=steps=)\d{2,}")
LOCAL = re.compile(
    r"/(?:home|root|tmp|Users|work|opt|mnt|var)/|[A-Z]:\\\\|site-packages/\w+/\w+\.py:\d+|<ipython-input"
)


def outputs_of(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def require_fit_to_be_read(notebook: nbformat.NotebookNode) -> None:
    """Outputs without errors, warnings, bars or local paths; plots of less than 60 kB."""
    outputs = outputs_of(notebook)
    assert [output for output in outputs if "image/png" in output.get("data", {})], "no plot"
    for output in outputs:
        assert output.output_type != "error"
        assert output.get("name") != "stderr", output.text
        assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})
        assert len(base64.b64decode(output.get("data", {}).get("image/png", ""))) < 60_000
        texts = [text for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
        assert not [text for text in [output.get("text", ""), *texts] if LOCAL.search(text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_can_be_read(path: Path) -> None:
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1)), "run from the top, once"
    require_fit_to_be_read(notebook)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a notebook finds around it; what it makes stays here, for the next one too."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "notebooks").mkdir()
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, checkout: Path) -> None:
    """With a few steps where a reader's models take hundreds."""
    committed, shortened = nbformat.read(path, as_version=4), checkout / "notebooks" / path.name
    shortened.write_text(STEPS.sub("12", path.read_text()))
    notebook = execute(shortened, shortened.parent)
    require_fit_to_be_read(notebook)
    outputs = map(outputs_of, (committed, notebook))  # where a stream is broken in two, the machine was busy
    kinds = [[kind for kind, _ in itertools.groupby(output.output_type for output in each)] for each in outputs]
    assert kinds[0] == kinds[1], "make notebooks"


def test_the_table_of_a_run_has_the_metrics() -> None:
    """In Jupyter a run shows a line an evaluation: with those of the distillation, and not only the loss."""
    notebook = nbformat.read(ROOT / "notebooks" / "01_first_distillation.ipynb", as_version=4)
    tables = [html for o in outputs_of(notebook) if "<table" in (html := o.get("data", {}).get("text/html", ""))]
    assert len(tables) == 3  # the teacher, and two students
    for table in tables[1:]:
        header = re.findall(r"<th>(.*?)</th>", table)
        assert header[:3] == ["Step", "Training Loss", "Validation Loss"]
        assert {"Cross-entropy", "Perplexity", "KL to teacher", "Top-1 agreement", "Σ min(p, q)"} <= set(header)
        rows = re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], flags=re.DOTALL)
        assert all(len(re.findall(r"<td>(?:\d|\.)+</td>", row)) == len(header) for row in rows[1:])
