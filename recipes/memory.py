"""What the recipes for real pairs take of a GPU's memory, as a table in the README of each.

    python recipes/memory.py                                  # the configurations come from the Hub
    python recipes/memory.py --configs tests/support/configs  # from a folder: NAME.json for OWNER/NAME

From configurations alone: no weights are loaded and no GPU is needed.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llm_distill.check.memory import estimate_memory
from llm_distill.cli.parsing import parse

RECIPES = Path(__file__).parent
RUNS = (("`live.yaml`", "live", 1), ("`live.yaml`, FSDP 2", "live", 8), ("`cached.yaml`, `sequence.yaml`", "cached", 1))
"""What is said, of which YAML, on how many GPUs. More than one where they share out the models; else each has all."""
BLOCK = re.compile(r"(?<=<!-- python recipes/memory.py -->\n).*?(?=<!-- end -->)", flags=re.DOTALL)
ConfigOf = Callable[[str], PreTrainedConfig]


def table(pair: Path, config_of: ConfigOf) -> str:
    """Parameters of both models and GiB on each GPU, as Markdown."""
    lines = [
        "| | GPUs | student | its optimizer and gradients | its activations | teacher | loss | peak, GiB on each |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
        *(f"| {' | '.join(row)} |" for row in _rows(pair, config_of)),
    ]
    _, args, model, _ = parse("train", ["--config", str(pair / "live.yaml")])
    assert model.model_name_or_path is not None
    assert args.teacher_model_name_or_path is not None
    counts = (_parameters(config_of(name)) for name in (model.model_name_or_path, args.teacher_model_name_or_path))
    return "Student {:,} parameters, teacher {:,}.\n\n".format(*counts) + "\n".join(lines) + "\n"


def _rows(pair: Path, config_of: ConfigOf) -> Iterator[list[str]]:
    is_sharded = "fsdp2.yaml" in (pair / "README.md").read_text()
    for said, kind, gpus in RUNS:
        if gpus > 1 and not is_sharded:
            continue
        _, args, model, _ = parse("train", ["--config", str(pair / f"{kind}.yaml")])
        assert model.model_name_or_path is not None
        teacher = args.teacher_model_name_or_path if kind == "live" else None
        known = estimate_memory(
            config_of(model.model_name_or_path),
            None if teacher is None else config_of(teacher),
            args,
            dtype=model.dtype,
            teacher_bits=4 if args.teacher_load_in_4bit else None,
            ranks=gpus,
            sharded=gpus > 1,
        )
        sizes = (
            known.weights,
            known.optimizer + known.gradients,
            known.activations,
            known.teacher_weights + known.teacher_activations,
            known.loss_buffers,
            known.total,
        )
        yield [said, str(gpus), *(f"{size / 2**30:.1f}" for size in sizes)]


def _parameters(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def from_folder(folder: Path, name: str) -> PreTrainedConfig:
    values = json.loads((folder / f"{name.split('/')[-1]}.json").read_text())
    return CONFIG_MAPPING[values["model_type"]].from_dict(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", type=Path, help="a folder with the configurations; by default the Hub's")
    folder = parser.parse_args().configs
    config_of = AutoConfig.from_pretrained if folder is None else lambda name: from_folder(folder, name)
    for path in sorted(RECIPES.glob("*-from-*/README.md")):
        written = table(path.parent, config_of)
        path.write_text(BLOCK.sub(lambda _, new=written: new, path.read_text()))
        print(f"{path.parent.name}\n\n{written}")


if __name__ == "__main__":
    main()
