"""A model in this process, by transformers' `generate`."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from llm_distill.generation.engines.base import Completion, LocalEngine, Sampling
from llm_distill.losses.likelihoods import token_log_likelihoods
from llm_distill.models import LanguageModel, vocabulary_size

PROMPTS_AT_A_TIME = 32


class TransformersEngine(LocalEngine):
    """`transformers`' generate, on every rank. Prompts of about the same length run together, the longest first, so
    that what does not fit into memory shows at once.

    Args:
        author: who writes, on its device.
        sampling: how.
        batch_size: prompts at a time; each takes `num_completions` sequences.
        score: measures `mean_log_prob`, with one more forward over each batch.
        continuous: transformers' continuous batching: a sequence that ends makes room for the next at once.
    """

    WINDOW = 32
    """Batches that continuous batching gets at a time: what a kill can cost."""

    def __init__(
        self,
        author: LanguageModel,
        sampling: Sampling,
        *,
        batch_size: int = PROMPTS_AT_A_TIME,
        score: bool = False,
        continuous: bool = False,
    ) -> None:
        if continuous and sampling.num_beams > 1:
            raise ValueError("continuous_batching does not go with beams.")
        self.author, self.tokenizer, self.sampling = author, author.require_tokenizer("teacher"), sampling
        self.batch_size, self.score, self.continuous = batch_size, score, continuous
        model_ends = author.model.generation_config.eos_token_id
        model_ends = model_ends if isinstance(model_ends, list) else [model_ends]
        self.ends: set[int] = {self.tokenizer.eos_token_id, *model_ends} - {None}
        pad = self.tokenizer.pad_token_id
        self.pad: int = pad if pad is not None else min(self.ends, default=0)
        rows = author.model.config.get_text_config().vocab_size
        self.no_tokens = list(range(vocabulary_size(self.tokenizer), rows))
        """Rows of the model's matrix that only fill it up: their ids mean nothing."""

    @property
    def max_length(self) -> int | None:
        return self.author.max_length

    def describe(self) -> dict[str, Any]:
        return self.author.describe()

    def complete(self, prompts: Sequence[list[int]]) -> Iterator[tuple[int, list[Completion]]]:
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        size = self.batch_size * (self.WINDOW if self.continuous else 1)
        copies = self.sampling.num_completions
        try:
            for start in range(0, len(order), size):
                places = order[start : start + size]
                batch = [prompts[place] for place in places]
                torch.manual_seed(zlib.crc32(repr((self.sampling.seed, batch[0])).encode()))
                written = self._continuously(batch) if self.continuous else self._together(batch)
                completions = [self.cut_after_end(ids) for ids in written]
                if self.score:
                    completions = self._scored([prompt for prompt in batch for _ in range(copies)], completions)
                for number, place in enumerate(places):
                    yield place, completions[number * copies : (number + 1) * copies]
        finally:
            if self.continuous:
                self.author.model.destroy_cached_continuous_batching_manager()

    def cut_after_end(self, ids: list[int]) -> Completion:
        """Of the tokens after a prompt, without those that only fill up a batch, which follow the end token."""
        end = next((place for place, token in enumerate(ids) if token in self.ends), None)
        return self.make_completion(ids if end is None else ids[: end + 1], finished=end is not None)

    @torch.inference_mode()
    def _together(self, batch: list[list[int]]) -> list[list[int]]:
        longest, device = max(map(len, batch)), self.author.model.device
        # A text's first token fills it up, as a penalty for what is there already would count any other.
        inputs = torch.tensor([ids[:1] * (longest - len(ids)) + ids for ids in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch], device=device)
        with self._only_our_settings() as config:
            output = self.author.model.generate(
                inputs,
                attention_mask=mask,
                generation_config=config,
                synced_gpus=False,  # a rank may have less to write than others, or nothing
            )
        return output[:, longest:].tolist()

    @torch.inference_mode()
    def _continuously(self, batch: list[list[int]]) -> list[list[int]]:
        copies = [prompt for prompt in batch for _ in range(self.sampling.num_completions)]
        with self._only_our_settings() as config:
            config.num_return_sequences = 1
            outputs = self.author.model.generate_batch(
                copies,
                generation_config=config,
                continuous_batching_config=ContinuousBatchingConfig(seed=torch.initial_seed() % 2**31),
                persistent_manager=True,
                warmup=False,
            )
        in_order = [outputs[name] for name in sorted(outputs, key=lambda name: int(name.rsplit("_", 1)[-1]))]
        if errors := [output.error for output in in_order if output.error]:
            raise ValueError(f"continuous batching failed, try without it: {errors[0]}")
        return [output.generated_tokens for output in in_order]

    @contextmanager
    def _only_our_settings(self) -> Iterator[GenerationConfig]:
        """What was asked for: a checkpoint's generation_config.json would fill in a penalty that nobody asked for."""
        model, sampling = self.author.model, self.sampling
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=sampling.temperature > 0,
            num_beams=sampling.num_beams,
            num_return_sequences=sampling.num_completions,
            eos_token_id=sorted(self.ends) or None,
            pad_token_id=self.pad,
            repetition_penalty=sampling.repetition_penalty,
            suppress_tokens=self.no_tokens or None,
        )
        if sampling.temperature > 0:
            config.update(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
        models_own, model.generation_config = model.generation_config, GenerationConfig()
        try:
            yield config
        finally:
            model.generation_config = models_own

    def _scored(self, prompts: list[list[int]], completions: list[Completion]) -> list[Completion]:
        """With the mean log-probability of each, from one forward over each batch."""
        scored = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            pairs = list(zip(prompts[part], completions[part], strict=True))
            log_likelihoods = token_log_likelihoods(
                self.author.model,
                self.author.head,
                [prompt + (completion.ids or []) for prompt, completion in pairs],
                contexts=[len(prompt) for prompt, _ in pairs],
            )
            scored += [
                completion._replace(mean_log_prob=float(values.sum()) / max(completion.tokens, 1))
                for (_, completion), values in zip(pairs, log_likelihoods, strict=True)
            ]
        return scored
