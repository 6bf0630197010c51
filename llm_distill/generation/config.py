"""What a person can choose for `llm-distill generate`. The teacher's options are those of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm_distill.generation.engines.base import Sampling
from llm_distill.generation.engines.endpoint import Prices
from llm_distill.generation.filters import DEFAULTS, FILTERS, Filter, make_filters
from llm_distill.options import is_chosen, option, parse_mapping
from llm_distill.servers import KEY_VARIABLE
from llm_distill.teachers.options import LOADING, TeacherModelOptions

TRANSFORMERS, VLLM, ENDPOINT = "transformers", "vllm", "endpoint"


@dataclass
class GenerateConfig(TeacherModelOptions):
    """Who writes, how, and what is kept of it.

    Raises:
        ValueError: a value out of range, or an option that would have no effect beside the others.
    """

    heading = "what is written"

    output_dir: str = option(
        "generated",
        "Texts, report and journal go to this folder. The same command goes on where an earlier one was killed.",
    )
    engine: str | None = option(
        None,
        "The teacher is run by transformers (on every rank), by vllm (if it is installed), or by an endpoint, which is "
        "an OpenAI-compatible server. The default is endpoint where there is an endpoint_url, else transformers.",
        choices=(TRANSFORMERS, VLLM, ENDPOINT),
    )
    endpoint_url: str | None = option(
        None,
        f"The endpoint is at this address, such as https://host/v1. Its key is read from {KEY_VARIABLE} in the "
        "environment alone.",
        needs={"engine": (ENDPOINT,)},
    )
    prompt_column: str | None = option(
        None,
        "The prompts are in this column. By default it is prompt, messages, question, instruction or text, whichever "
        "comes first.",
    )
    prompt_tokens: int | None = option(
        None,
        "Texts are cut to this many of their first tokens, for the teacher to go on from there.",
        needs={"engine": (TRANSFORMERS, VLLM)},
        at_least=1,
    )
    as_chat: bool = option(False, "Each prompt becomes the message of a user.")
    system_prompt: str | None = option(
        None, "This text stands in front of every conversation that has no system turn of its own."
    )
    max_prompts: int | None = option(None, "At most this many prompts are used.", at_least=1)

    num_completions: int = option(1, "Each prompt gets this many completions.")
    max_new_tokens: int = option(256, "A completion has at most this many tokens.")
    sampling_temperature: float = option(
        1.0, "The logits are divided by this temperature. 0 takes the likeliest token each time."
    )
    top_p: float = option(1.0, "Only the likeliest tokens are sampled that have this probability together.")
    top_k: int = option(0, "Only this many of the likeliest tokens are sampled. 0 samples from all.")
    num_beams: int = option(1, "Beam search keeps this many beams (Kim and Rush, 2016). It needs temperature 0.")
    seed: int = option(0, "Sampling begins from this random seed.")
    batch_size: int = option(
        32, "Each rank completes this many prompts at a time.", needs={"engine": (TRANSFORMERS,)}, at_least=1
    )
    continuous_batching: bool = option(
        False,
        "A text that ends makes room for the next at once (transformers' continuous batching).",
        needs={"engine": (TRANSFORMERS,)},
    )
    log_probs: bool = option(
        False,
        "The teacher's mean log-probability of each text is recorded. The filter log_prob needs it and turns it on.",
    )
    vllm_kwargs: dict[str, Any] | str | None = option(
        None,
        "vllm.LLM gets these arguments, such as {tensor_parallel_size: 8}, as JSON or YAML.",
        needs={"engine": (VLLM,)},
        parse=parse_mapping,
    )

    concurrency: int = option(16, "An endpoint gets this many requests at a time.", needs={"engine": (ENDPOINT,)})
    request_timeout: float = option(
        600.0, "One request to an endpoint may take this many seconds.", needs={"engine": (ENDPOINT,)}
    )
    max_retries: int = option(
        8, "A request that fails for a passing reason is tried again this many times.", needs={"engine": (ENDPOINT,)}
    )
    price_per_million_input_tokens: float = option(
        0.0, "An endpoint takes this much for a million tokens of prompts.", needs={"engine": (ENDPOINT,)}
    )
    price_per_million_output_tokens: float = option(
        0.0, "An endpoint takes this much for a million tokens of completions.", needs={"engine": (ENDPOINT,)}
    )
    budget: float | None = option(
        None,
        "The run stops before more than this is spent, with all earlier parts of the run. An answer is asked for "
        "only where the budget allows for the most that it can cost, by max_new_tokens; it counts as that much where "
        "the endpoint does not tell how many tokens were used.",
        needs={"engine": (ENDPOINT,)},
    )

    retry_refused: bool = option(
        False, "Prompts that were refused, or whose answers could not be used, are asked again by a run that goes on."
    )
    filters: dict[str, Any] | str | None = option(
        None,
        "These filters choose what is kept, in this order, as JSON or YAML: {name: {parameter: value}} of "
        f"{', '.join(FILTERS)}. The default is {', '.join(DEFAULTS)}; {{}} keeps all. A run that is complete is only "
        "filtered anew.",
    )
    generated_hub_id: str | None = option(None, "What was accepted is pushed to this dataset repository on the Hub.")
    generated_hub_private: bool = option(False, "That repository is private.", needs="generated_hub_id")

    def __post_init__(self) -> None:
        self.filters = dict(DEFAULTS) if self.filters is None else parse_mapping("filters", self.filters)
        self.engine = self.engine or (ENDPOINT if self.endpoint_url else TRANSFORMERS)
        if self.engine == ENDPOINT and not self.endpoint_url:
            raise ValueError("engine=endpoint needs its endpoint_url, such as https://host/v1.")
        super().__post_init__()
        if "majority" in self.filters and self.num_completions < 3:
            raise ValueError(f"the filter majority needs three votes or more: num_completions={self.num_completions}.")
        self.log_probs = self.log_probs or "log_prob" in self.filters
        self.sampling()
        self.prices()

    def conflicts(self) -> dict[str, Any]:
        revisable = () if self.engine == ENDPOINT else ("teacher_model_revision",)
        unused = [name for name in LOADING if self.engine != TRANSFORMERS and name not in revisable]
        return super().conflicts() | {f"{name} (engine is {self.engine})": is_chosen(self, name) for name in unused}

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
