"""Who writes: one interface, and the teacher in this process behind it. Servers are in `endpoint`, vLLM in `vllm`."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedTokenizerBase

from llm_distill.divergences import ForwardKL
from llm_distill.generation.prompts import Prompt, prompt_ids
from llm_distill.losses.fused import fused_head_loss
from llm_distill.models import kept_of
from llm_distill.rows import IGNORED, View, counted_rows
from llm_distill.teachers.live import LiveTeacher


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
    """The teacher's own tokens, with the end token where it ended; None from a server that tells none."""
    mean_log_prob: float | None = None
    """The teacher's, in nats a token, at temperature 1."""


class Answer(NamedTuple):
    """All that came back for a prompt."""

    prompt: Prompt
    completions: list[Completion]
    refused: str | None = None
    """Why there are none: it is not asked again."""
    prompt_ids: list[int] | None = None
    cost: float = 0.0
    """In the currency of the prices."""


class Engine(ABC):
    """Writes completions."""

    runs_on_every_rank: ClassVar[bool] = True

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

    def __init__(self, tokenizer: PreTrainedTokenizerBase, sampling: Sampling) -> None:
        self.tokenizer, self.sampling = tokenizer, sampling

    @property
    @abstractmethod
    def max_length(self) -> int | None:
        """The teacher's context, in tokens."""

    @abstractmethod
    def continued(self, ids: Sequence[list[int]]) -> Iterator[tuple[int, list[Completion]]]:
        """Completions after the tokens of each prompt, with its place in the list."""

    def write(self, prompts: Sequence[Prompt]) -> Iterator[Answer]:
        asked = [(prompt, prompt_ids(prompt.content, self.tokenizer)) for prompt in prompts]
        new, context = self.sampling.max_new_tokens, self.max_length
        fitting = []
        for prompt, ids in asked:
            if context is not None and len(ids) + new > context:
                yield Answer(prompt, [], f"with {new:,} new tokens longer than the teacher's context of {context:,}")
            else:
                fitting.append((prompt, ids))
        for place, completions in self.continued([ids for _, ids in fitting]):
            prompt, ids = fitting[place]
            yield Answer(prompt, completions, prompt_ids=ids)

    def completion(self, ids: list[int], ends: set[int], log_prob: float | None = None) -> Completion:
        """Of the tokens after a prompt, cut after the end token; what only fills up a batch is behind it."""
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        ids = ids if end is None else ids[: end + 1]
        written = ids if end is None else ids[:-1]
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        return Completion(text, end is not None, len(ids), ids, log_prob)


class TransformersEngine(LocalEngine):
    """`transformers`' generate, on every rank. Prompts of about the same length run together, the longest first, so
    that what does not fit into memory shows at once.

    Args:
        teacher: a live one, on its device.
        sampling: how.
        batch_size: prompts at a time; each takes `num_completions` sequences.
        score: measures `mean_log_prob`, with one more forward over each batch.
        continuous: transformers' continuous batching: a sequence that ends makes room for the next at once.
    """

    WINDOW = 32
    """Batches that continuous batching gets at a time: what a kill can cost."""

    def __init__(
        self,
        teacher: LiveTeacher,
        sampling: Sampling,
        *,
        batch_size: int = 32,
        score: bool = False,
        continuous: bool = False,
    ) -> None:
        if teacher.tokenizer is None:
            raise ValueError("the teacher came without a tokenizer: LiveTeacher(model, tokenizer).")
        if continuous and sampling.num_beams > 1:
            raise ValueError("continuous_batching does not go with beams.")
        super().__init__(teacher.tokenizer, sampling)
        self.teacher, self.batch_size, self.score, self.continuous = teacher, batch_size, score, continuous
        own = teacher.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        self.ends: set[int] = ends
        pad = self.tokenizer.pad_token_id
        self.pad: int = pad if pad is not None else min(ends, default=0)

    @property
    def max_length(self) -> int | None:
        return self.teacher.max_length

    def describe(self) -> dict[str, Any]:
        return self.teacher.describe()

    def continued(self, ids: Sequence[list[int]]) -> Iterator[tuple[int, list[Completion]]]:
        try:
            yield from self._in_batches(ids)
        finally:
            if self.continuous:
                self.teacher.model.destroy_cached_continuous_batching_manager()

    def _in_batches(self, ids: Sequence[list[int]]) -> Iterator[tuple[int, list[Completion]]]:
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        size = self.batch_size * (self.WINDOW if self.continuous else 1)
        for start in range(0, len(order), size):
            places = order[start : start + size]
            batch = [ids[place] for place in places]
            torch.manual_seed(zlib.crc32(repr((self.sampling.seed, batch[0])).encode()))
            written = self._continuously(batch) if self.continuous else self._together(batch)
            n = self.sampling.num_completions
            cut = [self.completion(each, self.ends) for each in written]
            if self.score:
                repeated = [prompt for prompt in batch for _ in range(n)]
                cut = self._scored(repeated, cut)
            for number, place in enumerate(places):
                yield place, cut[number * n : (number + 1) * n]

    @torch.inference_mode()
    def _together(self, batch: list[list[int]]) -> list[list[int]]:
        inputs, mask = self._padded(batch, left=True)
        with self._nothing_but_ours() as config:
            output = self.teacher.model.generate(inputs, attention_mask=mask, generation_config=config)
        return output[:, inputs.shape[1] :].tolist()

    @torch.inference_mode()
    def _continuously(self, batch: list[list[int]]) -> list[list[int]]:
        copies = [prompt for prompt in batch for _ in range(self.sampling.num_completions)]
        options = ContinuousBatchingConfig(seed=torch.initial_seed() % 2**31)
        with self._nothing_but_ours() as config:
            config.num_return_sequences = 1
            made = self.teacher.model.generate_batch(
                copies,
                generation_config=config,
                continuous_batching_config=options,
                persistent_manager=True,
                warmup=False,
            )
        in_order = sorted(made.items(), key=lambda item: int(item[0].rsplit("_", 1)[-1]))
        if failed := [output.error for _, output in in_order if output.error]:
            raise ValueError(f"continuous batching failed, try without it: {failed[0]}")
        return [output.generated_tokens for _, output in in_order]

    @contextmanager
    def _nothing_but_ours(self) -> Iterator[GenerationConfig]:
        """What was asked for: a checkpoint's generation_config.json would fill in a penalty that nobody asked for."""
        model = self.teacher.model
        own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            yield self._generation_config()
        finally:
            model.generation_config = own

    def _generation_config(self) -> GenerationConfig:
        sampling = self.sampling
        chosen = {} if sampling.temperature == 0 else {"temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.temperature > 0:
            chosen["top_k"] = sampling.top_k
        return GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            num_beams=sampling.num_beams,
            num_return_sequences=sampling.num_completions,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=self.pad,
            **chosen,
        )

    @torch.inference_mode()
    def _scored(self, prompts: list[list[int]], completions: list[Completion]) -> list[Completion]:
        """With the mean log-probability of each, from one forward, a chunk of logits at a time."""
        scored = []
        for start in range(0, len(prompts), self.batch_size):
            part = range(start, min(start + self.batch_size, len(prompts)))
            whole = [prompts[i] + (completions[i].ids or []) for i in part]
            inputs, mask = self._padded(whole, left=False)
            labels = inputs.masked_fill(mask == 0, IGNORED)
            for row, i in enumerate(part):
                labels[row, : len(prompts[i])] = IGNORED
            rows = counted_rows(labels)
            head = self.teacher.head
            batch = {"input_ids": inputs, "attention_mask": mask, "labels": labels}
            hidden = kept_of(self.teacher.model, head, View.of(batch)).hidden
            options: dict[str, Any] = {"kd_weight": 0.0, "ce_weight": 1.0, "targets": rows.targets}
            _, metrics = fused_head_loss(hidden, head, None, ForwardKL(), **options)
            sums = torch.zeros(len(part), dtype=torch.float64).index_add_(
                0, rows.sample.cpu(), metrics["ce"].double().cpu()
            )
            scored += [
                completions[i]._replace(mean_log_prob=-float(sums[row]) / max(completions[i].tokens, 1))
                for row, i in enumerate(part)
            ]
        return scored

    def _padded(self, batch: Sequence[list[int]], *, left: bool) -> tuple[Tensor, Tensor]:
        longest = max(map(len, batch))
        ids = torch.full((len(batch), longest), self.pad)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(batch):
            where = slice(longest - len(tokens), None) if left else slice(0, len(tokens))
            ids[row, where] = torch.tensor(tokens, dtype=torch.long)
            mask[row, where] = 1
        return ids.to(self.teacher.model.device), mask.to(self.teacher.model.device)


def describe_sampling(sampling: Sampling) -> dict[str, Any]:
    return asdict(sampling)
