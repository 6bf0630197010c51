"""The student itself writes, by transformers' `generate`."""

from __future__ import annotations

import dataclasses

import torch

from llm_distill.generation.engines.base import Completion
from llm_distill.generation.writers.base import Writer
from llm_distill.models import evaluating
from llm_distill.students.gathered import gathered


class TransformersWriter(Writer):
    """What is sharded is gathered for as long as it writes."""

    def write(self, prompts: list[list[int]], seed: int) -> list[Completion]:
        model, device = self.engine.author.model, self.accelerator.device
        self.engine.sampling = dataclasses.replace(self.engine.sampling, seed=seed)
        with (
            evaluating(model),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            self.accelerator.autocast(),
            gathered(self.student, self.accelerator),
        ):
            written = dict(self.engine.complete(prompts))
        return [only for _, (only,) in sorted(written.items())]
