"""`llm-distill COMMAND`: the command line. `llm-distill COMMAND --help` shows its options with their meaning.

Options may come from a YAML file (`--config run.yaml`) and from the command line, which wins. Several ranks:
`accelerate launch --config_file recipes/accelerate/ddp.yaml -m llm_distill.cli train --config run.yaml`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from llm_distill import __version__

EXAMPLE = """example:
  llm-distill train --model_name_or_path Qwen/Qwen2.5-0.5B --teacher_model_name_or_path Qwen/Qwen2.5-7B \\
      --dataset_name trl-lib/Capybara --output_dir student --divergence forward_kl

--dataset_name may be a Hub id, a folder, a .json, .jsonl, .csv, .parquet or .txt file, or `stdlib`, two
megabytes of the sources of the Python standard library, which need no download."""

COMMANDS = {
    "train": "train a student on a teacher's distributions (token-level distillation)",
    "prune": "make a student from its teacher: fewer layers, narrower ones, or a size to reach",
    "compress": "prune a model and teach what is left, step by step, as long as it costs little",
    "sweep": "try settings of a run, and say which is best and what mattered",
    "check": "say what can be known of a training run before its first step, in seconds",
    "generate": "have the teacher write completions and keep the good ones (sequence-level distillation)",
    "evaluate": "report the gap between a student and its teacher: quality, likeness, bias, speed and memory",
    "capture": "run the teacher once and store what it says",
    "inspect": "say what such a cache holds, whether it is whole, and how true it is",
    "push": "upload a student to the Hub, with a model card",
    "export": "write a student as GGUF (llama.cpp, Ollama) or ONNX, and verify it",
}
"""Each is a function of its name in the module of its name in `llm_distill.cli`, imported when it is asked for."""
READER_IS_GONE = 141
"""The exit status, as of a program that SIGPIPE ends."""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `llm-distill`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="llm-distill",
        description="Distil a large language model into a small one.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"llm-distill {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, help_text in COMMANDS.items():
        commands.add_parser(name, help=help_text, add_help=False)
    try:
        name = parser.parse_args(argv[:1]).command
        getattr(importlib.import_module(f"llm_distill.cli.{name}"), name)(argv[1:])
    finally:
        _flush()


def _flush() -> None:
    """Ends the program without a word where nobody reads its output any more, as behind `| head -1`."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
        sys.exit(READER_IS_GONE)
