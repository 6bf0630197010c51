"""Everything that only a GPU can show, in one run of under eight minutes.

    make gpu                                             # on a machine with a GPU
    python benchmarks/gpu.py --parts kernels blocks      # some of it
    python benchmarks/gpu.py --device cpu --short        # as much as a CPU can run, in tiny sizes: about a minute

| part | what it shows | needs, beside BASIS |
|---|---|---|
| kernels_float32, kernels_bfloat16 | the Triton kernels against float64, at real sizes | triton |
| paths | events, device_map, 4 bits, LoRA, a run beside the CPU's, a cache, vLLM | DATA; bitsandbytes; vllm |
| sharded | FSDP2 on one rank, as `accelerate launch` starts it | DATA |
| memory | the memory of training steps beside the estimate of check/memory.py | DATA |
| blocks | the rates of this GPU; block sizes, warps and rows of a chunk tried | triton |
| fused_head | fused_head.py: 8,192 rows, V to 262,144, widths 896 and 3584 | triton; for rivals trl, liger-kernel |
| train_step | train_step.py --size large | DATA |

The first five run side by side, the others alone, because they take times. A part is a list of checks. One that fails,
crashes or takes too long costs no other, and what the machine lacks is said and skipped. The exit status is 1 if a part
failed. Results go to $OUT or runs/gpu: gpu.json, gpu.md and, with all that the processes printed, gpu.log. They are
written anew after each part, so that they are there if the run is ended from outside.

To a machine without a network, the repository comes with a folder of wheels. Where there is a network, in the
environment of `make setup`,

    python benchmarks/gpu.py --collect runs/wheels

fetches WHEELS in that environment's versions, for Python 3.12 on x86-64 Linux with CUDA 13: 23 MiB. Not among them is
what an image for work with torch has: torch and triton, numpy, safetensors, tokenizers, huggingface_hub and, for DATA,
pyarrow and pandas, which alone would be 57 MiB. The command there, which is to be given 540 seconds, is

    PYTHONUNBUFFERED=1 python3 benchmarks/gpu.py --wheels runs/wheels --commit COMMIT
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import unittest
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]

BASIS = ("torch", "numpy", "jaxtyping", "transformers", "peft", "accelerate", "safetensors", "psutil", "yaml")
"""Modules that every part imports."""
DATA = ("trl", "datasets", "pyarrow", "pandas")
WHEELS = (
    *("transformers", "accelerate", "peft", "trl", "datasets", "dill", "multiprocess"),
    *("bitsandbytes", "liger-kernel", "jaxtyping", "wadler-lindig"),
)
"""Distributions that are carried to a machine. The others that these need, such an image has."""
MOST_MIB = 60
"""What may be carried, with 4 more for the repository."""


class Part(NamedTuple):
    module: str
    function: str
    """In it, which gives the checks by name: each returns its figures and, of some of them, the range allowed."""
    seconds: int
    """That a check may take; the first one with the imports."""
    modules: tuple[str, ...] = ()
    times: bool = False
    """Runs alone, because it takes times."""


PARTS = {
    "kernels_float32": Part("gpu_kernels", "float32_checks", 60, ("triton",)),
    "kernels_bfloat16": Part("gpu_kernels", "bfloat16_checks", 60, ("triton",)),
    "paths": Part("gpu_paths", "path_checks", 90, DATA),
    "sharded": Part("gpu_paths", "sharded_checks", 150, DATA),
    "memory": Part("gpu_paths", "memory_checks", 90, DATA),
    "blocks": Part("gpu_speed", "block_checks", 60, ("triton",), times=True),
    "fused_head": Part("gpu_speed", "fused_head_checks", 45, ("triton",), times=True),
    "train_step": Part("gpu_speed", "train_step_checks", 60, DATA, times=True),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--short", action="store_true", help="tiny sizes, to see that all of it runs")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--seconds", type=float, default=450, help="after which nothing is started or waited for")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT") or ROOT / "runs" / "gpu"))
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="a folder of wheels to install first")
    parser.add_argument("--commit", default=None, help="of the code, where git cannot say it")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="only fetch the wheels for such a machine")
    parser.add_argument("--python", default="3.12", help="that machine's version, for --collect")
    parser.add_argument("--cuda", default="13", help="that machine's major version of CUDA, for --collect")
    parser.add_argument("--checks", nargs=2, metavar=("PART", "FILE"), help=argparse.SUPPRESS)
    parser.add_argument("--about", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := sorted({name for name in args.parts if not any(part.startswith(name) for part in PARTS)}):
        parser.error(f"unknown parts {unknown}; known: {', '.join(PARTS)}")
    if args.collect:
        return collect_wheels(args.collect, args.python, args.cuda)
    if args.checks:
        run_checks(args.checks[0], Path(args.checks[1]), args.device, args.short)
        return 0
    if args.about:
        print(json.dumps(describe_machine(args.device)))
        return 0
    return Run(args).run()


class Run:
    """All parts, each in processes of its own, and what is written of them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.began = args, time.monotonic()
        self.parts = [name for name in PARTS if any(name.startswith(asked) for asked in args.parts)]
        self.results: dict[str, dict[str, Any]] = {}
        self.lock = threading.Lock()  # of `results` and the files that they are written to
        self.about: dict[str, Any] = {}
        self.folder = tempfile.TemporaryDirectory(prefix="llm_distill_gpu_")
        self.scratch = Path(self.folder.name)
        paths = [str(self.scratch / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.scratch),
            "HF_HOME": str(self.scratch / "huggingface"),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        if args.device == "cpu":
            self.environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
        else:
            self.environment.pop("TRITON_INTERPRET", None)

    def run(self) -> int:
        """The exit status."""
        args = self.args
        args.output.mkdir(parents=True, exist_ok=True)
        self.log = (args.output / "gpu.log").open("w")
        self.say(f"results go to {args.output}")
        if args.wheels is not None:
            self.install_wheels(args.wheels)
        about = self.start("--about", output=subprocess.PIPE)
        printed, _ = about.communicate()
        if about.returncode:
            self.say(f"torch with {args.device} cannot be used here: see {args.output / 'gpu.log'}")
            return 1
        self.about = json.loads(printed.splitlines()[-1])
        self.about["commit"] = args.commit or output_of("git", "-C", str(ROOT), "describe", "--always", "--dirty")
        self.say(in_one_line(self.about, "versions", "modules"))
        together = [name for name in self.parts if not PARTS[name].times]
        with ThreadPoolExecutor(max(len(together), 1)) as threads:
            list(threads.map(self.run_part, together))
        for name in self.parts:
            if PARTS[name].times:
                self.run_part(name)
        self.say(f"\n{summary(self.results)}\n\n{args.output / 'gpu.md'}, {self.seconds():.0f} s in all")
        verdicts = [result["verdict"] for result in self.results.values()]
        return int("FAIL" in verdicts or "PASS" not in verdicts)

    def run_part(self, name: str) -> None:
        """Until each of its checks has a result: where a process dies of one, another goes on with the next."""
        part, began = PARTS[name], time.monotonic()
        file, checks, problem = self.scratch / f"{name}.jsonl", {}, ""
        missing = [module for module in (*BASIS, *part.modules) if module not in self.about["modules"]]
        while not missing and not problem:
            if self.deadline(name) - self.seconds() < 10:
                problem = "no time was left"
                break
            before, process = len(checks), self.start("--checks", name, str(file))
            reason = self.watch(process, name, file, checks) or f"the process ended with {process.returncode}"
            for check in [check for check, result in checks.items() if not result]:
                checks[check] = {"error": reason}
                self.say(describe(name, check, checks[check]))
            if process.returncode == 0:
                break
            if len(checks) == before:
                problem = f"{reason}, before its next check: see gpu.log"
        failed = [check for check, result in checks.items() if "error" in result or result.get("outside")]
        passed = [check for check, result in checks.items() if check not in failed and "skipped" not in result]
        verdict = "FAIL" if failed or problem else "PASS" if passed else "SKIP"
        reasons = [f"without {', '.join(missing)}"] if missing else [problem] if problem else failed
        seconds = time.monotonic() - began
        with self.lock:
            self.results[name] = {"verdict": verdict, "seconds": seconds, "reasons": reasons, "checks": checks}
        self.say(f"[{name}] {verdict} in {seconds:.0f} s{': ' if reasons else ''}{'; '.join(reasons)}")
        self.write()

    def watch(self, process: subprocess.Popen, name: str, file: Path, checks: dict[str, dict[str, Any]]) -> str:
        """Tells of each result as it comes. Returns why the process was ended, if it was."""
        moved = time.monotonic()
        while True:
            ended = process.poll() is not None
            for check, result in read_lines(file).items():
                if check not in checks or (result and not checks[check]):
                    checks[check], moved = result, time.monotonic()
                    if result:
                        self.say(describe(name, check, result))
            if ended:
                return ""
            reason = ""
            if time.monotonic() - moved > PARTS[name].seconds * self.patience:
                reason = f"took longer than {PARTS[name].seconds * self.patience} s"
            if self.seconds() > self.deadline(name):
                reason = f"was not ready {self.deadline(name):.0f} s after the start"
            if reason:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return reason
            time.sleep(0.1)

    def start(self, *arguments: str, output: Any = None) -> subprocess.Popen:
        """Another process of this script."""
        arguments = (*arguments, "--device", self.args.device, *(["--short"] if self.args.short else []))
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *arguments],
            env=self.environment,
            cwd=ROOT,
            text=True,
            stdout=output or self.log,
            stderr=self.log,
            start_new_session=True,  # so that it can be ended with all that it has started
        )

    def deadline(self, name: str) -> float:
        """Seconds after the start: what runs first leaves more than half of the time to what takes times."""
        return self.args.seconds * self.patience * (1 if PARTS[name].times else 0.45)

    @property
    def patience(self) -> int:
        """A GPU's time is dear; on a CPU, others may be at work."""
        return 1 if self.args.device == "cuda" else 4

    def install_wheels(self, folder: Path) -> None:
        """Into a folder in front of all others: a virtual environment made by another one lacks its packages."""
        wheels = sorted(map(str, folder.glob("*.whl")))
        options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
        command = [sys.executable, "-m", "pip", "install", *options, "--target", str(self.scratch / "site"), *wheels]
        done = subprocess.run(command, stdout=self.log, stderr=self.log, check=False)
        how = "installed" if done.returncode == 0 else f"could not be installed (pip ended with {done.returncode})"
        self.say(f"{len(wheels)} wheels from {folder} {how}")

    def write(self) -> None:
        """All results so far, in the order of the parts."""
        with self.lock:
            self.results = {name: self.results[name] for name in PARTS if name in self.results}
            about = {name: value for name, value in self.about.items() if name != "modules"}
            whole = {"machine": about, "seconds": self.seconds(), "parts": self.results}
            (self.args.output / "gpu.json").write_text(json.dumps(whole, indent=1) + "\n")
            (self.args.output / "gpu.md").write_text(as_markdown(about, self.results))

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def say(self, text: str) -> None:
        print(text, flush=True)


def run_checks(name: str, file: Path, device: str, short: bool) -> None:
    """All checks of a part that have not begun yet, in this process. Each leaves a line before and a line after it."""
    module = importlib.import_module(PARTS[name].module)
    checks, begun = getattr(module, PARTS[name].function)(device, short), read_lines(file)
    for check, function in checks.items():
        if check in begun:
            continue
        add_line(file, {"check": check})
        print(f"--- {name}: {check}", flush=True)
        began, result = time.monotonic(), {}
        try:
            figures, ranges = function()
            outside = [key for key, (low, high) in ranges.items() if not low <= figures[key] <= high]
            result = {"figures": figures, "ranges": ranges, "outside": outside}
        except unittest.SkipTest as reason:
            result = {"skipped": str(reason)}
        except ModuleNotFoundError as error:
            is_ours = (error.name or "").split(".")[0] in ("llm_distill", "")
            result = {"error" if is_ours else "skipped": str(error)}
        except Exception as error:  # whatever it was, the next check comes
            traceback.print_exc()
            result = {"error": f"{type(error).__name__}: {error}"[:500]}
        add_line(file, {"check": check, "result": result | {"seconds": time.monotonic() - began}})
        if "error" in result:
            require_usable(device)


def require_usable(device: str) -> None:
    """After some errors, no CUDA call of the process works any more: another one goes on."""
    import torch

    if device == "cuda":
        try:
            torch.zeros(1, device=device).item()
            torch.cuda.empty_cache()
        except RuntimeError:
            traceback.print_exc()
            sys.exit(1)


def add_line(file: Path, content: dict[str, Any]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(content) + "\n")


def read_lines(file: Path) -> dict[str, dict[str, Any]]:
    """The result of each check that began, {} where there is none yet."""
    text = file.read_text() if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return {line["check"]: line.get("result", {}) for line in lines}


def describe_machine(device: str) -> dict[str, Any]:
    """Where the figures come from, and which modules can be imported here."""
    import torch

    if device == "cuda":
        torch.zeros(1, device=device)
        properties = torch.cuda.get_device_properties(device)
        gpu = {
            "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "CUDA": torch.version.cuda,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
    versions = {}
    for name in ("torch", "triton", *WHEELS):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name(device) if device == "cuda" else "cpu",
        **(gpu if device == "cuda" else {}),
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        "versions": versions,
        "modules": [name for name in (*BASIS, *DATA, "triton") if importlib.util.find_spec(name)],
    }


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def describe(part: str, check: str, result: dict[str, Any]) -> str:
    """A line of progress."""
    head = f"[{part}] {check}: "
    if "error" in result or "skipped" in result:
        return head + (f"FAILED, {result['error']}" if "error" in result else f"skipped, {result['skipped']}")
    figures = ", ".join(f"{key} {in_words(value)}" for key, value in result["figures"].items())
    return head + figures + "".join(f"; FAILED, {key} is outside {result['ranges'][key]}" for key in result["outside"])


def in_words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def summary(results: dict[str, dict[str, Any]]) -> str:
    lines = [f"{result['verdict']}  {name}  {'; '.join(result['reasons'])}" for name, result in results.items()]
    return "\n".join(map(str.rstrip, lines))


def in_one_line(about: dict[str, Any], *without: str) -> str:
    return ", ".join(f"{name} {value}" for name, value in about.items() if name not in without)


def as_markdown(about: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    where = in_one_line(about, "versions", "date", "device")
    lines = ["# On a GPU", "", f"{about['date']}, {about['device']}: {where}. {versions}.", ""]
    lines += ["| part | | seconds | |", "|---|---|---:|---|"]
    for name, result in results.items():
        lines.append(f"| {name} | {result['verdict']} | {result['seconds']:.0f} | {'; '.join(result['reasons'])} |")
    for name, result in results.items():
        if result["checks"]:
            lines += ["", f"## {name}", "", *table(result["checks"])][:-1]
    return "\n".join(lines) + "\n"


def table(checks: dict[str, dict[str, Any]]) -> Iterator[str]:
    """A row a check, those with the same figures under each other. A figure that is outside its range is bold."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, result in checks.items():
        words = {key: in_words(value) for key, value in result.get("figures", {}).items()}
        words |= {key: f"**{words[key]}**" for key in result.get("outside", [])}
        note = f"FAILED: {result['error']}" if "error" in result else result.get("skipped")
        cells = [name, *words.values(), *([re.sub(r"[|\n]", " ", note)] if note else [])]
        groups.setdefault(tuple(words), []).append(f"| {' | '.join(cells)} |")
    for columns, rows in groups.items():
        yield f"| | {' | '.join(columns)} |"
        yield f"|---|{'---:|' * len(columns) or '---|'}"
        yield from (*rows, "")


def collect_wheels(folder: Path, python: str, cuda: str) -> int:
    """Fetches WHEELS in the versions of this environment. The exit status."""
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(17, 40)] + ["manylinux2014_x86_64"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--implementation", "cp", "--python-version", python, "--dest", str(folder)]
    command += [part for platform in platforms for part in ("--platform", platform)]
    command += [f"{name}=={importlib.metadata.version(name)}" for name in WHEELS]
    for old in folder.glob("*.whl"):  # of two versions of one, neither would be installed
        old.unlink()
    if subprocess.run(command, check=False).returncode:
        return 1
    for wheel in folder.glob("bitsandbytes-*.whl"):
        drop_other_libraries(wheel, cuda)
    sizes = {wheel.name: wheel.stat().st_size / 2**20 for wheel in sorted(folder.glob("*.whl"))}
    for name, size in sizes.items():
        print(f"{size:6.1f} MiB  {name}")
    total = sum(sizes.values())
    print(f"{total:6.1f} MiB in {folder}" + (f", more than {MOST_MIB}" if total > MOST_MIB else ""))
    return int(total > MOST_MIB)


def drop_other_libraries(wheel: Path, cuda: str) -> None:
    """Bitsandbytes has a library for every accelerator and version, 150 MB of them: those of one CUDA stay."""
    whole = wheel.rename(wheel.with_suffix(".whole"))
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            library = re.fullmatch(r"bitsandbytes/libbitsandbytes_(\w+)\.so", entry.filename)
            if library is None or library[1] == "cpu" or library[1].startswith(f"cuda{cuda}"):
                target.writestr(entry, source.read(entry))
    whole.unlink()


if __name__ == "__main__":
    sys.exit(main())
