"""A few texts through student and teacher, as training would take them, leaving no trace."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTTrainer

from llm_distill.check.memory import checkpoint_activations
from llm_distill.heads import LMHead
from llm_distill.models import hidden_of_counted_rows, vocabulary_size
from llm_distill.rows import SIGNAL, counted_rows, examples_of
from llm_distill.signals import HiddenSignal

TEXTS = 64
"""Looked at, over all ranks."""
SECONDS = 10.0
"""After which no further batch is run, in each of the two measurements."""
TIMED = 3
"""Micro-batches, the first of which warms up."""


@dataclass
class Sample:
    """Of the texts that one rank looks at."""

    texts: int = 0
    lengths: list[int] = field(default_factory=list)
    """Tokens of each text."""
    tokens: int = 0
    counted: int = 0
    ends: int = 0
    """Counted labels that are the end-of-text token,"""
    ends_seen: int = 0
    """of so many of these tokens that a label could be."""
    silent: int = 0
    """Texts in which nothing counts."""
    losses: list[tuple[float, float, int]] = field(default_factory=list)
    """Of each text: the sums of the teacher's and the student's cross-entropies, in nats, and over how many tokens."""
    student_loss: tuple[float, int] = (0.0, 0)
    """Its sum, and over how many tokens, where there is no teacher to compare with too."""
    divergence_from_itself: float | None = None
    """The largest of the objective's divergence and the KL, student against student, in nats a token."""
    seconds: list[float] = field(default_factory=list)
    """Of a micro-batch forward and backward, the teacher's with it."""

    @classmethod
    def of_ranks(cls, samples: Sequence[Sample]) -> Sample:
        """All that was seen; of times, the slowest rank's, for which the others wait."""
        sums = {
            name: sum(getattr(sample, name) for sample in samples)
            for name in ("texts", "tokens", "counted", "ends", "ends_seen", "silent")
        }
        return cls(
            **sums,
            lengths=[length for sample in samples for length in sample.lengths],
            losses=[loss for sample in samples for loss in sample.losses],
            student_loss=(sum(s.student_loss[0] for s in samples), sum(s.student_loss[1] for s in samples)),
            divergence_from_itself=max(
                (s.divergence_from_itself for s in samples if s.divergence_from_itself is not None), default=None
            ),
            seconds=max((sample.seconds for sample in samples), key=sum),
        )


@contextmanager
def leaving_no_trace(trainer: SFTTrainer) -> Iterator[None]:
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


def rows_of(trainer: SFTTrainer) -> list[Any]:
    """The rank's share of texts from all over the training data; of a stream, of the first ones."""
    data, rank, ranks = trainer.train_dataset, trainer.accelerator.process_index, trainer.accelerator.num_processes
    if isinstance(data, Dataset):
        chosen = [data[int(i)] for i in np.linspace(0, len(data) - 1, min(TEXTS, len(data))).astype(int)]
    else:
        chosen = list(itertools.islice(data, TEXTS))
    return chosen[rank::ranks] or chosen[:1]


def look(trainer: SFTTrainer, rows: list[Any]) -> tuple[Sample, list[Any]]:
    """What the texts are, without a model; and the micro-batches that they make. Raises ValueError where a stored
    teacher lacks one of them.
    """
    found, size = Sample(texts=len(rows)), trainer.args.per_device_train_batch_size
    end = trainer.processing_class.eos_token_id
    end = -1 if end is None else end  # no token's id
    batches = []
    for start in range(0, len(rows), size):
        batch = trainer.collate(rows[start : start + size])
        labels, ids = batch["labels"], batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
        found.tokens += int(mask.sum())
        targets = counted_rows(labels).targets
        found.counted += len(targets)
        found.ends += int((targets == end).sum())
        found.ends_seen += int((mask & (ids == end))[:, 1:].sum())
        found.silent += int((labels[:, 1:] == -100).all(1).sum())
        reading = trainer.teacher is not None and trainer.teacher.reader is not None and trainer.objective.kd_weight
        batches.append(trainer.data_collator(rows[start : start + size]) if reading else batch)
    found.lengths = [len(row["input_ids"]) for row in rows if "input_ids" in row]
    return found, batches


@torch.no_grad()
def listen(trainer: SFTTrainer, batches: list[Any], found: Sample) -> None:
    """Adds what student and teacher lose on the texts, and the student beside itself."""
    head = LMHead.of(trainer.model, vocabulary_size(trainer.processing_class))
    trainer.model.eval()
    began = time.perf_counter()
    for batch in batches:
        inputs = on_device(batch, trainer.accelerator.device)
        rows = counted_rows(inputs["labels"])
        if not len(rows.targets):
            continue
        with trainer.accelerator.autocast():
            hidden = hidden_of_counted_rows(trainer.model, head, inputs)
            if found.divergence_from_itself is None and trainer.objective.kd_weight:
                own = HiddenSignal(hidden, head)
                _, metrics = trainer.objective(hidden, head, rows.targets, own, None)
                found.divergence_from_itself = max(abs(float(metrics[name].mean())) for name in ("kd", "kl"))
            signal = None if trainer.teacher is None else trainer.teacher.score(inputs)
            _, metrics = trainer.objective(hidden, head, rows.targets, signal, None)
        student = metrics["ce"].double()
        total, count = found.student_loss
        found.student_loss = total + float(student.sum()), count + len(student)
        if "teacher_ce" in metrics:
            texts = [example.rows for example in examples_of({n: v for n, v in inputs.items() if n != SIGNAL})]
            pairs = zip(metrics["teacher_ce"].double().split(texts), student.split(texts), strict=True)
            found.losses += [(float(t.sum()), float(s.sum()), len(s)) for t, s in pairs]
        if time.perf_counter() - began > SECONDS:
            break


def stopwatch(trainer: SFTTrainer, batches: list[Any], found: Sample) -> None:
    """Adds how long micro-batches take. Their gradients are thrown away."""
    trainer.model.train()
    args = trainer.args
    if args.gradient_checkpointing and not trainer.model.is_activation_checkpointing:
        checkpoint_activations(trainer.model, args)
    seconds: list[float] = []
    for batch in itertools.islice(itertools.cycle(batches), TIMED):
        began = now(trainer.accelerator.device)
        with trainer.compute_loss_context_manager(), trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, on_device(batch, trainer.accelerator.device))
        loss.backward()
        trainer.model.zero_grad(set_to_none=True)
        seconds.append(now(trainer.accelerator.device) - began)
        if sum(seconds) > SECONDS:
            break
    found.seconds = seconds[1:] or seconds


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def on_device(batch: Any, device: torch.device) -> Any:
    """Its tensors, and those of the stored signal in it."""
    if isinstance(batch, Mapping):
        return {name: on_device(part, device) for name, part in batch.items()}
    return batch.to(device) if isinstance(batch, Tensor) else batch


def difference(losses: list[tuple[float, float, int]]) -> tuple[float, float, float, float]:
    """(teacher's loss, student's, teacher's − student's, its standard error), in nats a token, paired by text."""
    tokens = sum(n for _, _, n in losses)
    teacher, student = (sum(each[side] for each in losses) / tokens for side in (0, 1))
    mean, k = teacher - student, len(losses)
    squares = sum((t - s - mean * n) ** 2 for t, s, n in losses)
    return teacher, student, mean, math.sqrt(squares * k / (k - 1)) / tokens if k > 1 else math.inf
