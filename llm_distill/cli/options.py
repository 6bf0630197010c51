"""What a person can choose of a command itself, beside the options of the run."""

from __future__ import annotations

from dataclasses import dataclass

from llm_distill.options import Options, option


@dataclass
class StartConfig(Options):
    """How `llm-distill train` starts."""

    heading = "the run"

    check: bool = option(
        True,
        "The run is looked at first, for a few seconds, as `llm-distill check` does, and does not start where "
        "something is red.",
    )


@dataclass
class CheckConfig(Options):
    """What `llm-distill check` leaves behind."""

    heading = "this check"

    json: str | None = option(
        None, "What was found is written to this file too, as a list of {level, what, said, todo}."
    )
