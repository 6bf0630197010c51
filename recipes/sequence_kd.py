"""Sequence-level distillation: the teacher writes, filters keep, the student learns from the text.

    accelerate launch recipes/sequence_kd.py --generate_config generate.yaml --train_config train.yaml

generate.yaml has the options of `llm-distill generate`, train.yaml those of `llm-distill train`; `dataset_name` of the
second is the `output_dir` of the first (and is taken from there if it is left out). `--stage` runs one of them alone.
The student learns from the text alone unless train.yaml names a teacher too (`kd_weight` above 0): then it hears its
distribution over that text as well.

With no configuration it runs on the embedded corpus: the demo's teacher (trained on the first call) goes on from the
beginnings of files, and a student with random weights learns from that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from accelerate import PartialState
from demo import Recipe, as_options, use_all_cores
from token_kl import embedded_defaults

from llm_distill.cli.generate import generate
from llm_distill.cli.train import train
from llm_distill.data.corpus import NAME

FOLDER = Path("runs", "sequence_kd")


def embedded(stage: str) -> list[str]:
    """Options for a small run of a stage without downloads."""
    folder, recipe = FOLDER / "generated", Recipe()
    defaults = embedded_defaults()  # makes teacher and student, too
    if stage == "train":
        sequence_level = {"dataset_name": folder, "output_dir": FOLDER / "student", "kd_weight": 0, "ce_weight": 1}
        return [*defaults, *as_options(sequence_level)]
    return as_options(
        {
            "teacher_model_name_or_path": defaults[defaults.index("--teacher_model_name_or_path") + 1],
            "dataset_name": NAME,
            "prompt_tokens": 16,
            "max_prompts": 100,
            "max_new_tokens": recipe.block - 16,
            "num_completions": 2,
            "batch_size": 64,
            "filters": "{repetition: {}, exact_duplicates: {}}",  # not `finished`: no block of its training ends
            "output_dir": folder,
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generate_config", type=Path, help="YAML with options of `llm-distill generate`")
    parser.add_argument("--train_config", type=Path, help="YAML with options of `llm-distill train`")
    parser.add_argument("--stage", choices=("all", "generate", "train"), default="all", help="default: %(default)s")
    arguments = parser.parse_args()
    configs = {"generate": arguments.generate_config, "train": arguments.train_config}
    stages = [stage for stage in configs if arguments.stage in ("all", stage)]
    named = [stage for stage in stages if configs[stage] is not None]
    if named and named != stages:
        parser.error(f"--generate_config and --train_config go together, or choose --stage {named[0]}")
    use_all_cores()
    for stage, command in (("generate", generate), ("train", train)):
        if stage in stages:
            config = configs[stage]
            command(["--config", str(config), *between(configs, stage)] if config else embedded(stage))
            PartialState().wait_for_everyone()


def between(configs: dict[str, Path | None], stage: str) -> list[str]:
    """What training takes from the other configuration."""
    first, second = ({} if path is None else yaml.safe_load(path.read_text()) for path in configs.values())
    if stage == "generate" or not first or "dataset_name" in second:
        return []
    return ["--dataset_name", str(first.get("output_dir", "generated"))]


if __name__ == "__main__":
    main()
