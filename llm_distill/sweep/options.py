"""What a person can choose of a sweep."""

from __future__ import annotations

from dataclasses import dataclass

from llm_distill.options import Options, option

OF_TEACHER = ("eval_kl", "eval_top1_agreement", "eval_acceptance")
MAXIMISED = ("eval_top1_agreement", "eval_acceptance", "eval_mean_token_accuracy")
METRICS = ("eval_kl", "eval_ce", "eval_loss", *MAXIMISED)


@dataclass
class SweepConfig(Options):
    """How `llm-distill sweep` searches, beside the options of the runs.

    Raises:
        ValueError: something is missing or out of range.
    """

    heading = "the sweep"

    search: str | None = option(
        None,
        "This YAML file says what may be tried: a list of choices, or {low, high, log, step}, for each option. Names "
        "within an option have a dot, as divergence_kwargs.beta and losses.hidden.",
    )
    trials: int = option(30, "So many settings are tried, by all processes together.", at_least=1)
    seeds_per_setting: int = option(
        1, "Each setting is trained with so many seeds, from seed on; the mean of their results counts.", at_least=1
    )
    metric: str = option(
        "eval_kl",
        "The best setting has the best of this on the held-out texts: eval_kl (KL to the teacher at temperature 1), "
        "eval_ce (loss with the text), eval_top1_agreement, eval_acceptance, eval_mean_token_accuracy; or eval_loss, "
        "where nothing is searched that changes what the loss means.",
        choices=METRICS,
    )
    stop_hopeless: bool = option(
        True,
        "A run ends early whose evaluation is worse than the median of the others at the same point: at the "
        "evaluations of eval_strategy, and between two seeds.",
    )
    storage: str | None = option(
        None,
        "The results are kept in this SQLite file, which processes on one machine may share: by default sweep.db in "
        "output_dir. A sweep that was killed goes on from it.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.search:
            raise ValueError("--search is missing: a YAML file with lines such as `loss_temperature: [1, 2, 4]`.")
