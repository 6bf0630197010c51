"""The student writes what it learns from: on-policy distillation (Agarwal et al., 2023, arXiv:2306.13649, algorithm 1).

Of a share of the rows of each step only the prompt stays. The student, as it is in this step, goes on from it, and the
objective compares it with its teacher on what it wrote. As in the paper, no gradient flows through the sampling.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_distill.data.policy import Collate, Policy, Row
from llm_distill.generation.engines.base import Completion, Sampling
from llm_distill.generation.engines.transformers import TransformersEngine
from llm_distill.generation.options import OnPolicyOptions
from llm_distill.heads import base_of
from llm_distill.models import LanguageModel
from llm_distill.rows import IGNORED, WRITTEN
from llm_distill.teachers import Teacher


class OnPolicy(Policy):
    """The student completes the prompts of a step, all of its micro-batches at once.

    Args:
        options: how much it writes, and how.
        seed: with the step it decides which rows are written and what is sampled, so that a resumed run goes on as it
            would have.
    """

    writes = True

    def __init__(self, options: OnPolicyOptions, seed: int) -> None:
        self.share, self.seed, self.masks_cut = options.on_policy_share, seed, options.mask_truncated_completions
        self.sampling = Sampling(
            max_new_tokens=options.max_completion_length,
            temperature=options.sampling_temperature,
            top_p=options.top_p,
            top_k=options.top_k,
        )
        self._step = 0
        self._reset()

    def begin(
        self,
        student: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        teacher: Teacher | None,
        collate: Collate,
        accelerator: Accelerator,
    ) -> None:
        """Makes a writer of the student. An end token of the teacher's ends its texts too.

        Raises:
            ValueError: a teacher that knows stored texts alone, a student that is sharded or has a learned prompt.
        """
        if teacher is not None and teacher.is_stored:
            raise ValueError(
                "on_policy_share needs a teacher that reads what the student will write, and a teacher_cache cannot. "
                "Name the teacher itself; or have the student write first (`llm-distill generate` with it as the "
                "teacher), capture what it wrote, and train on that."
            )
        if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError("on_policy_share does not go with sharded students (FSDP, DeepSpeed): use DDP.")
        if isinstance(student, PeftModel) and student.active_peft_config.is_prompt_learning:
            raise ValueError("on_policy_share does not go with a learned prompt: train LoRA adapters, or all weights.")
        author = LanguageModel(base_of(student), tokenizer)
        self.engine, self.collate, self.accelerator = TransformersEngine(author, self.sampling), collate, accelerator
        for model in () if teacher is None else teacher.models:
            ends = model.model.generation_config.eos_token_id
            self.engine.ends |= set(ends if isinstance(ends, list) else [ends]) - {None}

    def __call__(self, coming: Iterator[list[dict[str, Any]]], step: int) -> list[dict[str, Any]]:
        """The same number of batches of the same sizes, in which written rows stand in place of others. Rows of about
        the same length stand together.
        """
        self._step, batches = step, next(coming, [])
        rows = [row for batch in batches for row in rows_of(batch)]
        prompts = {number: prompt for number, prompt in enumerate(map(prompt_of, rows)) if self._writes_after(prompt)}
        completions = self._write(list(prompts.values())) if prompts else []
        for number, completion in zip(prompts, completions, strict=True):
            prompt, ids = prompts[number], completion.ids or []
            learned = [IGNORED] * len(ids) if self.masks_cut and not completion.finished else ids
            rows[number] = {"input_ids": prompt + ids, "labels": [IGNORED] * len(prompt) + learned}
        remaining = iter(sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"])))
        made = []
        for batch in batches:
            numbers = [next(remaining) for _ in batch["labels"]]
            written = torch.tensor([number in prompts for number in numbers])
            made.append({**self.collate([rows[number] for number in numbers]), WRITTEN: written})
        return made

    def log(self) -> dict[str, float]:
        """Of what was written since the last log, over all ranks: mean and largest length in tokens, the share that the
        limit cut, and the seconds that writing took on this rank.
        """
        lengths, device = self._lengths, self.accelerator.device
        sums = torch.tensor([len(lengths), sum(lengths), self._cut], dtype=torch.float32, device=device)
        texts, tokens, cut = self.accelerator.reduce(sums, "sum").tolist()
        longest = self.accelerator.gather(torch.tensor([max(lengths, default=0)], device=device)).max().item()
        seconds = self._seconds
        self._reset()
        if not texts:
            return {}
        return {
            "completion_length": tokens / texts,
            "completion_max_length": longest,
            "completion_cut_share": cut / texts,
            "writing_seconds": seconds,
        }

    def _reset(self) -> None:
        self._lengths: list[int] = []
        self._cut, self._seconds = 0, 0.0

    def _writes_after(self, prompt: list[int]) -> bool:
        """Whether the row of this prompt is written in this step: a draw that is the same on every rank."""
        return self._draw(8, prompt) / 2**64 < self.share

    def _draw(self, size: int, *parts: Any) -> int:
        """A number of so many bytes, of the seed, the step and what else there is."""
        text = repr((self.seed, self._step, *parts))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest())

    def _write(self, prompts: list[list[int]]) -> list[Completion]:
        """One completion after each prompt. Nothing else that is random, such as dropout, notices."""
        model, device = self.engine.author.model, self.accelerator.device
        longest, context = max(map(len, prompts)) + self.sampling.max_new_tokens, self.engine.max_length
        if context is not None and longest > context:
            raise ValueError(
                f"a prompt of {longest - self.sampling.max_new_tokens:,} tokens and max_completion_length="
                f"{self.sampling.max_new_tokens} are more than the student's context of {context:,}: set it to "
                "less, or leave such prompts out."
            )
        began, was_training = time.perf_counter(), model.training
        self.engine.sampling = dataclasses.replace(self.sampling, seed=self._draw(4))
        model.eval()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []), self.accelerator.autocast():
                written = dict(self.engine.complete(prompts))
        finally:
            model.train(was_training)
        completions = [only for _, (only,) in sorted(written.items())]
        self._lengths += [completion.tokens for completion in completions]
        self._cut += sum(not completion.finished for completion in completions)
        self._seconds += time.perf_counter() - began
        return completions


def rows_of(batch: dict[str, Any]) -> Iterator[Row]:
    """The rows of a padded batch."""
    mask = batch["attention_mask"].bool()
    for number, counts in enumerate(mask):
        yield {name: batch[name][number][counts].tolist() for name in ("input_ids", "labels")}


def prompt_of(row: Row) -> list[int]:
    """The tokens before the first that is learned.

    Raises:
        ValueError: there are none.
    """
    first = next((place for place, label in enumerate(row["labels"]) if label != IGNORED), len(row["labels"]))
    if not first:
        raise ValueError(
            "on_policy_share needs prompts, and a text begins with what is to be learned: give rows of prompt and "
            "completion (or of prompt alone), or conversations with assistant_only_loss."
        )
    return row["input_ids"][:first]


def add_empty_completions(dataset: Any, share: float) -> Any:
    """A dataset of prompts alone as TRL prepares one with completions, which are empty: the student writes them.

    Raises:
        ValueError: some of the texts are to be the dataset's own, and it has none.
    """
    columns: Iterable[str] = getattr(dataset, "column_names", None) or ()
    if "prompt" not in columns or {"completion", "messages", "text"} & {*columns}:
        return dataset
    if share < 1:
        raise ValueError(
            f"on_policy_share={share} learns from the dataset's own completions too, and it has none: add a column "
            "completion, or set on_policy_share=1."
        )

    def add(row: dict[str, Any]) -> dict[str, Any]:
        return {"completion": "" if isinstance(row["prompt"], str) else [{"role": "assistant", "content": ""}]}

    return dataset.map(add, desc="Prompts") if isinstance(dataset, Dataset) else dataset.map(add)
