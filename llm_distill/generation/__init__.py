"""Sequence-level distillation: the teacher writes, filters keep, provenance is recorded."""

from llm_distill.generation.engines.base import Engine, Sampling
from llm_distill.generation.engines.transformers import TransformersEngine
from llm_distill.generation.filters import FILTERS, make_filters
from llm_distill.generation.prompts import Prompt, make_prompt, prompts_of
from llm_distill.generation.run import GenerationReport, generate, load_generated

__all__ = [
    "FILTERS",
    "Engine",
    "GenerationReport",
    "Prompt",
    "Sampling",
    "TransformersEngine",
    "generate",
    "load_generated",
    "make_filters",
    "make_prompt",
    "prompts_of",
]
