"""A few texts through student and teacher, as training would take them, leaving no trace."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import send_to_device
from trl import SFTTrainer

from llm_distill import machine
from llm_distill.check.memory import checkpoint_activations
from llm_distill.data.on_policy_rows import prompt_of, rows_of
from llm_distill.data.prepare import spread_rows
from llm_distill.heads import LMHead
from llm_distill.models import kept_of, vocabulary_size
from llm_distill.rows import IGNORED, View, examples_of
from llm_distill.signals import HiddenSignal

TEXTS = 64
"""Looked at, over all ranks."""
SECONDS = 10.0
"""After which no further batch is run, in each of the two measurements."""
TIMED = 3
"""Micro-batches, the first of which warms up."""


class TextLoss(NamedTuple):
    """Sums over the tokens of one text, in nats."""

    teacher: float
    student: float
    tokens: int


@dataclass
class SampledTexts:
    """What is seen of the texts that one rank looks at."""

    texts: int = 0
    tokens: int = 0
    counted: int = 0
    ends: int = 0
    """Counted labels that are the end-of-text token."""
    ends_seen: int = 0
    """End-of-text tokens that a label could be."""
    silent: int = 0
    """Texts in which nothing counts."""
    student_loss: float = 0.0
    """The student's cross-entropy, summed over `student_tokens`, where there is no teacher to compare with too."""
    student_tokens: int = 0
    outside_mass: float = 0.0
    """The student's mass on rows of its matrix that no token has, summed over the same tokens."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each text."""
    losses: list[TextLoss] = field(default_factory=list)
    self_divergence: list[float] = field(default_factory=list)
    """The largest of the objective's divergence and the KL, student against student, in nats a token."""
    seconds: list[float] = field(default_factory=list)
    """Of a micro-batch forward and backward, the teacher's with it."""
    writing_seconds: float = 0.0
    """Of the texts that the student writes for a micro-batch, of those that are written at once."""
    prompts: list[int] = field(default_factory=list)
    """Tokens before the first that counts, of each text after which the student writes."""

    @classmethod
    def of_ranks(cls, samples: Sequence[SampledTexts]) -> SampledTexts:
        """All that was seen; of times, the slowest rank's, for which the others wait."""
        merged = samples[0]
        for sample in samples[1:]:
            seconds = max(merged.seconds, sample.seconds, key=sum)
            values = {f.name: getattr(merged, f.name) + getattr(sample, f.name) for f in fields(cls)}
            writing = max(merged.writing_seconds, sample.writing_seconds)
            merged = cls(**(values | {"seconds": seconds, "writing_seconds": writing}))
        return merged


@contextmanager
def restoring_state(trainer: SFTTrainer) -> Iterator[None]:
    """Random states, modes and gradients are afterwards what they were."""
    model = trainer.model
    modes = {module: module.training for module in model.modules()}
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    python, numpy = random.getstate(), np.random.get_state()
    checkpoints = trainer.args.gradient_checkpointing and not model.is_activation_checkpointing
    device = trainer.accelerator.device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for parameter, _ in gradients:
                parameter.grad = None
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for module, mode in modes.items():
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        if checkpoints:
            model.activation_checkpointing_disable()


def sample_rows(trainer: SFTTrainer) -> list[Any]:
    """The rank's share of texts from all over the training data; of a stream, of the first ones."""
    trainer.stream_counts.reset()
    rows, accelerator = spread_rows(trainer.train_dataset, TEXTS), trainer.accelerator
    return rows[accelerator.process_index :: accelerator.num_processes] or rows[:1]


def read_texts(trainer: SFTTrainer, rows: list[Any]) -> tuple[SampledTexts, list[Any]]:
    """What the texts are, without a model; and the micro-batches that they make. Raises ValueError where a stored
    teacher lacks one of them.
    """
    sample, size = SampledTexts(texts=len(rows)), trainer.args.per_device_train_batch_size
    end = trainer.processing_class.eos_token_id
    end = -1 if end is None else end  # no token's id
    batches = []
    for start in range(0, len(rows), size):
        batch = trainer.collate(rows[start : start + size])
        labels, ids = batch["labels"], batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        sample.tokens += int(mask.sum())
        targets = View.of(batch).positions.targets
        sample.counted += len(targets)
        sample.ends += int((targets == end).sum())
        sample.ends_seen += int((mask & (ids == end))[:, 1:].sum())
        sample.silent += int((labels[:, 1:] == IGNORED).all(1).sum())
        if trainer.policy.writes:
            sample.prompts += [len(prompt_of(row)) for row in rows_of(batch)]
        batches.append(trainer.data_collator(rows[start : start + size]))
    sample.lengths = [len(row["input_ids"]) for row in rows if "input_ids" in row]
    return sample, batches


@torch.no_grad()
def measure_losses(trainer: SFTTrainer, batches: list[Any], sample: SampledTexts) -> None:
    """Adds what student and teacher lose on the texts, and the student beside itself."""
    head, loss = LMHead.of(trainer.model, vocabulary_size(trainer.processing_class)), trainer.objective.head
    trainer.model.eval()
    began = time.perf_counter()
    for batch in batches:
        view, read = (make(batch).to(trainer.accelerator.device) for make in (View.of, View.of_teacher))
        if not len(view.positions.targets):
            continue
        with trainer.accelerator.autocast():
            student = kept_of(trainer.model, head, view)
            if not sample.self_divergence and loss.kd_weight:
                _, values = loss(student, HiddenSignal(*student), view.positions, None)
                sample.self_divergence = [max(abs(float(values[name].mean())) for name in ("kd", "kl"))]
            signal = None if trainer.teacher is None else trainer.teacher.score(read)
            _, values = loss(student, signal, view.positions, None)
        ce = values["ce"].double()
        sample.student_loss += float(ce.sum())
        sample.student_tokens += len(ce)
        if "outside_mass" in values:
            sample.outside_mass += float(values["outside_mass"].sum())
        if "teacher_ce" in values:
            texts = [example.rows for example in examples_of(view)]
            pairs = zip(values["teacher_ce"].double().split(texts), ce.split(texts), strict=True)
            known = ((t, s, ~t.isnan()) for t, s in pairs)  # in other tokens, it does not speak of all
            losses = (TextLoss(float(t[of].sum()), float(s[of].sum()), int(of.sum())) for t, s, of in known)
            sample.losses += [loss for loss in losses if loss.tokens]
        if time.perf_counter() - began > SECONDS:
            break


def time_steps(trainer: SFTTrainer, rows: list[Any], batches: list[Any], sample: SampledTexts) -> None:
    """Adds how long micro-batches take, and what is written for them. Their gradients are thrown away."""
    trainer.model.train()
    args, device = trainer.args, trainer.accelerator.device
    if args.gradient_checkpointing and not trainer.model.is_activation_checkpointing:
        checkpoint_activations(trainer.model, args)
    seconds: list[float] = []
    policy, size, at_once = trainer.policy, args.per_device_train_batch_size, len(batches)
    if policy.writes:
        size //= policy.rows_per_row
        at_once = min(TIMED, args.gradient_accumulation_steps * args.steps_per_generation)
        batches = [trainer.collate(rows[start : start + size]) for start in range(0, len(rows), size)]
    batches, read = [], batches[:at_once]

    def write() -> None:
        batches.extend(policy(iter([read]), trainer.state.global_step))

    sample.writing_seconds = machine.seconds(write, device) / len(read)

    def step(batch: Any) -> None:
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, send_to_device(batch, device))
        loss.backward()
        trainer.model.zero_grad(set_to_none=True)

    for batch in itertools.islice(itertools.cycle(batches), TIMED):
        seconds.append(machine.seconds(partial(step, batch), device))
        if sum(seconds) > SECONDS:
            break
    sample.seconds = seconds[1:] or seconds


class Difference(NamedTuple):
    """Losses in nats a token, paired by text."""

    teacher: float
    student: float
    mean: float
    """The teacher's less the student's."""
    standard_error: float


def paired_difference(losses: list[TextLoss]) -> Difference:
    """How much less the teacher loses, and how sure that is."""
    tokens, texts = sum(loss.tokens for loss in losses), len(losses)
    teacher, student = (sum(losses) / tokens for losses in ([x.teacher for x in losses], [x.student for x in losses]))
    mean = teacher - student
    squares = sum((loss.teacher - loss.student - mean * loss.tokens) ** 2 for loss in losses)
    error = math.sqrt(squares * texts / (texts - 1)) / tokens if texts > 1 else math.inf
    return Difference(teacher, student, mean, error)
