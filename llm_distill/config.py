"""What a person can choose of a training run: the options of its parts, and every field of TRL's `SFTConfig`."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from transformers.trainer_utils import HubStrategy, SaveStrategy
from transformers.utils import is_torch_bf16_gpu_available
from trl import SFTConfig

from llm_distill.generation.options import OnPolicyOptions
from llm_distill.leaks import without_secrets
from llm_distill.losses.options import ObjectiveOptions
from llm_distill.options import fields_chosen, option
from llm_distill.ranks import has_fast_bfloat16, is_on_cpu
from llm_distill.teachers.options import TeacherOptions

logger = logging.getLogger(__name__)

SERVER_WORKERS = 2
MODE_SEEKING = ("reverse_kl", "skew_reverse_kl", "jsd")
"""Divergences that are a mean over the text of the student as it is."""


@dataclass
class DistillationConfig(TeacherOptions, ObjectiveOptions, OnPolicyOptions, SFTConfig):
    """Configuration of `DistillationTrainer`; the training, data and model fields are those of `trl.SFTConfig`.

    loss = kd_weight · T² · D(teacher‖student at T) + ce_weight · cross-entropy, a mean over the tokens that count.

    Raises:
        ValueError: a value out of range, or an option that would have no effect beside the others.
    """

    heading = "the run"

    dataloader_num_workers: int = option(
        0,
        "This many processes make batches. With teacher_server_url, or a server among teachers, they fetch its answers "
        "ahead, and 0 becomes 2.",
    )
    bf16: bool | None = option(
        None,
        "Matrix products are computed in bfloat16, with weights in float32. By default this is on where the "
        "accelerator can, or on a CPU with AVX512-BF16 or AMX, unless fp16 is set.",
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "This is the older name of activation_checkpointing, which is off by default."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "This has no effect: a loss that is not finite ends the run."}
    )
    hub_strategy: HubStrategy | str = option(
        "end",
        "With push_to_hub, the student is pushed at the end. Every other choice of transformers.TrainingArguments "
        "uploads training_args.bin too, a pickle with local paths and hub_token, and is refused.",
    )

    def __post_init__(self) -> None:
        self.chosen = fields_chosen(self)  # before the defaults of some depend on others
        if "use_cpu" not in self.chosen:
            self.use_cpu = is_on_cpu()
        if self.bf16 is None:
            self.bf16 = not self.fp16 and (has_fast_bfloat16() if self.use_cpu else is_torch_bf16_gpu_available())
        if not self.chosen & {"activation_checkpointing", "gradient_checkpointing"}:
            self.activation_checkpointing = False
        SFTConfig.__post_init__(self)
        super().__post_init__()
        servers = [teacher for teacher in self.teachers or () if isinstance(teacher, dict) and teacher.get("server")]
        if (self.teacher_server_url is not None or servers) and self.dataloader_num_workers == 0:
            self.dataloader_num_workers = SERVER_WORKERS
        if self.max_steps == 0 or self.max_steps < -1 or (self.max_steps == -1 and not self.num_train_epochs > 0):
            raise ValueError(
                f"max_steps={self.max_steps} and num_train_epochs={self.num_train_epochs}: nothing would be learned, "
                "or for longer than it seems. max_steps must be positive, or -1 for a positive num_train_epochs."
            )
        if self.per_device_train_batch_size % self.num_generations:
            raise ValueError(
                f"num_generations={self.num_generations} must divide per_device_train_batch_size="
                f"{self.per_device_train_batch_size}: the texts after a prompt are rows of one micro-batch."
            )
        divergence = self.on_policy_divergence or self.divergence
        reuse = {
            f"steps_per_generation={self.steps_per_generation}": self.steps_per_generation > 1
            and f"most of what is learned from was written up to {self.steps_per_generation - 1} steps before",
            f"replay_share={self.replay_share:g}": self.replay_share > 0
            and "some of what is learned from was written in any step before",
        }
        for name, what in reuse.items():
            if what and divergence in MODE_SEEKING:
                logger.warning(
                    "%s: %s is a mean over the text of the student as it is, and %s (see completion_age in the log).",
                    name,
                    divergence,
                    what,
                )
        if self.push_to_hub and self.hub_strategy != HubStrategy.END:
            raise ValueError(
                f"hub_strategy={self.hub_strategy} uploads training_args.bin, a pickle with local paths and hub_token. "
                "Use hub_strategy=end; `llm-distill push FOLDER/checkpoint-500 user/name` uploads one without it."
            )

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`, which trackers log: without tokens in `model_init_kwargs` and the like."""
        return {name: without_secrets(value) for name, value in super().to_dict().items()}

    def conflicts(self) -> dict[str, Any]:
        return super().conflicts() | {
            "loss_type (divergence, kd_weight and ce_weight say what is minimised)": self.loss_type != "nll",
            "logging_nan_inf_filter (a loss that is not finite ends the run)": self.logging_nan_inf_filter,
            "label_smoothing_factor (soft targets take its place)": self.label_smoothing_factor != 0,
            "auto_find_batch_size (num_generations must divide the size)": self.auto_find_batch_size
            and self.num_generations > 1,
            "losses (with use_reentrant=True nothing is learned from layers)": self.losses
            and (self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs or {}).get("use_reentrant"),
            "teacher_codistilled (with save_strategy=no others never hear of this run)": self.teacher_codistilled
            is not None
            and self.save_strategy == SaveStrategy.NO,
            "packing (what the student writes is not packed)": self.packing and self.on_policy_share,
            "on_policy_share (without kd_weight, nothing is learned of what the student writes)": self.on_policy_share
            and not self.kd_weight
            and not self.losses,
            "kd_row_weights=correctness (what the student writes is no text to be right about)": self.on_policy_share
            and self.kd_row_weights == "correctness",
            "ce_weight (at on_policy_share=1 all text is the student's own, which it does not imitate)": self.ce_weight
            and self.on_policy_share == 1,
        }
