"""What `--help` shows: our options and the most used ones of TRL and transformers, under headings."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from trl import TrlParser

from llm_distill.cli.parsing import TRACEBACK, TRACEBACK_HELP, CommandParser
from llm_distill.options import headings_of

SECTIONS: dict[str, dict[str, str]] = {
    "this check": {},
    "the smaller model": {},
    "step by step": {},
    "the sweep": {},
    "what is stored": {},
    "what is written": {},
    "the report": {},
    "the teacher": {},
    "the objective": {},
    "the student's own text": {},
    "vLLM for the student": {},
    "the student": {
        "model_name_or_path": "The student is this model: a model id on the Hub, or a folder.",
        "model_revision": "The student is of this branch, tag or commit.",
        "dtype": "The student's weights are loaded in this type.",
        "trust_remote_code": "Code that lies in the repositories of student and teacher is run. Read it first.",
        "attn_implementation": "Attention is computed by this implementation, such as sdpa or flash_attention_2.",
        "load_in_4bit": "The student is loaded in 4 bits. It needs use_peft, which trains adapters on it.",
        "use_peft": "Only LoRA adapters are trained, and the student's own weights stay as they are.",
        "lora_r": "This is the rank of the adapters.",
        "lora_alpha": "What the adapters add is multiplied by lora_alpha / lora_r.",
        "lora_target_modules": "Modules of these names get adapters. `all-linear` are all linear layers but the head.",
    },
    "the data": {
        "dataset_name": "The data is this dataset: a Hub id, a folder, a file (.json, .jsonl, .csv, .parquet, .txt), "
        "or `stdlib`, the sources of the Python standard library, which need no download.",
        "dataset_config": "Of a dataset on the Hub, this configuration is taken.",
        "dataset_train_split": "The texts are in this split, or in a part of one, such as train[:1000].",
        "dataset_test_split": "The student is evaluated on this split, if there is one.",
        "dataset_streaming": "The dataset is read while it is used, and never as a whole.",
        "max_length": "A text is cut after this many tokens. When packing, it is the length of a pack.",
        "packing": "Several texts fill one sequence, which never see each other, so that none is padding.",
        "completion_only_loss": "Of prompt and completion, only the completion is learned (the default).",
        "assistant_only_loss": "Of chats, only the assistant's turns are learned. The chat template must mark them.",
    },
    "the run": {
        "output_dir": "The student, its checkpoints and its card go to this folder.",
        "learning_rate": "The learning rate begins at this value.",
        "num_train_epochs": "Training goes through the data this many times.",
        "max_steps": "Training ends after this many steps, whatever num_train_epochs says. -1 leaves it to "
        "num_train_epochs.",
        "per_device_train_batch_size": "Each device takes this many sequences at a time.",
        "gradient_accumulation_steps": "One step adds up this many batches on each device.",
        "activation_checkpointing": "Activations are computed again in the backward pass instead of kept, which takes "
        "less memory and about a fifth more time. `llm-distill check` says where it is needed.",
        "logging_steps": "The metrics are logged every so many steps.",
        "eval_strategy": "The student is evaluated never (no), every eval_steps (steps) or every epoch (epoch), and at "
        "the end of training.",
        "save_strategy": "A checkpoint is saved never (no), every save_steps (steps) or every epoch (epoch).",
        "resume_from_checkpoint": "Training goes on from the last checkpoint in output_dir (true), or from this one.",
        "push_to_hub": "The student is pushed to the Hub at the end.",
        "hub_model_id": "The student is pushed to this repository, such as user/name.",
        "report_to": "The metrics are reported to these services, such as wandb or tensorboard, or to none.",
        "seed": "Training begins from this random seed.",
    },
}
"""What stands above options, in this order, and in our words those of TRL and transformers that most runs choose."""

EVERYTHING_ELSE = "everything else, in the words of TRL and transformers"
VALUES = {"int": "N", "float": "X", "str": "TEXT", "string_to_bool": "true|false"}
"""How a value of a type is shown."""


class OptionParser(CommandParser, TrlParser):
    """TRL's parser for groups of options, with help that fits a reader and errors for `errors_in_one_line`.

    Args:
        groups: dataclasses, `Options` and others.
        show_all: show the options that are under no heading too.
    """

    def __init__(self, command: str, description: str, example: str, groups: Sequence[Any], show_all: bool) -> None:
        self.names: set[str] = set()
        """Every name that a flag or a key of a YAML may have."""
        self._show_all = show_all
        self._texts = {name: text for texts in SECTIONS.values() for name, text in texts.items()}
        self._heading_of = {name: heading for heading, texts in SECTIONS.items() for name in texts}
        for group in groups:
            headings = headings_of(group)
            self._texts = {name: text for name, text in self._texts.items() if name not in headings}
            self._heading_of |= headings
        super().__init__(
            dataclass_types=groups,
            usage=f"llm-distill {command} [--config FILE] [--OPTION VALUE ...]",
            command=command,
            description=description,
            example=example,
        )

    @cached_property
    def _sections(self) -> dict[str, Any]:
        first = self.add_argument_group("options")
        first.add_argument("-h", "--help", action="help", help="This shows the options that most runs need.")
        first.add_argument("--help-all", action="help", help="This shows every option, those of transformers too.")
        first.add_argument("--config", metavar="FILE", help="This YAML file has any of the options. Flags win over it.")
        first.add_argument(TRACEBACK, action="store_true", help=TRACEBACK_HELP)
        return {heading: self.add_argument_group(heading) for heading in (*SECTIONS, EVERYTHING_ELSE)}

    def add_argument(self, *flags: str, **kwargs: Any) -> argparse.Action:
        """As in argparse, under the option's heading."""
        self.names |= {flag.lstrip("-").replace("-", "_") for flag in flags}
        name = kwargs.get("dest", flags[0].lstrip("-"))
        heading = self._heading_of.get(name, EVERYTHING_ELSE)
        default = kwargs.get("default")
        kwargs["help"] = self._texts.get(name, kwargs["help"])
        if "type" in kwargs and "choices" not in kwargs:
            kwargs["metavar"] = VALUES.get(kwargs["type"].__name__, "VALUE")
        if default is not None and default is not False and default != []:
            kwargs["help"] += f" (default: {str(default).lower() if default is True else '%(default)s'})"
        if kwargs.get("action") == "store_false" or (heading == EVERYTHING_ELSE and not self._show_all):
            kwargs["help"] = argparse.SUPPRESS
        action = self._sections[heading].add_argument(*flags, **kwargs)
        action.option_strings = action.option_strings[:1]  # --learning-rate works, and is not shown
        return action
