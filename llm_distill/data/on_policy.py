"""The student writes what it learns from: on-policy distillation (Agarwal et al., 2023, arXiv:2306.13649, algorithm 1).

Of a share of the rows of each step only the prompt stays. The student, as it is in this step, goes on from it, and the
objective compares it with its teacher on what it wrote. As in the paper, no gradient flows through the sampling.
"""

from __future__ import annotations

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
from llm_distill.data.early_tokens import weigh_early_tokens
from llm_distill.data.on_policy_rows import prompt_of, replace_completion, rows_of
from llm_distill.data.policy import Collate, Policy, Row
from llm_distill.data.replay import Reservoir, draw
from llm_distill.data.teacher_view import TwoViews
from llm_distill.generation.engines.base import Completion, Sampling
from llm_distill.generation.filters import repeated_share
from llm_distill.generation.options import OnPolicyOptions
from llm_distill.generation.writers.choose import make_writer, require_installed
from llm_distill.options import is_chosen
from llm_distill.rows import IGNORED, WEIGHTS, WRITTEN
from llm_distill.students.gathered import require_gatherable
from llm_distill.teachers import Teacher


class MadeRow(NamedTuple):
    """A row of a step, and whether the student writes its text, or has written it before."""

    row: Row
    is_written: bool
    written_at: int | None = None
    """The step of the student that did; None where it has yet to."""
    is_replayed: bool = False
    """Whether it was learned from before."""

    @property
    def is_to_write(self) -> bool:
        return self.is_written and self.written_at is None


class OnPolicy(Policy):
    """The student completes the prompts of one step or several, all of their micro-batches at once.

    Args:
        options: how much it writes, and how.
        seed: with the step it decides which rows are written and what is sampled, so that a resumed run goes on as it
            would have.

    Raises:
        ValueError: what is to write is not installed.
    """

    writes = True

    def __init__(self, options: OnPolicyOptions, seed: int) -> None:
        require_installed(options)
        self.options = options
        self.share, self.seed, self.masks_cut = options.on_policy_share, seed, options.mask_truncated_completions
        self.rows_per_row, self.steps_per_generation = options.num_generations, options.steps_per_generation
        self.sampling = Sampling(
            max_new_tokens=options.max_completion_length,
            temperature=options.sampling_temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            repetition_penalty=options.repetition_penalty,
        )
        self.early_decay = options.early_token_decay
        self.replay_share, self.replay_size = options.replay_share, options.replay_size
        self._pending: dict[int, list[list[MadeRow]]] = {}  # the micro-batches of the steps to come
        self._learned: tuple[int, list[MadeRow]] = (-1, [])  # a step, and what it learns from that is new
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
        """Makes a writer of the student. An end token of the teacher's, if it has the same tokens, ends its texts too.

        Raises:
            ValueError: a teacher that knows stored texts alone, FSDP 1, a student with a learned prompt, or one that
                the writer cannot write as.
        """
        if teacher is not None and teacher.is_stored:
            raise ValueError(
                "on_policy_share needs a teacher that reads what the student will write, and a teacher_cache cannot. "
                "Name the teacher itself; or have the student write first (`llm-distill generate` with it as the "
                "teacher), capture what it wrote, and train on that."
            )
        if self.options.speculative_top_k and isinstance(collate, TwoViews):
            raise ValueError(
                "speculative_top_k has the teacher read what the student reads while it writes, and in this data it "
                "reads something else: leave one of both out."
            )
        require_gatherable(accelerator)
        if isinstance(student, PeftModel) and student.active_peft_config.is_prompt_learning:
            raise ValueError("on_policy_share does not go with a learned prompt: train LoRA adapters, or all weights.")
        self.writer = make_writer(self.options, student, tokenizer, self.sampling, accelerator, teacher)
        self.collate, self.accelerator = collate, accelerator
        self.ends = {"student": {*self.writer.ends}, "teacher": set[int]()}
        for model in () if teacher is None or teacher.alignment is not None else teacher.models:
            ends = model.model.generation_config.eos_token_id
            own = model.tokenizer.eos_token_id if model.tokenizer is not None else None
            self.ends["teacher"] |= {own, *(ends if isinstance(ends, list) else [ends])} - {None}
        self.writer.ends.update(self.ends["teacher"])
        self.replay = Reservoir[MadeRow](self.replay_size, self._draw(4, "replay", accelerator.process_index))

    def __call__(self, coming: Iterator[list[dict[str, Any]]], step: int) -> list[dict[str, Any]]:
        """The same number of batches of the same sizes, in which written rows stand in place of others. Rows of about
        the same length stand together.
        """
        for _ in range(self._steps_read):
            next(coming, None)
        self._steps_read = 0
        learned_at, learned = self._learned
        if learned_at < step:  # a step that is called again was only tried
            self.replay.add(learned)
        if step not in self._pending:
            steps = list(itertools.islice(coming, self.steps_per_generation))
            self._pending = self._complete(dict(enumerate(steps, step)))
        micro_batches = self._pending.pop(step, [])
        rows = [made for rows in micro_batches for made in rows]
        self._ages += [step - made.written_at for made in rows if made.written_at is not None]
        if self.replay_share:
            new = [made for made in rows if made.is_written and not made.is_replayed]
            self._learned = (step, [made for made in new if any(label != IGNORED for label in made.row["labels"])])
        return [self._batch_of(rows) for rows in micro_batches]

    def _batch_of(self, rows: list[MadeRow]) -> dict[str, Any]:
        written = torch.tensor([made.is_written for made in rows])
        batch = self.collate([made.row for made in rows]) | {WRITTEN: written}
        if self.early_decay:
            batch[WEIGHTS] = weigh_early_tokens(batch["labels"], written, self.early_decay)
        return batch

    def save(self, folder: Path) -> None:
        """Keeps what was written for the steps to come, and what is for replay."""
        if self.steps_per_generation > 1 or self.replay_share:
            state = {"pending": self._pending, "learned": self._learned, "replay": self.replay.state()}
            self._file(folder).write_text(json.dumps(state))

    def load(self, folder: Path) -> None:
        """Goes on with what was written for the steps to come and with what is for replay, over as many ranks."""
        path = self._file(folder)
        if path.exists():
            state = json.loads(path.read_text())
            pending = state["pending"].items()
            self._pending = {int(step): [[MadeRow(*made) for made in rows] for rows in part] for step, part in pending}
            self._steps_read = len(self._pending)
            step, learned = state["learned"]
            self._learned = (step, [MadeRow(*made) for made in learned])
            kept = [(place, MadeRow(*made)) for place, made in state["replay"]["kept"]]
            self.replay.load(state["replay"] | {"kept": kept})
        elif any(folder.glob("written-*.json")):
            raise ValueError(
                f"{folder} has texts that the student wrote, for steps to come or for replay, over another number of "
                f"ranks than {self.accelerator.num_processes}: resume with as many as there were."
            )

    def _file(self, folder: Path) -> Path:
        return folder / f"written-{self.accelerator.process_index}-of-{self.accelerator.num_processes}.json"

    def log(self) -> dict[str, float]:
        """Of what was written since the last log, over all ranks: mean and largest length in tokens, the share that the
        limit cut, the mean share of runs of four words that a text has had before, the share of the tokens that the
        teacher replaced, if it may, and the seconds that writing took on this rank. Of its own text that it learned
        from, how many steps ago it wrote that, if it was not just then.
        """
        lengths, ages, device = self._lengths, self._ages, self.accelerator.device
        sums = torch.tensor(
            [len(lengths), sum(lengths), self._cut, self._repeated, self._replaced, len(ages), sum(ages)],
            dtype=torch.float32,
            device=device,
        )
        texts, tokens, cut, repeated, replaced, learned, age = self.accelerator.reduce(sums, "sum").tolist()
        longest = self.accelerator.gather(torch.tensor([max(lengths, default=0)], device=device)).max().item()
        seconds = self._seconds
        self._reset()
        figures = {"completion_age": age / learned} if age else {}
        if not texts:
            return figures
        if self.options.speculative_top_k:
            figures["completion_replaced_share"] = replaced / tokens
        return figures | {
            "completion_length": tokens / texts,
            "completion_max_length": longest,
            "completion_cut_share": cut / texts,
            "completion_repeated_share": repeated / texts,
            "writing_seconds": seconds,
        }

    def _reset(self) -> None:
        self._lengths: list[int] = []
        self._ages: list[int] = []
        self._cut, self._repeated, self._replaced, self._seconds = 0, 0.0, 0, 0.0

    def _complete(self, steps: dict[int, list[dict[str, Any]]]) -> dict[int, list[list[MadeRow]]]:
        """The rows of each micro-batch of these steps, written or as they came."""
        drawn, now = {step: self._draw_rows(step, batches) for step, batches in steps.items()}, min(steps, default=0)
        prompts = [prompt_of(made.row) for rows in drawn.values() for made in rows if made.is_to_write]
        seed = self._draw(4, now, self.writer.group)
        completions = iter(self._write(prompts, seed))
        micro_batches = {}
        for step, rows in drawn.items():
            rows = [
                MadeRow(self._row(made, next(completions)), True, now) if made.is_to_write else made for made in rows
            ]
            remaining = iter(sorted(rows, key=lambda made: len(made.row["input_ids"])))
            sizes = [len(batch["labels"]) * self.rows_per_row for batch in steps[step]]
            micro_batches[step] = [list(itertools.islice(remaining, size)) for size in sizes]
        return micro_batches

    def _row(self, made: MadeRow, completion: Completion) -> Row:
        """The same prompt with this completion."""
        ids = completion.ids or []
        learned = [IGNORED] * len(ids) if self.masks_cut and not completion.finished else ids
        return replace_completion(made.row, ids, learned)

    def _draw_rows(self, step: int, batches: list[dict[str, Any]]) -> list[MadeRow]:
        """The rows of a step: the dataset's, those that are to be written, and those from replay in place of some of
        these. Which, is a draw by prompt that is the same on every rank.
        """
        rows = [row for batch in batches for row in rows_of(batch) for _ in range(self.rows_per_row)]
        before = iter(self.replay.sample(len(rows), step) if self.replay_share else ())
        drawn = []
        for number, row in enumerate(rows):
            chance = self._draw(8, step, number % self.rows_per_row, prompt_of(row)) / 2**64
            replayed = next(before, None) if chance < self.share * self.replay_share else None
            drawn.append(replayed._replace(is_replayed=True) if replayed else MadeRow(row, chance < self.share))
        return drawn

    def _draw(self, size: int, *parts: Any) -> int:
        """A number of so many bytes, of the seed and what else there is."""
        return draw(size, self.seed, *parts)

    def _write(self, prompts: list[list[int]], seed: int) -> list[Completion]:
        """One completion after each prompt."""
        longest, context = max(map(len, prompts), default=0) + self.sampling.max_new_tokens, self.writer.max_length
        if context is not None and longest > context:
            raise ValueError(
                f"a prompt of {longest - self.sampling.max_new_tokens:,} tokens and max_completion_length="
                f"{self.sampling.max_new_tokens} are more than the student's context of {context:,}: set it to "
                "less, or leave such prompts out."
            )
        began = time.perf_counter()
        completions = self.writer.write(prompts, seed)
        self._lengths += [completion.tokens for completion in completions]
        self._cut += sum(not completion.finished for completion in completions)
        self._repeated += sum(repeated_share(completion.text) for completion in completions)
        self._replaced += sum(completion.extra["replaced"] for completion in completions if completion.extra)
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
    ways = ["sampling_temperature", "top_p", "top_k", "repetition_penalty"]
    ways += ["steps_per_generation", "replay_share", "speculative_top_k"]
    if changed := [name for name in ways if is_chosen(args, name)]:
        raise ValueError(
            f"{who} gives the reverse KL's gradient where the student of this very step samples from its own "
            f"distribution: leave out {', '.join(changed)}, or have it tell its top k."
        )
