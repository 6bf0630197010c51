"""The engine that a configuration names."""

from __future__ import annotations

from llm_distill.generation.config import GenerateConfig
from llm_distill.generation.engines.base import Engine
from llm_distill.generation.engines.endpoint import EndpointEngine
from llm_distill.generation.engines.transformers import TransformersEngine
from llm_distill.generation.engines.vllm import VLLMEngine
from llm_distill.generation.journal import JournalEntries
from llm_distill.loading import load_tokenizer
from llm_distill.models import LanguageModel, describe_checkpoint
from llm_distill.ranks import ranks


def make_engine(config: GenerateConfig) -> Engine:
    """Raises ValueError if its teacher cannot be had, or what it needs is not installed."""
    name, revision, sampling = config.teacher_model_name_or_path, config.teacher_model_revision, config.sampling()
    if not name:
        raise ValueError(
            "--teacher_model_name_or_path is missing: who writes, a Hub id, a folder or an endpoint's model."
        )
    if config.engine == "endpoint":
        assert config.endpoint_url is not None, "GenerateConfig has seen to it"
        return EndpointEngine(
            config.endpoint_url,
            name,
            sampling,
            concurrency=config.concurrency,
            prices=config.prices(),
            spent=JournalEntries(config.output_dir).cost,
            timeout=config.request_timeout,
            max_retries=config.max_retries,
            log_probs=config.log_probs,
        )
    if config.engine == "vllm":
        assert isinstance(config.vllm_kwargs, dict), "GenerateConfig has parsed it"
        return VLLMEngine(
            name,
            load_tokenizer(name, revision=revision),
            sampling,
            description=describe_checkpoint(name, revision=revision),
            score=config.log_probs,
            **{"revision": revision, **config.vllm_kwargs},
        )
    assert isinstance(config.teacher_model_init_kwargs, dict), "GenerateConfig has parsed it"
    teacher = LanguageModel.load(
        name,
        revision=revision,
        load_in_4bit=config.teacher_load_in_4bit,
        load_in_8bit=config.teacher_load_in_8bit,
        **config.teacher_model_init_kwargs,
    )
    if getattr(teacher.model, "hf_device_map", None) is None:  # as it has where it is quantised
        teacher.model.to(ranks().device)
    return TransformersEngine(
        teacher,
        sampling,
        batch_size=config.batch_size,
        score=config.log_probs,
        continuous=config.continuous_batching,
    )
