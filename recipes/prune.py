"""A student made from its teacher: every option of `llm-distill prune`.

    python recipes/prune.py --model HuggingFaceTB/SmolLM2-135M-Instruct --layers 20 --output_dir runs/cut

With no model named it keeps two layers of the demo's teacher (trained on the first call), measured on the embedded
corpus.
"""

from __future__ import annotations

import sys
from pathlib import Path

from demo import Recipe, prepare_corpus, trained_teacher, use_all_cores

from llm_distill.cli.prune import prune


def embedded_defaults(folder: Path = Path("runs")) -> list[str]:
    """Options for a student without downloads."""
    recipe = Recipe()
    trained_teacher(folder / "demo" / "teacher", recipe, prepare_corpus(recipe))
    return ["--model", str(folder / "demo" / "teacher"), "--layers", "2", "--output_dir", str(folder / "prune" / "cut")]


if __name__ == "__main__":
    use_all_cores()
    options = sys.argv[1:]
    named = {option.split("=")[0] for option in options} & {"--config", "--model", "--help", "-h"}
    prune(options if named else [*embedded_defaults(), *options])
