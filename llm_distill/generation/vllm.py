"""vLLM in this process, where it is installed: the fastest way to have a teacher write on GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerBase

from llm_distill.generation.engines import Completion, LocalEngine, Sampling


class VLLMEngine(LocalEngine):
    """vLLM's offline engine, which spreads over GPUs by itself (`tensor_parallel_size`): one process is enough.

    Args:
        model: a Hub id or a folder.
        tokenizer: the teacher's.
        sampling: how; vLLM has no beams here.
        description: of the checkpoint.
        window: prompts that it gets at a time: what a kill can cost.
        score: keeps `mean_log_prob`.
        **options: more for `vllm.LLM`.
    """

    runs_on_every_rank: ClassVar[bool] = False

    def __init__(
        self,
        model: str,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        *,
        description: dict[str, Any] | None = None,
        window: int = 1024,
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
                "teacher_server_url."
            ) from error
        super().__init__(tokenizer, sampling)
        self.window, self.score, self._description = window, score, description or {"model": model}
        self._model = vllm.LLM(model, **options)
        self._params = vllm.SamplingParams(
            n=sampling.num_completions,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            max_tokens=sampling.max_new_tokens,
            seed=sampling.seed,
            logprobs=0 if score else None,
        )

    @property
    def max_length(self) -> int | None:
        return self._model.llm_engine.model_config.max_model_len

    def describe(self) -> dict[str, Any]:
        return {**self._description, "engine": "vllm"}

    def continued(self, ids: Sequence[list[int]]) -> Iterator[tuple[int, list[Completion]]]:
        for start in range(0, len(ids), self.window):
            asked = [{"prompt_token_ids": each} for each in ids[start : start + self.window]]
            for place, request in enumerate(self._model.generate(asked, self._params, use_tqdm=False), start):
                yield place, [self._completion(each) for each in request.outputs]

    def _completion(self, output: Any) -> Completion:
        ids, ended = list(output.token_ids), output.finish_reason == "stop"
        text = self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=True)
        mean = output.cumulative_logprob / max(len(ids), 1) if self.score else None
        return Completion(text, ended, len(ids), ids, mean)
