"""What a person can choose: every field of TRL's `SFTConfig`, and those of a distillation."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

import yaml
from transformers.trainer_utils import HubStrategy
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

SERVER_WORKERS = 2


@dataclass
class DistillationConfig(SFTConfig):
    """Configuration of `DistillationTrainer`; the training, data and model fields are those of `trl.SFTConfig`.

    loss = kd_weight · T² · D(teacher‖student at T) + ce_weight · cross-entropy, a mean over the tokens that count.

    Raises:
        ValueError: a value out of range, or an option that would have no effect beside the others.
    """

    divergence: str = field(
        default="forward_kl",
        metadata={
            "help": "How far the student is from the teacher: forward_kl (cover what the teacher finds likely), "
            "reverse_kl (avoid what it finds unlikely), jsd, skew_kl, skew_reverse_kl, tvd or alpha_beta."
        },
    )
    divergence_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Parameters of the divergence as JSON or YAML: beta of jsd (the teacher's share, default 0.5), lam "
            "of the skew divergences (default 0.1), alpha and beta of alpha_beta (defaults 0.2 and 0.7)."
        },
    )
    loss_temperature: float = field(
        default=1.0,
        metadata={"help": "T: divides both logits in the divergence. Above 1 the unlikely tokens weigh more."},
    )
    squared_temperature: bool = field(
        default=True,
        metadata={"help": "Multiply the divergence by T squared: its gradient keeps its size (Hinton)."},
    )
    kd_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the divergence. At 0 the teacher is consulted in evaluation only."},
    )
    ce_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the cross-entropy with the text (hard labels)."},
    )
    losses: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={
            "help": "More terms beside divergence and cross-entropy, as JSON or YAML: a list of {name, weight, …}. "
            "There is `hidden`: the mean squared error between hidden states, of the layers in layers: {4: 8} "
            "(student's: teacher's, counted from 1)."
        },
    )
    loss_buffer_mib: int | None = field(
        default=None,
        metadata={
            "help": "Memory for the logits of one chunk of rows, in MiB. By default 1024 on a GPU, 256 on a CPU, and "
            "128 rows at least. Less is slower, because the head is read more often."
        },
    )
    teacher_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "The teacher: a model id on the Hub or a folder. Its tokenizer must be the student's."},
    )
    teacher_model_revision: str | None = field(
        default=None,
        metadata={"help": "Branch, tag or commit of the teacher."},
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "More for AutoModelForCausalLM.from_pretrained when the teacher is loaded, as JSON or YAML. Its "
            "dtype is the checkpoint's own unless this says otherwise."
        },
    )
    teacher_load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Load the teacher in 4 bits (bitsandbytes, NF4)."},
    )
    teacher_load_in_8bit: bool = field(
        default=False,
        metadata={"help": "Load the teacher in 8 bits (bitsandbytes)."},
    )
    teacher_adapters_off: bool = field(
        default=False,
        metadata={
            "help": "The teacher is the student's own base model with its LoRA adapters off: keeps a fine-tuned "
            "student near what it was, at no extra memory. Use it with ce_weight."
        },
    )
    teacher_server_url: str | None = field(
        default=None,
        metadata={
            "help": "The teacher is behind vLLM's server: http://host:port, or several with commas between, which "
            "share the work. No weights are loaded; teacher_model_name_or_path is the name that it is served by. A "
            "key is read from OPENAI_API_KEY."
        },
    )
    teacher_server_k: int = field(
        default=20,
        metadata={
            "help": "Tokens of each row that the server tells, the mass of the others beside them. vLLM allows 20 "
            "unless it was started with --max-logprobs."
        },
    )
    teacher_server_timeout: float = field(
        default=600.0,
        metadata={"help": "Seconds for which a request is tried again, on any server, before the run ends."},
    )
    teacher_cache: str | None = field(
        default=None,
        metadata={
            "help": "Signals that `llm-distill capture` has stored: a folder, a dataset repository on the Hub, or "
            "hf://datasets/… to read them over the network. No teacher is loaded; one that is named must have made it."
        },
    )
    on_miss: str = field(
        default="error",
        metadata={
            "help": "For a text that is not in teacher_cache: error; skip, which leaves it out of the loss; or live, "
            "which loads the teacher, asks it and adds the answer to the cache."
        },
    )

    dataloader_num_workers: int = field(
        default=0,
        metadata={
            "help": "Processes that make batches. With teacher_server_url they fetch answers ahead, and 0 becomes 2."
        },
    )
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bfloat16 mixed precision. By default on where the accelerator has it, unless fp16 is set."},
    )

    hub_strategy: HubStrategy | str = field(
        default=HubStrategy.END,
        metadata={
            "help": "When push_to_hub pushes: at the end. Every other choice of transformers.TrainingArguments uploads "
            "training_args.bin too, a pickle with local paths and hub_token, and is refused."
        },
    )

    def __post_init__(self) -> None:
        self.chosen = fields_chosen(self)  # before the defaults of some depend on others
        if self.bf16 is None:
            self.bf16 = not self.fp16 and not self.use_cpu and is_torch_bf16_gpu_available()
        super().__post_init__()
        self.divergence_kwargs = _mapping("divergence_kwargs", self.divergence_kwargs)
        self.teacher_model_init_kwargs = _mapping("teacher_model_init_kwargs", self.teacher_model_init_kwargs)
        if isinstance(self.losses, str):
            self.losses = yaml.safe_load(self.losses)
        if isinstance(self.teacher_server_url, list):  # as YAML may give it
            self.teacher_server_url = ",".join(self.teacher_server_url)
        if self.teacher_server_url is not None and self.dataloader_num_workers == 0:
            self.dataloader_num_workers = SERVER_WORKERS
        if self.teacher_server_k < 1 or not 0 < self.teacher_server_timeout < math.inf:
            raise ValueError(
                f"teacher_server_k={self.teacher_server_k} and teacher_server_timeout={self.teacher_server_timeout}: "
                "both must be positive."
            )
        if not 0 < self.loss_temperature < math.inf:
            raise ValueError(f"loss_temperature must be positive and finite, got {self.loss_temperature}.")
        if self.loss_buffer_mib is not None and self.loss_buffer_mib < 1:
            raise ValueError(f"loss_buffer_mib must be at least 1, got {self.loss_buffer_mib}.")
        weights = (self.kd_weight, self.ce_weight)
        if not (all(0 <= weight < math.inf for weight in weights) and any(weights)):
            raise ValueError(
                f"kd_weight={self.kd_weight} and ce_weight={self.ce_weight}: both must be finite, neither may be "
                "negative, and one must be positive."
            )
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"hub_strategy={self.hub_strategy} uploads training_args.bin, a pickle with local paths and hub_token. "
                "Use hub_strategy=end; `llm-distill push FOLDER/checkpoint-500 user/name` uploads one without it."
            )
        if self.on_miss not in ("error", "skip", "live"):
            raise ValueError(f"on_miss must be error, skip or live, got {self.on_miss!r}.")
        is_served = self.teacher_server_url is not None
        without_effect = {
            "teacher_server_k (there is no teacher_server_url)": self.teacher_server_k != 20 and not is_served,
            "teacher_server_timeout (there is no teacher_server_url)": self.teacher_server_timeout != 600
            and not is_served,
            "teacher_adapters_off (teacher_server_url is the teacher)": self.teacher_adapters_off and is_served,
            "teacher_model_revision, teacher_model_init_kwargs, teacher_load_in_4bit or _8bit (teacher_server_url has "
            "loaded the teacher)": is_served
            and bool(
                self.teacher_model_revision
                or self.teacher_model_init_kwargs
                or self.teacher_load_in_4bit
                or self.teacher_load_in_8bit
            ),
            "squared_temperature=False (at loss_temperature=1 it is 1 anyway)": not self.squared_temperature
            and self.loss_temperature == 1,
            "loss_temperature (kd_weight is 0)": self.loss_temperature != 1 and self.kd_weight == 0,
            "divergence_kwargs (kd_weight is 0)": bool(self.divergence_kwargs) and self.kd_weight == 0,
            "teacher_adapters_off (kd_weight is 0)": self.teacher_adapters_off and self.kd_weight == 0,
            "teacher_cache (kd_weight is 0)": self.teacher_cache is not None and self.kd_weight == 0,
            "on_miss (there is no teacher_cache)": self.on_miss != "error" and self.teacher_cache is None,
            "teacher_adapters_off (teacher_cache has the answers)": self.teacher_adapters_off
            and self.teacher_cache is not None
            and self.on_miss != "live",
            "teacher_load_in_8bit (teacher_load_in_4bit is chosen)": self.teacher_load_in_4bit
            and self.teacher_load_in_8bit,
            "teacher_model_revision (teacher_model_init_kwargs has another)": self.teacher_model_revision is not None
            and "revision" in self.teacher_model_init_kwargs,
            "loss_type (divergence, kd_weight and ce_weight say what is minimised)": self.loss_type != "nll",
            "label_smoothing_factor (soft targets take its place)": self.label_smoothing_factor != 0,
        }
        if refused := [name for name, is_set in without_effect.items() if is_set]:
            raise ValueError(f"without effect here, so refused: {'; '.join(refused)}.")


@dataclass
class StartConfig:
    """How `llm-distill train` starts, beside the options of the run itself."""

    check: bool = field(
        default=True,
        metadata={
            "help": "Look at the run first, as `llm-distill check` does, for a few seconds, and do not start it where "
            "something is red."
        },
    )


@dataclass
class CheckConfig:
    """What `llm-distill check` leaves behind, beside the options of a training run."""

    json: str | None = field(
        default=None,
        metadata={"help": "Write what was found to this file too: a list of {level, what, said, todo}."},
    )


@dataclass
class CaptureConfig:
    """What `llm-distill capture` keeps of a teacher, beside the options of a training run."""

    cache_method: str | None = field(
        default=None,
        metadata={
            "help": "What is kept of each distribution: hybrid (likely tokens exactly, a fair draw of the others; "
            "forward_kl alone, without bias: the default there), top_k (its likeliest tokens and the mass of the "
            "others; serves every divergence, and is the default for the others and for a teacher_server_url), "
            "sampled (a fair draw of all; forward_kl), hidden (the last hidden state, for everything, exactly)."
        },
    )
    cache_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Parameters of the method as JSON or YAML: k (32), mass (1.0: keep no more than have this mass), "
            "threshold (0: keep no token of less probability) and step (1/128, of √p) of top_k, threshold (0.02) and "
            "step (1/32) of hybrid, draws (50) of sampled, dtype (bfloat16, int8, float32) of hidden."
        },
    )
    examples_per_shard: int = field(
        default=2048,
        metadata={"help": "Texts in a file. A kill costs at most the one in hand, on each rank."},
    )
    drop_stale: bool = field(
        default=False,
        metadata={"help": "Remove what teacher_cache holds if another teacher, tokenizer or method made it."},
    )
    cache_hub_id: str | None = field(
        default=None,
        metadata={"help": "Push the cache to this dataset repository when it is complete."},
    )
    cache_hub_private: bool = field(default=False, metadata={"help": "Make that repository private."})

    def __post_init__(self) -> None:
        self.cache_kwargs = _mapping("cache_kwargs", self.cache_kwargs)
        if self.examples_per_shard < 1:
            raise ValueError(f"examples_per_shard must be at least 1, got {self.examples_per_shard}.")
        if self.cache_hub_private and self.cache_hub_id is None:
            raise ValueError("without effect here, so refused: cache_hub_private (there is no cache_hub_id).")


def fields_chosen(config: Any) -> set[str]:
    """The names of a dataclass's fields that are not at their defaults."""
    names = set()
    for each in fields(config):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if each.init and getattr(config, each.name) != default:
            names.add(each.name)
    return names


def _mapping(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """A mapping from what a YAML file, a command line or Python gives."""
    parsed = yaml.safe_load(value) if isinstance(value, str) else value
    if not isinstance(parsed or {}, dict):
        raise ValueError(f"{name} must be a mapping such as '{{\"beta\": 0.5}}', got {value!r}.")
    return parsed or {}
