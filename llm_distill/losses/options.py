"""What a person can choose of the objective."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llm_distill.options import Options, option, parse_mapping, parse_mappings, parse_text

KD_ROW_WEIGHTS = ("equal", "entropy", "correctness")
ALIGNMENTS = ("prefix", "xtoken", "alm", "uld")
"""How a teacher with another tokenizer is compared; see `losses.cross_tokenizer`."""
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-2, 1e3
"""Within these, float32 tells the logits of real models over T from each other, and from infinity."""


def parse_losses(name: str, value: Any) -> list[dict[str, Any]]:
    """A list of terms. Names with their weights are short for terms that have all else by default.

    Raises:
        ValueError: it is neither.
    """
    parsed = parse_text(name, value)
    if isinstance(parsed, dict):
        parsed = [{"name": term, "weight": weight} for term, weight in parsed.items()]
    return parse_mappings(name, parsed)


@dataclass
class ObjectiveOptions(Options):
    """How far the student is from what the teacher says, and from the text."""

    heading = "the objective"

    divergence: str = option(
        "forward_kl",
        "How far the student is from the teacher is measured by forward_kl (the student is to cover what the teacher "
        "finds likely), reverse_kl (it is to avoid what the teacher finds unlikely), jsd, skew_kl, skew_reverse_kl, "
        "tvd or alpha_beta.",
    )
    divergence_kwargs: dict[str, Any] | str | None = option(
        None,
        "These are the parameters of the divergence, as JSON or YAML: beta of jsd (the teacher's share, 0.5 by "
        "default), lam of the skew divergences (0.1), alpha and beta of alpha_beta (0.2 and 0.7).",
        needs="kd_weight",
        parse=parse_mapping,
    )
    on_policy_divergence: str | None = option(
        None,
        "On what the student wrote itself, this divergence is taken instead, such as skew_reverse_kl beside skew_kl "
        "(DistiLLM-2).",
        needs="on_policy_share",
    )
    on_policy_divergence_kwargs: dict[str, Any] | str | None = option(
        None,
        "These are the parameters of on_policy_divergence, as JSON or YAML.",
        needs="on_policy_divergence",
        parse=parse_mapping,
    )
    loss_temperature: float = option(
        1.0,
        "The temperature T divides the logits of both models in the divergence. Above 1, unlikely tokens weigh more.",
        needs="kd_weight",
        positive=True,
    )
    squared_temperature: bool = option(
        True,
        "The divergence is multiplied by T squared, so that its gradient keeps its size at every temperature (Hinton "
        "et al., 2015).",
    )
    kd_weight: float = option(
        1.0, "This is the weight of the divergence. At 0 the teacher is consulted in evaluation alone."
    )
    kd_row_weights: str = option(
        "equal",
        "The divergence weighs the same in every row (equal), less where the teacher is unsure (entropy), or where the "
        "teacher expects another text (correctness).",
        choices=KD_ROW_WEIGHTS,
        needs="kd_weight",
    )
    ce_weight: float = option(
        0.0,
        "This is the weight of the cross-entropy with the text itself (hard labels). What the student wrote itself is "
        "not imitated.",
    )
    teacher_alignment: str = option(
        "auto",
        "A teacher with another tokenizer reads the same text in its own tokens, and both are compared where tokens of "
        "both end at the same byte: by what begins with the same tokens (prefix, which auto takes where the tokenizers "
        "differ, and which takes any divergence), or as published (xtoken, alm, uld), which goes with a ce_weight such "
        "as 0.1. With none, such a teacher is refused.",
        choices=("auto", "none", *ALIGNMENTS),
    )
    losses: list[dict[str, Any]] | str | None = option(
        None,
        "More terms stand beside these, as JSON or YAML: a list of {name, weight, layers}, or in short `{hidden: 0.1, "
        "relations: 1}`. There are hidden (hidden states), attention (where the models look), relations (MiniLM), "
        "selectivity (neurons) and rkd (distances and angles).",
        parse=parse_losses,
    )
    loss_buffer_mib: int | None = option(
        None,
        "The logits of one chunk of rows take this much memory, in MiB: by default 1024 on a GPU and 256 on a CPU. "
        "Less is slower, because the head is read more often.",
        at_least=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not MIN_TEMPERATURE <= self.loss_temperature <= MAX_TEMPERATURE:
            raise ValueError(
                f"loss_temperature={self.loss_temperature} must be between {MIN_TEMPERATURE:g} and "
                f"{MAX_TEMPERATURE:g}: beyond, logits over T are all rounding error."
            )
        weights = (self.kd_weight, self.ce_weight)
        if not (all(0 <= weight < math.inf for weight in weights) and (any(weights) or self.losses)):
            raise ValueError(
                f"kd_weight={self.kd_weight} and ce_weight={self.ce_weight}: both must be finite, neither may be "
                "negative, and one must be positive."
            )

    def conflicts(self) -> dict[str, Any]:
        return super().conflicts() | {
            "squared_temperature=False (at loss_temperature=1 it is 1 anyway)": not self.squared_temperature
            and self.loss_temperature == 1,
        }
