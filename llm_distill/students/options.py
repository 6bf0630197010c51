"""What a person can choose of a student that is made from its teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_distill.options import Options, is_chosen, option

METHODS = ("influence", "greedy", "even")


@dataclass
class PruneConfig(Options):
    """Options of `llm-distill prune`.

    Raises:
        ValueError: something is missing, out of range or without effect beside the others.
    """

    heading = "the smaller model"

    model: str | None = option(None, "The student is made from this model: a Hub id or a folder.")
    output_dir: str | None = option(None, "The student goes to this folder, with its tokenizer and pruning.json.")
    layers: list[int] = option(
        [], "One number: so many layers are kept. Several: these are, counted from 1.", at_least=1
    )
    method: str = option(
        "influence",
        "Layers are chosen by what they change in the hidden states (influence), by the loss without them, one after "
        "the other (greedy), or at equal steps (even).",
        choices=METHODS,
    )
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
        if not self.layers:
            raise ValueError("--layers is missing: how many layers are kept, such as `--layers 20`, or which.")
        super().__post_init__()

    def conflicts(self) -> dict[str, Any]:
        return {"method (layers says which)": len(self.layers) > 1 and is_chosen(self, "method")}
