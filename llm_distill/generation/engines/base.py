"""The interface of all who write: prompts in, answers out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from transformers import PreTrainedTokenizerBase

from llm_distill.generation.prompts import Prompt, prompt_ids
from llm_distill.templates import TemplateRefusedError


@dataclass(frozen=True)
class Sampling:
    """How a completion is chosen.

    Raises:
        ValueError: a value out of range, or beams that sample.
    """

    num_completions: int = 1
    """Of each prompt."""
    max_new_tokens: int = 256
    temperature: float = 1.0
    """0 takes the likeliest token each time (greedy)."""
    top_p: float = 1.0
    top_k: int = 0
    """0 is no limit."""
    repetition_penalty: float = 1.0
    """By which the logits of tokens that are there already are divided (Keskar et al., 2019, arXiv:1909.05858)."""
    num_beams: int = 1
    """Beam search (Kim & Rush, 2016, arXiv:1606.07947), at temperature 0."""
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("temperature", "top_p"):
            object.__setattr__(self, name, float(getattr(self, name)))  # 0 and 0.0 are one setting
        for name, least in (("num_completions", 1), ("max_new_tokens", 1), ("num_beams", 1), ("top_k", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not 0 <= self.temperature < float("inf") or not 0 < self.top_p <= 1:
            raise ValueError(
                f"sampling_temperature={self.temperature} must not be negative, and top_p={self.top_p} in (0, 1]."
            )
        if self.temperature == 0 and (self.top_p < 1 or self.top_k):
            raise ValueError("without effect here, so refused: top_p and top_k (sampling_temperature is 0).")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError("num_beams looks for the likeliest text: set sampling_temperature=0.")
        if self.temperature == 0 and self.num_completions > self.num_beams:
            raise ValueError(
                f"num_completions={self.num_completions} at sampling_temperature=0 would be the same text each time: "
                "sample, or look for that many beams (num_beams)."
            )


class Completion(NamedTuple):
    """What was written after a prompt."""

    text: str
    finished: bool
    """Whether its author ended it, and not the limit."""
    tokens: int
    ids: list[int] | None = None
    """The author's own tokens, with the end token where it ended; None from a server that tells none."""
    mean_log_prob: float | None = None
    """The author's, in nats a token, at temperature 1."""
    extra: dict[str, Any] | None = None
    """What a server tells of the author's message besides its text: `reasoning_content`, `tool_calls`."""


class Answer(NamedTuple):
    """All that came back for a prompt."""

    prompt: Prompt
    completions: list[Completion]
    refused: str | None = None
    """Why there are none, or not all: it is not asked again, unless that is asked for."""
    prompt_ids: list[int] | None = None
    cost: float = 0.0
    """In the currency of the prices."""


class Engine(ABC):
    """Writes completions."""

    runs_on_every_rank: ClassVar[bool] = True
    sampling: Sampling
    tokenizer: PreTrainedTokenizerBase | None = None
    """The author's, where it is known."""

    @abstractmethod
    def write(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        """An answer to each prompt, in any order, as they are ready."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """Who writes, as JSON. No path and no secret."""

    def check(self) -> None:  # noqa: B027
        """Raises ValueError if it cannot write: called once, before anything else."""


class LocalEngine(Engine):
    """Engines that hold the model and see its tokens."""

    tokenizer: PreTrainedTokenizerBase

    @property
    @abstractmethod
    def max_length(self) -> int | None:
        """The model's context, in tokens."""

    @abstractmethod
    def complete(self, prompts: Sequence[list[int]]) -> Iterator[tuple[int, list[Completion]]]:
        """Completions after the tokens of each prompt, with its place in the list."""

    def write(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        new, context = self.sampling.max_new_tokens, self.max_length
        fitting = []
        for prompt in prompts:
            try:
                ids = prompt_ids(prompt, self.tokenizer)
            except TemplateRefusedError as error:
                yield Answer(prompt, [], str(error))
                continue
            if context is not None and len(ids) + new > context:
                yield Answer(prompt, [], f"with {new:,} new tokens longer than the teacher's context of {context:,}")
            else:
                fitting.append((prompt, ids))
        for place, completions in self.complete([ids for _, ids in fitting]):
            prompt, ids = fitting[place]
            yield Answer(prompt, completions, prompt_ids=ids)

    def make_completion(self, ids: list[int], finished: bool, mean_log_prob: float | None = None) -> Completion:
        """Of the tokens after a prompt, the last of which is an end token if it is finished."""
        text = self.tokenizer.decode(ids[:-1] if finished else ids, skip_special_tokens=True)
        return Completion(text, finished, len(ids), ids, mean_log_prob)
