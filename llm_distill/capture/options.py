"""What a person can choose of a teacher cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_distill.options import Options, option, parse_mapping


@dataclass
class CaptureConfig(Options):
    """What `llm-distill capture` stores of a teacher, beside the options of a training run."""

    heading = "what is stored"

    cache_method: str | None = option(
        None,
        "Of each distribution, hybrid stores the likely tokens exactly and a fair draw of the others (without bias; "
        "for forward_kl alone, where it is the default), top_k the likeliest tokens and the mass of the others (for "
        "every divergence; the default for the others and for a teacher_server_url), sampled a fair draw of all "
        "(forward_kl alone), and hidden the last hidden state (for everything, exactly).",
    )
    cache_kwargs: dict[str, Any] | str | None = option(
        None,
        "These are the parameters of the method, as JSON or YAML: k (32, or teacher_server_k), mass (1.0: no more "
        "tokens than have this mass), threshold (0: no token of less probability) and step (1/128, of the root of a "
        "probability) of top_k, threshold (0.02) and step (1/32) of hybrid, draws (50) of sampled, dtype (bfloat16, "
        "int8 or float32) of hidden.",
        parse=parse_mapping,
    )
    examples_per_shard: int = option(
        2048,
        "One file holds this many texts. A run that is killed loses at most the file in hand, on each rank.",
        at_least=1,
    )
    drop_stale: bool = option(
        False, "What teacher_cache holds is removed if another teacher, tokenizer or method made it."
    )
    cache_hub_id: str | None = option(
        None, "The cache is pushed to this dataset repository on the Hub when it is complete."
    )
    cache_hub_private: bool = option(False, "That repository is private.", needs="cache_hub_id")
