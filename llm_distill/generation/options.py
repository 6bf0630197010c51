"""What a person can choose of text that the student writes while it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_distill.options import Options, is_chosen, option

SERVER_ONLY = (
    "vllm_server_base_url",
    "vllm_server_host",
    "vllm_server_port",
    "vllm_server_timeout",
    "vllm_group_port",
)
COLOCATED_ONLY = ("vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size")


@dataclass
class VLLMOptions(Options):
    """vLLM as the student's writer. Names and meaning are those of TRL's trainers."""

    heading = "vLLM for the student"

    use_vllm: bool = option(
        False,
        "vLLM writes the student's texts, in place of transformers' generate. It is given the student's weights "
        "whenever they have changed.",
        needs="on_policy_share",
    )
    vllm_mode: str = option(
        "colocate",
        "vLLM runs on the devices that train (colocate), or is a server on others (server), started with "
        '`VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --weight-transfer-config \'{"backend": "nccl"}\'`.',
        needs="use_vllm",
        choices=("colocate", "server"),
    )
    vllm_server_base_url: str | None = option(
        None, "vLLM's server has this address, such as http://10.0.0.1:8000.", needs="use_vllm"
    )
    vllm_server_host: str = option("0.0.0.0", "vLLM's server is on this host.", needs="use_vllm")
    vllm_server_port: int = option(8000, "vLLM's server listens on this port.", needs="use_vllm", at_least=1)
    vllm_server_timeout: float = option(
        240.0, "vLLM's server is waited for, for this many seconds.", needs="use_vllm", positive=True
    )
    vllm_group_port: int = option(
        51216, "The student's weights travel to vLLM's server through this port.", needs="use_vllm", at_least=1
    )
    vllm_gpu_memory_utilization: float = option(
        0.3, "vLLM takes this share of each device's memory, all the time.", needs="use_vllm", positive=True
    )
    vllm_max_model_length: int | None = option(
        None,
        "vLLM holds texts of this many tokens, prompt and completion. By default that is the student's context, which "
        "may need more memory than it has.",
        needs="use_vllm",
        at_least=1,
    )
    vllm_tensor_parallel_size: int = option(
        1, "This many ranks hold one vLLM together, and write together.", needs="use_vllm", at_least=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vllm_gpu_memory_utilization > 1:
            raise ValueError(
                f"vllm_gpu_memory_utilization is a share, from 0 to 1, got {self.vllm_gpu_memory_utilization}."
            )

    def conflicts(self) -> dict[str, Any]:
        other = COLOCATED_ONLY if self.vllm_mode == "server" else SERVER_ONLY
        where = {f"{name} (vllm_mode is {self.vllm_mode})": self.use_vllm and is_chosen(self, name) for name in other}
        address = "vllm_server_host and vllm_server_port (vllm_server_base_url is the whole address)"
        twice = is_chosen(self, "vllm_server_host") or is_chosen(self, "vllm_server_port")
        return super().conflicts() | where | {address: self.vllm_server_base_url is not None and twice}


@dataclass
class OnPolicyOptions(VLLMOptions):
    """How much of the text that is learned from the student writes itself, and how it is sampled."""

    heading = "the student's own text"

    on_policy_share: float = option(
        0.0,
        "The student writes this share of the texts itself, after the dataset's prompts, as it is in that step "
        "(on-policy distillation; λ of GKD). 0 is the dataset's own text, and 1 needs prompts alone.",
        at_least=0,
    )
    max_completion_length: int = option(
        256, "The student writes at most this many tokens after a prompt.", needs="on_policy_share", at_least=1
    )
    sampling_temperature: float = option(
        1.0,
        "Where the student writes, its logits are divided by this temperature, which is another than that of the loss. "
        "0 takes the likeliest token each time.",
        needs="on_policy_share",
    )
    top_p: float = option(
        1.0,
        "Where the student writes, only the likeliest tokens are sampled that have this probability together.",
        needs="on_policy_share",
    )
    top_k: int = option(
        0,
        "Where the student writes, only this many of the likeliest tokens are sampled. 0 samples from all.",
        needs="on_policy_share",
    )
    repetition_penalty: float = option(
        1.0,
        "Where the student writes, the logits of tokens that are already there are divided by this number, or "
        "multiplied where they are negative. 1 is no penalty.",
        needs="on_policy_share",
        positive=True,
    )
    num_generations: int = option(
        1,
        "The student writes this many texts after each prompt, all in one micro-batch, which so has as many times "
        "fewer prompts.",
        needs="on_policy_share",
        at_least=1,
    )
    steps_per_generation: int = option(
        1,
        "The student writes the texts of this many optimizer steps at once. That is faster, and those of the later "
        "steps are by a student that has since learned.",
        needs="on_policy_share",
        at_least=1,
    )
    replay_share: float = option(
        0.0,
        "This share of the student's own texts are not new, but drawn from those that it wrote and learned from in "
        "earlier steps; what student and teacher say of them is of the moment. That saves writing.",
        needs="on_policy_share",
        at_least=0,
    )
    replay_size: int = option(
        1024,
        "So many texts are kept for replay on each rank: of all that were learned from, each with the same chance.",
        needs="replay_share",
        at_least=1,
    )
    early_token_decay: float = option(
        0.0,
        "Of the student's own texts, early tokens weigh more in the loss: one after i others exp(-i / D) with D this "
        "many tokens. The loss is divided by the sum of the weights. 0 gives all the same weight.",
        needs="on_policy_share",
        at_least=0,
    )
    speculative_top_k: int = option(
        0,
        "The teacher reads along while the student writes, and replaces each token that is not among its own likeliest "
        "K by one of these (speculative knowledge distillation; 25 in the paper). 0 leaves the text to the student.",
        needs="on_policy_share",
        at_least=0,
    )
    speculative_tokens: int = option(
        8, "The student writes this many tokens before the teacher reads them.", needs="speculative_top_k", at_least=1
    )
    log_completions: bool = option(
        False,
        "With each log, texts of that step are shown as a table, on the console or in Jupyter, with what the teacher "
        "says of them, and sent to wandb and trackio if these are in report_to.",
        needs="on_policy_share",
    )
    num_completions_to_print: int | None = option(
        None, "So many of them are shown. By default all are.", needs="log_completions", at_least=1
    )
    mask_truncated_completions: bool = option(
        False, "What the student did not end within max_completion_length is not learned from.", needs="on_policy_share"
    )

    def conflicts(self) -> dict[str, Any]:
        return super().conflicts() | {
            "speculative_top_k (vLLM writes alone, without the teacher)": self.use_vllm and self.speculative_top_k
        }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.on_policy_share > 1:
            raise ValueError(f"on_policy_share is a share, from 0 to 1, got {self.on_policy_share}.")
        if self.replay_share >= 1:
            raise ValueError(f"replay_share={self.replay_share} leaves nothing to write: give a share below 1.")
        if self.num_generations > 1 and self.sampling_temperature == 0:
            raise ValueError(
                f"num_generations={self.num_generations} at sampling_temperature=0 would be the same text each time: "
                "sample, or write one."
            )
