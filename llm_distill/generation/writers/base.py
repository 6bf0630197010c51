"""The interface of all who write for a student in training."""

from __future__ import annotations

from abc import ABC, abstractmethod

from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_distill.generation.engines.base import Completion, Sampling
from llm_distill.generation.engines.transformers import TransformersEngine
from llm_distill.heads import base_of
from llm_distill.models import LanguageModel


class Writer(ABC):
    """Writes after prompts as the student would that is trained at this moment."""

    def __init__(
        self,
        student: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        accelerator: Accelerator,
    ) -> None:
        self.student, self.accelerator = student, accelerator
        self.engine = TransformersEngine(LanguageModel(base_of(student), tokenizer), sampling)

    @property
    def ends(self) -> set[int]:
        """The tokens with which a text is over. More may be added."""
        return self.engine.ends

    @property
    def max_length(self) -> int | None:
        """The most tokens of a prompt and what follows it."""
        return self.engine.max_length

    @property
    def group(self) -> int:
        """Which ranks this one writes together with, and so from the same seed."""
        return self.accelerator.process_index

    @abstractmethod
    def write(self, prompts: list[list[int]], seed: int) -> list[Completion]:
        """One completion after each prompt, in their order. All ranks call it at once, also one without prompts.
        Nothing else that is random, such as dropout, notices.
        """
