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
    earlier_texts: str | None = option(
        None,
        "Texts of earlier runs are kept in this folder, a uniform sample: some are learned from again, and afterwards "
        "this run's are added. So less is forgotten where a student goes on to other data.",
    )
    earlier_share: float = option(0.2, "This share of the rows are earlier ones.", needs="earlier_texts", positive=True)
    earlier_max_bytes: int = option(
        2**28, "The sample takes at most so many bytes of disk.", needs="earlier_texts", at_least=2**16
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.earlier_share >= 1:
            raise ValueError(f"earlier_share={self.earlier_share} must be below 1: a run has texts of its own.")


@dataclass
class CheckConfig(Options):
    """What `llm-distill check` leaves behind."""

    heading = "this check"

    json: str | None = option(
        None, "What was found is written to this file too, as a list of {level, what, said, todo}."
    )
