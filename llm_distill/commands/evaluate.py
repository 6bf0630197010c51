"""`llm-distill evaluate`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from llm_distill.commands.options import errors_in_one_line, load_split, parse_evaluate


def evaluate(argv: Sequence[str]) -> None:
    """Holds a student against its teacher: `llm-distill evaluate`, and `recipes/evaluate.py`."""
    from llm_distill.gap_report import make_gap_report
    from llm_distill.ranks import ranks

    with errors_in_one_line():
        config = parse_evaluate(argv)
        datasets = {name: load_split(source) for name, source in config.domains().items()}
        report = make_gap_report(config, datasets, shlex.join(["llm-distill", "evaluate", *argv]))
    ranks().print(f"\n{report.as_markdown()}\nThe report is in {Path(config.output_dir, 'report.html')}")
