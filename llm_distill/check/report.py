"""What a check has found: lines in green, amber and red, each with what to do."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

from llm_distill.tables import printable

LEVELS = ("skipped", "green", "amber", "red")
"""From nothing known to nothing works."""
COLOURS = {"skipped": 90, "green": 32, "amber": 33, "red": 31}
"""ANSI's."""


@dataclass(frozen=True)
class Finding:
    level: str
    """One of LEVELS."""
    what: str
    """What was looked at, in a word or two."""
    text: str
    todo: str = ""
    """The way out, where there is something to do."""


@dataclass(frozen=True)
class Report:
    """Findings, in the order in which they were made. `print(report)` shows a line for each."""

    findings: tuple[Finding, ...]

    @property
    def is_red(self) -> bool:
        return any(finding.level == "red" for finding in self.findings)

    def as_text(self, coloured: bool = False) -> str:
        width = max((len(finding.what) for finding in self.findings), default=0)
        lines = []
        for finding in self.findings:
            level = f"{finding.level:<7}"
            level = f"\033[{COLOURS[finding.level]}m{level}\033[0m" if coloured else level
            lines.append(f"{level}  {finding.what:<{width}}  {printable(finding.text)}")
            if finding.todo:
                lines.append(f"{'':<7}  {'':<{width}}  → {finding.todo}")
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        count = {level: sum(finding.level == level for finding in self.findings) for level in LEVELS}
        return ", ".join(f"{count[level]} {level}" for level in reversed(LEVELS) if count[level] or level == "red")

    def __str__(self) -> str:
        return self.as_text()

    def as_json(self) -> list[dict[str, Any]]:
        return [asdict(finding) for finding in self.findings]

    def print(self, stream: TextIO) -> None:
        """In colours on a terminal, unless NO_COLOR is set."""
        print(self.as_text(stream.isatty() and not os.environ.get("NO_COLOR")), file=stream)


def merged(ranks: Sequence[Report]) -> Report:
    """Of all ranks, the worst that was found of each thing."""
    worst: dict[str, Finding] = {}
    for finding in (finding for report in ranks for finding in report.findings):
        known = worst.setdefault(finding.what, finding)
        if LEVELS.index(finding.level) > LEVELS.index(known.level):
            worst[finding.what] = finding
    return Report(tuple(worst.values()))
