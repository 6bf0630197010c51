"""A student after each of several stages of training: what it learned in each, and what it forgot since."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import nn

from llm_distill.evaluation.compare import HeldOutTexts, compare
from llm_distill.evaluation.statistics import Interval, bootstrap, format_interval, interval
from llm_distill.tables import Table

WHAT_IS_FORGOTTEN = (
    "Forgotten is the loss now less the loss right after the stage that taught the domain, in nats a token. Backward "
    "transfer is the mean over the domains before the last, with its sign turned: below 0, later stages cost earlier "
    "domains (Lopez-Paz & Ranzato, 2017, arXiv:1706.08840, equation 3, with losses for accuracies)."
)


class Losses(NamedTuple):
    """Of one model on one dataset, for each text."""

    nats: NDArray[np.float64]
    """The sum of its cross-entropy, [texts]."""
    tokens: NDArray[np.float64]
    """How many count, [texts]."""

    def mean(self) -> Interval:
        """Nats a token."""
        return interval(self.nats, self.tokens)


def text_losses(model: nn.Module, texts: HeldOutTexts) -> Losses:
    """The losses of a causal LM on held-out texts, by text. Raises ValueError where no token counts."""
    (scores,) = compare({"student": model}, None, texts).values()
    return Losses(scores.per_text(scores.columns["ce"]), scores.per_text())


def increase(before: Losses, after: Losses) -> Interval:
    """How many nats a token more `after` is, both on the same drawn texts."""
    return bootstrap(
        np.stack([before.nats, after.nats, before.tokens]), lambda sums: sums[1] / sums[2] - sums[0] / sums[2]
    )


def require_stages(stages: int, domains: int) -> None:
    """Raises ValueError unless there is a student after each domain's stage, and at most one before the first."""
    if domains < 2 or stages - domains not in (0, 1):
        raise ValueError(
            f"{stages} students and {domains} domains: what is forgotten is told of domains in the order in which they "
            "were learned, two at least, and the students after each, perhaps with the one before the first. Give "
            "--data in that order, --previous for all students but the last, and --student for the last."
        )


def stage_figures(losses: Sequence[Mapping[str, Losses]]) -> dict[str, Any]:
    """The table that continual learning is judged by, as JSON.

    Args:
        losses: after each stage, of each domain, the domains in the order in which they were learned; one more stage
            than domains is the student before the first.

    Raises:
        ValueError: another number of stages.
    """
    require_stages(len(losses), len(losses[0]))
    names = list(losses[0])
    first = len(losses) - len(names)
    learned = {name: losses[first + place][name] for place, name in enumerate(names)}
    earlier = names[:-1]
    last = losses[-1]
    lost = [increase(learned[name], last[name]) for name in earlier]
    return {
        "first": first,
        "losses": {name: [stage[name].mean() for stage in losses] for name in names},
        "average": [_mean_over([stage[name] for name in names]) for stage in losses],
        "forgotten": dict(zip(earlier, lost, strict=True)),
        "backward_transfer": _mean_over(
            [Losses(learned[name].nats - last[name].nats, last[name].tokens) for name in earlier]
        ),
    }


def stage_parts(figures: Mapping[str, Any]) -> list[Table | str]:
    """For a report: the loss on each domain after each stage, and what was forgotten."""
    header = ["domain", *(stage_name(place, figures["first"]) for place in range(len(figures["average"]))), "forgotten"]
    rows = [
        [name, *map(format_interval, losses), format_interval(figures["forgotten"].get(name), "+.3f")]
        for name, losses in figures["losses"].items()
    ]
    rows.append(["average", *map(format_interval, figures["average"]), ""])
    transfer = format_interval(figures["backward_transfer"], "+.3f")
    return [Table(header, rows), f"Backward transfer: {transfer} nats a token.", WHAT_IS_FORGOTTEN]


def stage_name(place: int, first: int) -> str:
    """`before` or `after 2`."""
    return f"after {place - first + 1}" if place >= first else "before"


def _mean_over(domains: Sequence[Losses]) -> Interval:
    """The mean of several domains' losses, each of which counts alike; the texts of all are drawn from together."""
    starts = np.cumsum([0, *(len(domain.nats) for domain in domains)])
    columns = np.zeros((2 * len(domains), starts[-1]))
    for place, domain in enumerate(domains):
        columns[2 * place : 2 * place + 2, starts[place] : starts[place + 1]] = domain
    return bootstrap(columns, lambda sums: (sums[0::2] / sums[1::2]).mean(0))
