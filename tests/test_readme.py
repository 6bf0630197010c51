"""The README's Python blocks and commands run as written, in a folder where `make demo` was run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import demo
import pytest

ROOT = Path(demo.__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture(scope="module")
def after_the_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the demo leaves it, but for the training: its teacher, student and tokenizer, and the recipes."""
    recipe = demo.Recipe()
    tokenizer = demo.prepare_corpus(recipe).tokenizer
    root = tmp_path_factory.mktemp("after_the_demo")
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


def run(command: list[str] | str, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        shell=isinstance(command, str),
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def test_the_python_blocks_run_as_written(after_the_demo: Path) -> None:
    found = blocks("python")
    assert len(found) == 2
    for block in found:
        run([sys.executable, "-c", block], after_the_demo)


@pytest.mark.parametrize("block", blocks("bash"))
def test_the_commands_run_as_written(after_the_demo: Path, block: str) -> None:
    for command in block.splitlines():
        run(command, after_the_demo)


def test_the_recipe_captures_without_a_student_named(after_the_demo: Path) -> None:
    (after_the_demo / "few.jsonl").write_text('{"text": "import os"}\n' * 3)
    run("accelerate launch recipes/capture.py --dataset_name few.jsonl --packing false", after_the_demo)
    assert (after_the_demo / "runs" / "capture" / "cache" / "manifest.json").is_file()


def test_the_recipe_writes_and_teaches_without_an_argument(after_the_demo: Path) -> None:
    run("accelerate launch recipes/sequence_kd.py", after_the_demo)
    assert (after_the_demo / "runs" / "sequence_kd" / "generated" / "train.parquet").is_file()
    assert (after_the_demo / "runs" / "sequence_kd" / "student" / "model.safetensors").is_file()


def test_every_command_of_make_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([\w-]+):.*## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert targets >= set(re.findall(r"make ([\w-]+)$", README, flags=re.MULTILINE)) >= {"demo", "check", "test"}
