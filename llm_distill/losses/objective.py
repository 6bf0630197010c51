"""What the student minimises: divergence and cross-entropy with their weights."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from llm_distill.divergences import Divergence, make_divergence
from llm_distill.heads import LMHead
from llm_distill.losses.fused import fused_head_loss
from llm_distill.losses.options import ObjectiveOptions
from llm_distill.signals import Signal


@dataclass(frozen=True)
class Objective:
    """kd_weight · T² · D(teacher‖student at T) + ce_weight · cross-entropy, per row that counts."""

    divergence: Divergence
    temperature: float = 1.0
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    squared_temperature: bool = True
    buffer_mib: int | None = None
    """Memory for logits, which changes how fast it goes and not what comes out."""

    @classmethod
    def of(cls, config: ObjectiveOptions) -> Objective:
        assert isinstance(config.divergence_kwargs, dict), "it is parsed"
        return cls(
            divergence=make_divergence(config.divergence, **config.divergence_kwargs),
            temperature=config.loss_temperature,
            kd_weight=config.kd_weight,
            ce_weight=config.ce_weight,
            squared_temperature=config.squared_temperature,
            buffer_mib=config.loss_buffer_mib,
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
            buffer_mib=self.buffer_mib,
        )
