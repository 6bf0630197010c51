"""Sequence-level distillation: the teacher writes, filters keep, provenance is recorded."""

from llm_distill.generation.engines import Engine, Sampling, TransformersEngine
from llm_distill.generation.filters import FILTERS, make_filters
from llm_distill.generation.generate import Report, generate, load_generated
from llm_distill.generation.prompts import Prompt, make_prompt, prompts_of

__all__ = [
    "FILTERS",
    "Engine",
    "Prompt",
    "Report",
    "Sampling",
    "TransformersEngine",
    "generate",
    "load_generated",
    "make_filters",
    "make_prompt",
    "prompts_of",
]
