"""The student writes what it learns from: on-policy distillation (Agarwal et al., 2023, arXiv:2306.13649, algorithm 1).

Of a share of the rows of each step only the prompt stays. The student, as it is in this step, goes on from it, and the
objective compares it with its teacher on what it wrote. As in the paper, no gradient flows through the sampling.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_distill.config import DistillationConfig
from llm_distill.data.on_policy_rows import prompt_of, replace_completion, rows_of
from llm_distill.data.policy import Collate, Policy, Row
from llm_distill.generation.engines.base import Completion, Sampling
from llm_distill.generation.engines.transformers import TransformersEngine
from llm_distill.generation.filters import repeated_share
from llm_distill.generation.options import OnPolicyOptions
from llm_distill.heads import base_of
from llm_distill.models import LanguageModel
from llm_distill.options import is_chosen
from llm_distill.rows import IGNORED, WRITTEN
from llm_distill.students.gathered import gathered, require_gatherable
from llm_distill.teachers import Teacher


class MadeRow(NamedTuple):
    """A row of a step, and whether the student writes its text."""

    row: Row
    is_written: bool


class OnPolicy(Policy):
    """The student completes the prompts of one step or several, all of their micro-batches at once.

    Args:
        options: how much it writes, and how.
        seed: with the step it decides which rows are written and what is sampled, so that a resumed run goes on as it
            would have.
    """

    writes = True

    def __init__(self, options: OnPolicyOptions, seed: int) -> None:
        self.share, self.seed, self.masks_cut = options.on_policy_share, seed, options.mask_truncated_completions
        self.rows_per_row, self.steps_per_generation = options.num_generations, options.steps_per_generation
        self.sampling = Sampling(
            max_new_tokens=options.max_completion_length,
            temperature=options.sampling_temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            repetition_penalty=options.repetition_penalty,
        )
        self._pending: dict[int, list[list[MadeRow]]] = {}  # the micro-batches of the steps to come
        self._steps_read = 0  # of the data that comes, those that a resumed run has in `_pending`
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
            ValueError: a teacher that knows stored texts alone, FSDP 1, a student with a learned prompt.
        """
        if teacher is not None and teacher.is_stored:
            raise ValueError(
                "on_policy_share needs a teacher that reads what the student will write, and a teacher_cache cannot. "
                "Name the teacher itself; or have the student write first (`llm-distill generate` with it as the "
                "teacher), capture what it wrote, and train on that."
            )
        require_gatherable(accelerator)
        if isinstance(student, PeftModel) and student.active_peft_config.is_prompt_learning:
            raise ValueError("on_policy_share does not go with a learned prompt: train LoRA adapters, or all weights.")
        self.student, author = student, LanguageModel(base_of(student), tokenizer)
        self.engine, self.collate, self.accelerator = TransformersEngine(author, self.sampling), collate, accelerator
        self.ends = {"student": {*self.engine.ends}, "teacher": set[int]()}
        for model in () if teacher is None else teacher.models:
            ends = model.model.generation_config.eos_token_id
            own = model.tokenizer.eos_token_id if model.tokenizer is not None else None
            self.ends["teacher"] |= {own, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.engine.ends |= self.ends["teacher"]

    def __call__(self, coming: Iterator[list[dict[str, Any]]], step: int) -> list[dict[str, Any]]:
        """The same number of batches of the same sizes, in which written rows stand in place of others. Rows of about
        the same length stand together.
        """
        for _ in range(self._steps_read):
            next(coming, None)
        self._steps_read = 0
        if step not in self._pending:
            steps = list(itertools.islice(coming, self.steps_per_generation))
            self._pending = self._complete(dict(enumerate(steps, step)))
        return [
            self.collate([made.row for made in rows]) | {WRITTEN: torch.tensor([made.is_written for made in rows])}
            for rows in self._pending.pop(step, [])
        ]

    def save(self, folder: Path) -> None:
        """Keeps what was written for the steps to come."""
        if self.steps_per_generation > 1:
            self._file(folder).write_text(json.dumps(self._pending))

    def load(self, folder: Path) -> None:
        """Goes on with what was written for the steps to come, over as many ranks."""
        path = self._file(folder)
        if path.exists():
            pending = json.loads(path.read_text())
            self._pending = {
                int(step): [[MadeRow(*made) for made in rows] for rows in pending[step]] for step in pending
            }
            self._steps_read = len(self._pending)
        elif any(folder.glob("written-*.json")):
            raise ValueError(
                f"{folder} has texts that the student wrote for steps to come, over another number of ranks than "
                f"{self.accelerator.num_processes}: resume with as many as there were."
            )

    def _file(self, folder: Path) -> Path:
        return folder / f"written-{self.accelerator.process_index}-of-{self.accelerator.num_processes}.json"

    def log(self) -> dict[str, float]:
        """Of what was written since the last log, over all ranks: mean and largest length in tokens, the share that the
        limit cut, the mean share of runs of four words that a text has had before, and the seconds that writing took on
        this rank.
        """
        lengths, device = self._lengths, self.accelerator.device
        sums = torch.tensor([len(lengths), sum(lengths), self._cut, self._repeated], dtype=torch.float32, device=device)
        texts, tokens, cut, repeated = self.accelerator.reduce(sums, "sum").tolist()
        longest = self.accelerator.gather(torch.tensor([max(lengths, default=0)], device=device)).max().item()
        seconds = self._seconds
        self._reset()
        if not texts:
            return {}
        return {
            "completion_length": tokens / texts,
            "completion_max_length": longest,
            "completion_cut_share": cut / texts,
            "completion_repeated_share": repeated / texts,
            "writing_seconds": seconds,
        }

    def _reset(self) -> None:
        self._lengths: list[int] = []
        self._cut, self._repeated, self._seconds = 0, 0.0, 0.0

    def _complete(self, steps: dict[int, list[dict[str, Any]]]) -> dict[int, list[list[MadeRow]]]:
        """The rows of each micro-batch of these steps, written or as they came."""
        drawn = {
            step: [
                MadeRow(row, self._is_written(step, copy, prompt_of(row)))
                for batch in batches
                for row in rows_of(batch)
                for copy in range(self.rows_per_row)
            ]
            for step, batches in steps.items()
        }
        prompts = [prompt_of(made.row) for rows in drawn.values() for made in rows if made.is_written]
        seed = self._draw(4, min(steps, default=0), self.accelerator.process_index)
        completions = iter(self._write(prompts, seed))
        micro_batches = {}
        for step, rows in drawn.items():
            rows = [MadeRow(self._row(made, next(completions)), True) if made.is_written else made for made in rows]
            remaining = iter(sorted(rows, key=lambda made: len(made.row["input_ids"])))
            sizes = [len(batch["labels"]) * self.rows_per_row for batch in steps[step]]
            micro_batches[step] = [list(itertools.islice(remaining, size)) for size in sizes]
        return micro_batches

    def _row(self, made: MadeRow, completion: Completion) -> Row:
        """The same prompt with this completion."""
        ids = completion.ids or []
        learned = [IGNORED] * len(ids) if self.masks_cut and not completion.finished else ids
        return replace_completion(made.row, ids, learned)

    def _is_written(self, step: int, copy: int, prompt: list[int]) -> bool:
        """Whether the row of this prompt is written: a draw that is the same on every rank."""
        return self._draw(8, step, copy, prompt) / 2**64 < self.share

    def _draw(self, size: int, *parts: Any) -> int:
        """A number of so many bytes, of the seed and what else there is."""
        text = repr((self.seed, *parts))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest())

    def _write(self, prompts: list[list[int]], seed: int) -> list[Completion]:
        """One completion after each prompt. Nothing else that is random, such as dropout, notices."""
        model, device = self.engine.author.model, self.accelerator.device
        longest, context = max(map(len, prompts), default=0) + self.sampling.max_new_tokens, self.engine.max_length
        if context is not None and longest > context:
            raise ValueError(
                f"a prompt of {longest - self.sampling.max_new_tokens:,} tokens and max_completion_length="
                f"{self.sampling.max_new_tokens} are more than the student's context of {context:,}: set it to "
                "less, or leave such prompts out."
            )
        began, was_training = time.perf_counter(), model.training
        self.engine.sampling = dataclasses.replace(self.sampling, seed=seed)
        model.eval()
        try:
            with (
                torch.random.fork_rng([device] if device.type == "cuda" else []),
                self.accelerator.autocast(),
                gathered(self.student, self.accelerator),
            ):
                written = dict(self.engine.complete(prompts))
        finally:
            model.train(was_training)
        completions = [only for _, (only,) in sorted(written.items())]
        self._lengths += [completion.tokens for completion in completions]
        self._cut += sum(not completion.finished for completion in completions)
        self._repeated += sum(repeated_share(completion.text) for completion in completions)
        self._seconds += time.perf_counter() - began
        return completions


def require_sampled_text(teacher: Teacher, args: DistillationConfig) -> None:
    """Raises ValueError where a teacher that tells of a text's own tokens alone has nothing to teach: the reverse KL's
    policy gradient is that on what the student has sampled, from its own distribution as it is.
    """
    if teacher.k != 0 or not args.kd_weight:
        return
    who = "a teacher that tells of the text's own tokens alone (teacher_server_k=0)"
    if not args.on_policy_share:
        raise ValueError(f"{who} teaches on what the student wrote: set on_policy_share=1, or have it tell its top k.")
    if args.on_policy_share < 1 and not args.ce_weight:
        raise ValueError(
            f"{who} teaches nothing of the dataset's text, which on_policy_share={args.on_policy_share} leaves: set "
            "ce_weight for that text, or on_policy_share=1, or have it tell its top k."
        )
    ways = ("sampling_temperature", "top_p", "top_k", "repetition_penalty", "steps_per_generation")
    if changed := [name for name in ways if is_chosen(args, name)]:
        raise ValueError(
            f"{who} gives the reverse KL's gradient where the student of this very step samples from its own "
            f"distribution: leave out {', '.join(changed)}, or have it tell its top k."
        )
