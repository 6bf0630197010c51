"""What a person can choose for `llm-distill generate`. The teacher's options are those of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from llm_distill.config import DistillationConfig, _mapping
from llm_distill.generation.engines.base import Sampling
from llm_distill.generation.engines.endpoint import Prices
from llm_distill.generation.filters import DEFAULTS, FILTERS, Filter, make_filters
from llm_distill.servers import KEY_VARIABLE

ENGINES = ("transformers", "vllm", "endpoint")
TRAINING = {each.name: each.metadata for each in fields(DistillationConfig)}
"""The same options say the same there and here."""


@dataclass
class GenerateConfig:
    """Who writes, how, and what is kept of it.

    Raises:
        ValueError: a value out of range, or an option that would have no effect beside the others.
    """

    output_dir: str = field(
        default="generated",
        metadata={"help": "Folder for texts, report and journal. The same command goes on where it was killed."},
    )
    teacher_model_name_or_path: str | None = field(default=None, metadata=TRAINING["teacher_model_name_or_path"])
    teacher_model_revision: str | None = field(default=None, metadata=TRAINING["teacher_model_revision"])
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=TRAINING["teacher_model_init_kwargs"]
    )
    teacher_load_in_4bit: bool = field(default=False, metadata=TRAINING["teacher_load_in_4bit"])
    teacher_load_in_8bit: bool = field(default=False, metadata=TRAINING["teacher_load_in_8bit"])
    engine: str | None = field(
        default=None,
        metadata={
            "help": "Who runs the teacher: transformers (on every rank), vllm (if installed), or endpoint, an "
            "OpenAI-compatible server. By default endpoint where there is an endpoint_url, else transformers."
        },
    )
    endpoint_url: str | None = field(
        default=None,
        metadata={"help": f"Such as https://host/v1. Its key is read from {KEY_VARIABLE} in the environment alone."},
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "Column with the prompts. By default prompt, messages, question, instruction or text."},
    )
    prompt_tokens: int | None = field(
        default=None,
        metadata={"help": "Cut texts to their first tokens, for the teacher to go on from there."},
    )
    as_chat: bool = field(default=False, metadata={"help": "Make each prompt the message of a user."})
    system_prompt: str | None = field(default=None, metadata={"help": "Put in front of every conversation."})
    max_prompts: int | None = field(default=None, metadata={"help": "How many prompts at most."})

    num_completions: int = field(default=1, metadata={"help": "Completions of each prompt."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest completion, in tokens."})
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "0 takes the likeliest token each time. (loss_temperature is another thing.)"}
    )
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens with this mass together."})
    top_k: int = field(default=0, metadata={"help": "Sample from so many likeliest tokens; 0 is all."})
    num_beams: int = field(default=1, metadata={"help": "Beam search (Kim and Rush, 2016), at temperature 0."})
    seed: int = field(default=0, metadata={"help": "Of the sampling."})
    batch_size: int = field(default=32, metadata={"help": "Prompts at a time and rank (transformers)."})
    continuous_batching: bool = field(
        default=False,
        metadata={"help": "transformers' continuous batching: a text that ends makes room for the next at once."},
    )
    log_probs: bool = field(
        default=False,
        metadata={"help": "Record the teacher's mean log-probability of each text (the filter log_prob needs it)."},
    )
    vllm_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "More for vllm.LLM, such as {tensor_parallel_size: 8}, as JSON or YAML."}
    )

    concurrency: int = field(default=16, metadata={"help": "Requests in flight at an endpoint."})
    request_timeout: float = field(default=600.0, metadata={"help": "Seconds for one request to an endpoint."})
    max_retries: int = field(default=8, metadata={"help": "Of a request that failed for a passing reason."})
    price_per_million_input_tokens: float = field(default=0.0, metadata={"help": "What an endpoint takes for prompts."})
    price_per_million_output_tokens: float = field(default=0.0, metadata={"help": "And for completions."})
    budget: float | None = field(
        default=None,
        metadata={"help": "Stop before more than this is spent, all earlier parts of the run included."},
    )

    filters: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "What is kept, in this order, as JSON or YAML: {name: {parameter: value}} of "
            f"{', '.join(FILTERS)}. By default {', '.join(DEFAULTS)}; {{}} keeps all. A run that is complete is only "
            "filtered anew."
        },
    )
    generated_hub_id: str | None = field(
        default=None, metadata={"help": "Push what was accepted to this dataset repository."}
    )
    generated_hub_private: bool = field(default=False, metadata={"help": "Make that repository private."})

    def __post_init__(self) -> None:
        self.teacher_model_init_kwargs = _mapping("teacher_model_init_kwargs", self.teacher_model_init_kwargs)
        self.vllm_kwargs = _mapping("vllm_kwargs", self.vllm_kwargs)
        self.filters = dict(DEFAULTS) if self.filters is None else _mapping("filters", self.filters)
        self.engine = self.engine or ("endpoint" if self.endpoint_url else "transformers")
        if self.engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {self.engine!r}.")
        if self.engine == "endpoint" and not self.endpoint_url:
            raise ValueError("engine=endpoint needs its endpoint_url, such as https://host/v1.")
        for name in ("prompt_tokens", "max_prompts", "batch_size"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        others = {name for name in ENGINES if name != self.engine}
        only = {
            "transformers": ("batch_size", "continuous_batching", "teacher_load_in_4bit", "teacher_load_in_8bit"),
            "vllm": ("vllm_kwargs",),
            "endpoint": (
                *("endpoint_url", "concurrency", "request_timeout", "max_retries", "budget"),
                *("price_per_million_input_tokens", "price_per_million_output_tokens"),
            ),
        }
        unused = [f"{name} (engine is {self.engine})" for other in others for name in only[other] if self._is_set(name)]
        if self.engine != "transformers":
            unused += [
                f"{name} (engine is {self.engine})" for name in ("teacher_model_init_kwargs",) if self._is_set(name)
            ]
        if self.engine == "endpoint":
            names = ("teacher_model_revision", "prompt_tokens")
            unused += [f"{name} (engine is endpoint)" for name in names if self._is_set(name)]
        if self.generated_hub_private and self.generated_hub_id is None:
            unused.append("generated_hub_private (there is no generated_hub_id)")
        if unused:
            raise ValueError(f"without effect here, so refused: {'; '.join(sorted(unused))}.")
        if "majority" in self.filters and self.num_completions < 3:
            raise ValueError(f"the filter majority needs three votes or more: num_completions={self.num_completions}.")
        self.log_probs = self.log_probs or "log_prob" in self.filters
        self.sampling()
        self.prices()

    def _is_set(self, name: str) -> bool:
        default = next(each.default for each in fields(self) if each.name == name)
        return getattr(self, name) not in (default, {})

    def sampling(self) -> Sampling:
        return Sampling(
            num_completions=self.num_completions,
            max_new_tokens=self.max_new_tokens,
            temperature=self.sampling_temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            num_beams=self.num_beams,
            seed=self.seed,
        )

    def prices(self) -> Prices:
        return Prices(self.price_per_million_input_tokens, self.price_per_million_output_tokens, self.budget)

    def make_filters(self) -> dict[str, Filter]:
        assert isinstance(self.filters, dict), "it is parsed"
        return make_filters(self.filters)
