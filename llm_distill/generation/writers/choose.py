"""The writer that a configuration names."""

from __future__ import annotations

from importlib.util import find_spec

from accelerate import Accelerator
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_distill.generation.engines.base import Sampling
from llm_distill.generation.options import OnPolicyOptions
from llm_distill.generation.writers.base import Writer
from llm_distill.generation.writers.speculative import SpeculativeWriter
from llm_distill.generation.writers.transformers import TransformersWriter
from llm_distill.generation.writers.vllm import VLLMWriter
from llm_distill.teachers import Teacher


def require_installed(options: OnPolicyOptions) -> None:
    """Raises ValueError if what is to write is not installed."""
    if options.use_vllm and find_spec("vllm") is None:
        raise ValueError(
            "use_vllm needs vLLM in this environment, in a version that TRL knows: pip install 'trl[vllm]'. Or leave "
            "it out: then the student writes by transformers' generate."
        )


def make_writer(
    options: OnPolicyOptions,
    student: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    accelerator: Accelerator,
    teacher: Teacher | None,
) -> Writer:
    """Raises ValueError for a student that it cannot write as, or a teacher that cannot write with it."""
    if options.use_vllm:
        return VLLMWriter(student, tokenizer, sampling, accelerator, options)
    if k := options.speculative_top_k:
        block = options.speculative_tokens
        return SpeculativeWriter(student, tokenizer, sampling, accelerator, teacher=teacher, top_k=k, block=block)
    return TransformersWriter(student, tokenizer, sampling, accelerator)
