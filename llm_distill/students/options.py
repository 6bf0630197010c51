"""What a person can choose of a student that is made from its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_distill.options import Options, is_chosen, option

METHODS = ("influence", "greedy", "even")
WIDTHS = ("intermediate_size", "hidden_size", "num_attention_heads", "num_experts")
"""What can be made narrower, in the order in which it is: neurons first, heads last (Minitron, arXiv:2407.14679)."""

GOALS = ("target", "params", "bytes", "latency")


@dataclass
class PruneConfig(Options):
    """Options of `llm-distill prune`.

    Raises:
        ValueError: something is missing, out of range or without effect beside the others.
    """

    heading = "the smaller model"

    model: str | None = option(None, "The student is made from this model: a Hub id or a folder.")
    output_dir: str | None = option(None, "The student goes to this folder, with its tokenizer and pruning.json.")
    layers: list[int] = option([], "One number: so many layers are kept. Several: these are, counted from 1.")
    method: str = option(
        "influence",
        "Layers are chosen by what they change in the hidden states (influence), by the loss without them, one after "
        "the other (greedy), or at equal steps (even).",
        choices=METHODS,
    )
    intermediate_size: int | None = option(None, "The feed-forward layers have this many neurons.", at_least=1)
    hidden_size: int | None = option(None, "Hidden states have this many channels.", at_least=1)
    num_attention_heads: int | None = option(
        None, "Attention has this many heads. Those that share a key stay or go together.", at_least=1
    )
    num_experts: int | None = option(None, "A mixture of experts has this many.", at_least=1)
    target: str | None = option(
        None,
        "The student has at most this share of the parameters, such as 0.5x. A few shapes are tried, and that with the "
        "lowest loss before training is kept.",
    )
    params: str | None = option(None, "The same, as a number of parameters, such as 80M.")
    bytes: str | None = option(None, "The same, as the size of the weights, such as 150MB.")
    latency: str | None = option(
        None,
        "The student takes at most this long for a token that it writes, such as 20ms, or 0.5x of what the model does. "
        "It is measured here, one text at a time.",
    )
    search: int | None = option(
        None,
        "So many shapes of the size to reach are tried, each taught a little, and that with the lowest loss on texts "
        "that were not taught is kept. Killed, it goes on.",
        at_least=2,
    )
    search_steps: int = option(20, "Each is taught for so many steps of 8 blocks.", needs="search", at_least=1)
    calibration: str = option(
        "stdlib",
        "Layers are measured on these texts: a Hub id, a folder, a file, or `stdlib`. SOURCE:SPLIT names the split.",
    )
    calibration_texts: int = option(32, "So many blocks of text are read.", at_least=1)
    calibration_length: int = option(256, "A block has this many tokens.", at_least=2)
    dtype: str = option("auto", "The student has auto (the model's own), float32, bfloat16 or float16 weights.")
    revision: str | None = option(None, "The model is of this branch, tag or commit.")
    trust_remote_code: bool = option(False, "Code that lies in the model's repository is run. Read it first.")

    def __post_init__(self) -> None:
        for name, what in (("model", "a Hub id or a folder"), ("output_dir", "the folder of the student")):
            if not getattr(self, name):
                raise ValueError(f"--{name} is missing: {what}.")
        if not (self.layers or self.sizes or self.goals):
            raise ValueError(
                "--layers is missing: how many layers are kept, such as `--layers 20`, or which; or a width, such as "
                "`--intermediate_size 1024`; or a size to reach, such as `--target 0.5x`."
            )
        super().__post_init__()

    @property
    def sizes(self) -> dict[str, int]:
        """The widths that were chosen."""
        return {name: size for name in WIDTHS if (size := getattr(self, name)) is not None}

    @property
    def goals(self) -> dict[str, str]:
        """The size to reach, of which there is one at most."""
        return {name: goal for name in GOALS if (goal := getattr(self, name)) is not None}

    def conflicts(self) -> dict[str, Any]:
        shape = [*(["layers"] if self.layers else []), *self.sizes]
        goals = list(self.goals)
        return {
            "method (layers says which)": len(self.layers) > 1 and is_chosen(self, "method"),
            "method (no layer goes)": not (self.layers or goals) and is_chosen(self, "method"),
            f"{', '.join(shape)} ({', '.join(goals)} chooses the shape)": shape and goals,
            "search (no size is to be reached: give --target 0.5x, or another)": self.search is not None and not goals,
            f"{', '.join(goals[1:])} ({goals[0] if goals else ''} says how large)": len(goals) > 1,
        }


@dataclass
class CompressConfig(Options):
    """What `llm-distill compress` does beside training."""

    heading = "step by step"

    target: str = option("0.5x", "The last student has at most this share of the model's parameters.")
    steps: int = option(3, "It is reached in this many steps, each of which leaves the same share.", at_least=1)
    max_loss_increase: float = option(
        0.1,
        "The held-out loss of a student may be higher than the model's by at most so many nats a token. A step that "
        "costs more is the last, and what was before it is the result.",
        positive=True,
    )
    method: str = option("influence", "Layers are chosen as `llm-distill prune` does.", choices=METHODS)
