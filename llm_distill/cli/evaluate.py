"""`llm-distill evaluate`."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from llm_distill.cli.parsing import errors_in_one_line, parse
from llm_distill.data.load import load_split


@errors_in_one_line
def evaluate(argv: Sequence[str]) -> None:
    """Holds a student against its teacher: `llm-distill evaluate`, and `recipes/gap_report.py`."""
    (config,) = parse("evaluate", argv)
    from llm_distill.evaluation.run import make_gap_report
    from llm_distill.leaks import public_command
    from llm_distill.ranks import ranks

    datasets = {name: load_split(source) for name, source in config.domains().items()}
    report = make_gap_report(config, datasets, shlex.join(public_command(["llm-distill", "evaluate", *argv])))
    ranks().print(f"\n{report.as_markdown()}\nThe report is in {Path(config.output_dir, 'report.html')}")
