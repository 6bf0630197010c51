"""vLLM in this process, where it is installed: the fastest way to have a teacher write on GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from llm_distill.generation.engines.base import Completion, LocalEngine, Sampling


class VLLMEngine(LocalEngine):
    """vLLM's offline engine, which spreads over GPUs by itself (`tensor_parallel_size`): one process is enough.

    Args:
        model: a Hub id or a folder.
        tokenizer: the teacher's.
        sampling: how; vLLM has no beams here.
        description: of the checkpoint.
        score: keeps `mean_log_prob`.
        **options: more for `vllm.LLM`.
    """

    runs_on_every_rank: ClassVar[bool] = False
    WINDOW = 1024
    """Prompts that vLLM gets at a time: what a kill can cost."""

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        description: dict[str, Any] | None = None,
        score: bool = False,
        **options: Any,
    ) -> None:
        if sampling.num_beams > 1:
            raise ValueError("beams are not written by vLLM here: engine=transformers.")
        try:
            import vllm
        except ImportError as error:
            raise ValueError(
                "engine=vllm needs vLLM in this environment (pip install vllm), or a server of it in another one: "
                "endpoint_url."
            ) from error
        self.tokenizer, self.sampling, self.score = tokenizer, sampling, score
        self._description = description or {"model": model}
        self._model = vllm.LLM(model, **options)
        self._params = vllm.SamplingParams(
            n=sampling.num_completions,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            repetition_penalty=sampling.repetition_penalty,
            max_tokens=sampling.max_new_tokens,
            seed=sampling.seed,
            logprobs=0 if score else None,
        )

    @property
    def max_length(self) -> int | None:
        return self._model.llm_engine.model_config.max_model_len

    def describe(self) -> dict[str, Any]:
        return {**self._description, "engine": "vllm"}

    def complete(self, prompts: Sequence[list[int]]) -> Iterator[tuple[int, list[Completion]]]:
        for start in range(0, len(prompts), self.WINDOW):
            window = [{"prompt_token_ids": ids} for ids in prompts[start : start + self.WINDOW]]
            for place, request in enumerate(self._model.generate(window, self._params, use_tqdm=False), start):
                yield place, [self._completion(output) for output in request.outputs]

    def _completion(self, output: Any) -> Completion:
        ids = list(output.token_ids)
        mean_log_prob = output.cumulative_logprob / max(len(ids), 1) if self.score else None
        return self.make_completion(ids, output.finish_reason == "stop", mean_log_prob)
