"""What the student minimises: divergence and cross-entropy with their weights, and what is logged about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from llm_distill.config import DistillationConfig
from llm_distill.divergences import Divergence, make_divergence
from llm_distill.fused import fused_head_loss
from llm_distill.heads import LMHead
from llm_distill.signals import Signal

METRICS = ("kd", "ce", "kl", "entropy", "top1_agreement", "acceptance", "teacher_ce")
"""The values per row of `fused_head_loss`, in the order in which the trainer adds them up."""


@dataclass(frozen=True)
class Objective:
    """kd_weight · T² · D(teacher‖student at T) + ce_weight · cross-entropy, per row that counts."""

    divergence: Divergence
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    squared_temperature: bool = True

    @classmethod
    def of(cls, config: DistillationConfig) -> Objective:
        assert isinstance(config.divergence_kwargs, dict), "DistillationConfig has parsed it"
        return cls(
            divergence=make_divergence(config.divergence, **config.divergence_kwargs),
            temperature=config.loss_temperature,
            kd_weight=config.kd_weight,
            ce_weight=config.ce_weight,
            squared_temperature=config.squared_temperature,
        )

    def __call__(
        self,
        hidden: Float[Tensor, "rows hidden"],
        head: LMHead,
        targets: Int[Tensor, " rows"],
        signal: Signal | None,
        num_rows: Tensor | int | None,
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, " rows"]]]:
        """The loss over the rows that count, and its parts per row: see `fused_head_loss`."""
        return fused_head_loss(
            hidden,
            head,
            signal,
            self.divergence,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ce_weight=self.ce_weight,
            targets=targets,
            num_rows=num_rows,
            squared_temperature=self.squared_temperature,
        )


def sum_metrics(
    metrics: dict[str, Float[Tensor, " rows"]], sample: Int[Tensor, " rows"], samples: int
) -> Float[Tensor, "samples metrics+1"]:
    """Sums of METRICS over the rows of each sample, and the number of its rows in the last column."""
    sums = torch.zeros(samples, len(METRICS) + 1, dtype=torch.float64, device=sample.device)
    for column, name in enumerate(METRICS):
        if name in metrics:
            sums[:, column].index_add_(0, sample, metrics[name].double())
    sums[:, -1].index_add_(0, sample, torch.ones_like(sample, dtype=torch.float64))
    return sums
