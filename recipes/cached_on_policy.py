"""Cached on-policy distillation: the student writes once, the teacher answers once, training reads what it said
(Lightning OPD, arXiv:2604.13010).

    accelerate launch recipes/cached_on_policy.py --generate_config generate.yaml --train_config train.yaml

generate.yaml has the options of `llm-distill generate`, with the student as the model that writes
(`teacher_model_name_or_path`); train.yaml those of `llm-distill train`, with `teacher_cache`, where `capture` puts what
the teacher says. `dataset_name` of the second is the `output_dir` of the first.

It costs one run of the teacher and no generation while training. What it learns from is text of the student that it
was, so it is for some hundred steps, not for thousands: then have the student write again.

With no configuration it runs on the embedded corpus, after the same start as `on_policy.py`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import yaml
from accelerate import PartialState
from demo import as_options, use_all_cores
from on_policy import FOLDER, LEARNING, START, start_off_policy

from llm_distill.cli.capture import capture
from llm_distill.cli.generate import generate
from llm_distill.cli.train import train

CACHED = FOLDER.with_name("cached_on_policy")


def embedded() -> tuple[list[str], list[str]]:
    """Options of the two parts."""
    texts = CACHED / "texts"
    writing = {
        "teacher_model_name_or_path": START,
        "dataset_name": start_off_policy(),
        "max_prompts": 200,
        "max_new_tokens": 48,
        "batch_size": 64,
        "filters": "{}",  # what the student writes badly is what it has to learn from
        "output_dir": texts,
    }
    learning = {"dataset_name": texts, "output_dir": CACHED / "student", "teacher_cache": CACHED / "cache"}
    return as_options(writing), as_options(LEARNING | learning)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generate_config", type=Path, help="YAML with options of `llm-distill generate`")
    parser.add_argument("--train_config", type=Path, help="YAML with options of `llm-distill train`")
    arguments = parser.parse_args()
    configs = (arguments.generate_config, arguments.train_config)
    if (configs[0] is None) != (configs[1] is None):
        parser.error("--generate_config and --train_config go together")
    use_all_cores()
    if configs[0] is None:
        writing, learning = embedded()
    else:
        texts = yaml.safe_load(configs[0].read_text()).get("output_dir", "generated")
        writing, learning = ["--config", str(configs[0])], ["--config", str(configs[1]), "--dataset_name", str(texts)]
    for command, options in ((generate, writing), (capture, learning), (train, learning)):
        command(options)
        PartialState().wait_for_everyone()


if __name__ == "__main__":
    main()
