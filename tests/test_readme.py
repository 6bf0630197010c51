"""The Python blocks and commands of README.md and docs/ run as written, in a folder where `make demo` was run.

A page is one session: its blocks run in order, a block with a title is written to the file of that name. What cannot
run here (a GPU, a download) is ```text, or ```yaml without a title.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import demo
import page
import pytest
from warm import run_python, warm_process

ROOT = Path(demo.__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SMALL = {"corpus_characters": 1_000_000}
WITH_OTHER_DEMO = """
import functools, json, runpy, sys
sys.path.insert(0, "recipes")
import demo
demo.Recipe = functools.partial(demo.Recipe, **json.loads(sys.argv[1]))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
FENCE = re.compile(r'^( *)```(\w*)(?: title="([^"]+)")?\n(.*?)^\1```$', flags=re.DOTALL | re.MULTILINE)


def blocks_of(path: Path) -> list[tuple[str, str, str]]:
    """(language, file, text) of each block that is to be run or written."""
    blocks = []
    for indent, language, file, text in FENCE.findall(path.read_text()):
        if file or language in ("python", "bash"):
            blocks.append((language, file, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)))
    return blocks


def leave_a_demo(root: Path, recipe: demo.Recipe) -> Path:
    """A folder as the demo leaves it, but for the training: its teacher, student and tokenizer, and the recipes."""
    tokenizer = demo.prepare_corpus(recipe).tokenizer
    teacher = demo.make_model(recipe, recipe.teacher_width, recipe.teacher_layers, seed=0)
    student = demo.make_model(recipe, recipe.student_width, recipe.student_layers, seed=1)
    for name, model in (("teacher", teacher), ("student", student)):
        folder = root / "runs" / "demo" / name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    figures = {"ce": 1.0, "seconds": 0.0, "parameters": teacher.num_parameters()}
    demo.record_teacher(root / "runs" / "demo" / "teacher", recipe, figures)
    (root / "recipes").symlink_to(ROOT / "recipes")
    return root


@pytest.fixture(scope="module")
def small_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same models, with a tokenizer that has read less."""
    return leave_a_demo(tmp_path_factory.mktemp("small_demo"), demo.Recipe(**SMALL))


def run_page(blocks: Sequence[tuple[str, str, str]], folder: Path) -> None:
    """Where `llm-distill` is found first on PATH in the warm process, and all else where this Python is."""
    (folder / "blocks.json").write_text(json.dumps(blocks))
    places = (warm_process().install_command(), Path(sys.executable).parent, os.environ["PATH"])
    run_python(page.__file__, "blocks.json", folder=folder, PATH=os.pathsep.join(map(str, places)))


@pytest.mark.parametrize("path", [path for path in PAGES if blocks_of(path)], ids=lambda path: path.stem)
def test_the_blocks_run_as_written(path: Path, small_demo: Path, tmp_path: Path) -> None:
    run_page(blocks_of(path), shutil.copytree(small_demo, tmp_path / "page", symlinks=True))


@pytest.mark.parametrize(
    "block", [("python", "", "1 / 0"), ("bash", "", "false; true"), ("bash", "", "llm-distill train --divergenze tvd")]
)
def test_a_block_that_fails_is_seen(block: tuple[str, str, str], tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"ZeroDivisionError|CalledProcessError"):
        run_page([block], tmp_path)


def test_the_installed_command_is_what_the_pages_ran(small_demo: Path) -> None:
    (small_demo / "few.jsonl").write_text('{"text": "import os"}\n' * 3)
    command = [Path(sys.executable).with_name("llm-distill"), "train", "--config", "recipes/example.yaml"]
    options = ["--max_steps", "1", "--dataset_name", "few.jsonl"]
    done = subprocess.run([*command, *options], cwd=small_demo, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


def run_recipe(folder: Path, recipe: dict[str, int], name: str, *arguments: str) -> None:
    """As it is, but for the demo, which has read less or in shorter blocks."""
    run_python("-c", WITH_OTHER_DEMO, json.dumps(recipe), f"recipes/{name}.py", *arguments, folder=folder)


def test_the_recipe_captures_without_a_student_named(small_demo: Path) -> None:
    (small_demo / "few.jsonl").write_text('{"text": "import os"}\n' * 3)
    run_recipe(small_demo, SMALL, "capture", "--dataset_name", "few.jsonl", "--packing", "false")
    assert (small_demo / "runs" / "capture" / "cache" / "manifest.json").is_file()


@pytest.mark.slow
def test_the_recipe_writes_and_teaches_without_an_argument(tmp_path: Path) -> None:
    recipe = SMALL | {"block": 32}
    run_recipe(leave_a_demo(tmp_path, demo.Recipe(**recipe)), recipe, "sequence_kd")
    assert (tmp_path / "runs" / "sequence_kd" / "generated" / "train.parquet").is_file()
    assert (tmp_path / "runs" / "sequence_kd" / "student" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_recipes_teach_on_the_students_text_without_an_argument(tmp_path: Path) -> None:
    leave_a_demo(tmp_path, demo.Recipe(**SMALL))
    for name in ("on_policy", "cached_on_policy"):  # the second goes on from the start that the first has left
        run_recipe(tmp_path, SMALL, name)
        assert (tmp_path / "runs" / name / "student" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "cached_on_policy" / "cache" / "manifest.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["born_again", "continual"])
def test_the_recipe_goes_from_stage_to_stage_without_an_argument(name: str, tmp_path: Path) -> None:
    leave_a_demo(tmp_path, demo.Recipe(**SMALL))
    run_recipe(tmp_path, SMALL, name, "--max_steps", "2")
    assert list((tmp_path / "runs" / name).glob("*.md"))


@pytest.mark.slow
def test_the_recipe_finds_passages_without_an_argument(small_demo: Path) -> None:
    run_recipe(small_demo, SMALL, "privileged_context", "--max_steps", "2")
    assert (small_demo / "runs" / "privileged_context" / "student" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_the_recipe_of_peers_compares_without_an_argument_and_trains_those_that_are_named(small_demo: Path) -> None:
    few_steps = SMALL | {"student_steps": 2}
    run_recipe(small_demo, few_steps, "peers")
    assert "by each other and a teacher" in (small_demo / "runs" / "peers" / "results.md").read_text()
    (small_demo / "few.jsonl").write_text('{"text": "import os"}\n' * 8)
    names = ["--students", "runs/demo/student", "runs/demo/student"]
    options = ["--dataset_name", "few.jsonl", "--output_dir", "runs/named", "--max_steps", "2", "--report_to", "none"]
    run_recipe(small_demo, few_steps, "peers", *names, *options, "--teacher_model_name_or_path", "runs/demo/teacher")
    for number in "01":
        assert (small_demo / "runs" / "named" / number / "model.safetensors").is_file()


def test_troubleshooting_quotes_what_the_code_says() -> None:
    """A message that nobody can meet any more is not to be looked up."""
    said = [
        re.sub(r"\s+", " ", "".join(part.value if isinstance(part, ast.Constant) else "…" for part in parts))
        for path in (ROOT / "llm_distill").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for parts in [getattr(node, "values", [node]) if isinstance(node, ast.JoinedStr | ast.Constant) else []]
        if all(isinstance(part, ast.FormattedValue) or isinstance(part.value, str) for part in parts)
    ]
    quoted = re.findall(r"^\| \*(.+?)\* \|", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.MULTILINE)
    fragments = [fragment.strip() for quote in quoted for fragment in quote.split("…") if fragment.strip(" :,")]
    assert len(quoted) > 10
    assert not [each for each in fragments if not any(each in text for text in said)]


def test_every_command_of_make_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {name for path in PAGES for name in re.findall(r"make ([\w-]+)$", path.read_text(), flags=re.MULTILINE)}
    assert targets >= named >= {"demo", "check", "test"}
