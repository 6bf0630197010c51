"""`benchmarks/gpu.py` as far as a CPU can run it: all parts in tiny sizes, and what a bad check does to others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

CHECKS = """
import math, os, time, unittest

def good(): return {"error": 1e-7}, {"error": (0, 1e-5)}
def inaccurate(): return {"error": 1e-3}, {"error": (0, 1e-5)}
def not_a_number(): return {"error": math.nan}, {"error": (0, 1e-5)}
def raises(): raise ValueError("no")
def lacks(): import bitsandbytes_of_nobody
def skips(): raise unittest.SkipTest("not here")
def crashes(): os._exit(3)
def hangs(): time.sleep(1000)
def last(): return {"figure": 12345}, {}

def checks(device, short):
    return {f.__name__: f for f in (good, inaccurate, not_a_number, raises, lacks, skips, crashes, hangs, last)}

def good_checks(device, short):
    return {"good": good, "skips": skips}

def no_checks(device, short):
    raise ValueError("nothing can be checked")
"""

SCRIPT = f"""
import sys
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu

gpu.PARTS = {{
    "bad": gpu.Part("fake_checks", "checks", 1),
    "good": gpu.Part("fake_checks", "good_checks", 60, times=True),
    "none": gpu.Part("fake_checks", "no_checks", 60),
    "lacking": gpu.Part("fake_checks", "good_checks", 60, ("module_of_nobody",)),
}}
gpu.__file__ = __file__
sys.exit(gpu.main())
"""


def run(script: Path, folder: Path, *arguments: str) -> tuple[int, dict[str, Any], str]:
    """The exit status, the parts of the results, and what was printed."""
    command = [sys.executable, script, "--device", "cpu", "--short", "--output", folder, *arguments]
    environment = os.environ | {"PYTHONPATH": str(script.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert (folder / "gpu.json").exists(), done.stdout + done.stderr
    return done.returncode, json.loads((folder / "gpu.json").read_text()), done.stdout


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    status, results, printed = run(BENCHMARKS / "gpu.py", tmp_path)
    verdicts = {name: part["verdict"] for name, part in results["parts"].items()}
    log = (tmp_path / "gpu.log").read_text()[-5000:]
    assert verdicts.pop("sharded") == "SKIP", "accelerate has no FSDP2 on a CPU"
    assert set(verdicts.values()) == {"PASS"}, printed + log
    assert len(verdicts) == 7
    assert status == 0
    assert results["machine"]["date"]
    assert results["machine"]["versions"]["torch"]
    markdown = (tmp_path / "gpu.md").read_text()
    for name in verdicts:
        assert f"## {name}" in markdown


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str, str]:
    """A run whose first part has checks that fail in every way."""
    folder = tmp_path_factory.mktemp("failed")
    (folder / "fake_checks.py").write_text(CHECKS)
    (folder / "script.py").write_text(SCRIPT)
    status, results, printed = run(folder / "script.py", folder / "out")
    return status, results["parts"], printed, (folder / "out" / "gpu.md").read_text()


def test_a_check_that_fails_crashes_or_hangs_costs_no_other(failed: tuple[int, dict[str, Any], str, str]) -> None:
    status, parts, _, _ = failed
    checks = parts["bad"]["checks"]
    assert status == 1
    assert parts["bad"]["verdict"] == "FAIL"
    wrong = ["inaccurate", "not_a_number", "raises", "crashes", "hangs"]
    assert parts["bad"]["reasons"] == wrong
    assert "ValueError: no" in checks["raises"]["error"]
    assert "ended with 3" in checks["crashes"]["error"]
    assert "longer than 4 s" in checks["hangs"]["error"]
    assert checks["last"]["figures"] == {"figure": 12345}


def test_what_is_missing_is_skipped_and_said(failed: tuple[int, dict[str, Any], str, str]) -> None:
    _, parts, printed, _ = failed
    assert "bitsandbytes_of_nobody" in parts["bad"]["checks"]["lacks"]["skipped"]
    assert parts["bad"]["checks"]["skips"]["skipped"] == "not here"
    assert parts["lacking"]["verdict"] == "SKIP"
    assert "SKIP  lacking  without module_of_nobody" in printed
    assert parts["good"]["verdict"] == "PASS"


def test_a_part_that_cannot_begin_fails(failed: tuple[int, dict[str, Any], str, str]) -> None:
    _, parts, _, _ = failed
    assert parts["none"]["verdict"] == "FAIL"
    assert "before its next check" in parts["none"]["reasons"][0]


def test_the_table_shows_what_is_out_of_range(failed: tuple[int, dict[str, Any], str, str]) -> None:
    *_, markdown = failed
    assert "| inaccurate | **0.001** |" in markdown
    assert "| | figure |\n|---|---:|\n| last | 12,345 |\n" in markdown
    assert "FAILED: ValueError: no" in markdown


def test_a_wheel_loses_the_libraries_of_other_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    wheel = tmp_path / "bitsandbytes-1.whl"
    stay = ["bitsandbytes/nn.py", "bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so"]
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (*stay, "bitsandbytes/libbitsandbytes_cuda128.so", "bitsandbytes/libbitsandbytes_rocm72.so"):
            archive.writestr(name, name)
    gpu.drop_other_libraries(wheel, "13")
    assert zipfile.ZipFile(wheel).namelist() == stay
    assert list(tmp_path.iterdir()) == [wheel]
