"""What a student may be given as, and its tokenizer."""

from __future__ import annotations

from typing import Any

from accelerate.parallelism_config import ParallelismConfig
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from llm_distill.config import DistillationConfig


def require_student(model: Any, args: Any, quantization_config: Any) -> None:
    """Raises:
    TypeError: something that is no student, or no configuration.
    ValueError: options for loading a student that is loaded.
    """
    if not isinstance(args, DistillationConfig):
        raise TypeError(f"args must be a DistillationConfig, got {type(args).__name__}.")
    if not isinstance(model, str | PreTrainedModel | PeftModel):
        raise TypeError(f"model must be a name, a PreTrainedModel or a PeftModel, got {type(model).__name__}.")
    if not isinstance(model, str) and (args.model_init_kwargs or quantization_config is not None):
        raise ValueError("model_init_kwargs and quantization_config would have no effect: the student is loaded.")


def name_of(model: Any) -> str:
    """What it was loaded from; nothing for one that was made from a configuration."""
    return model if isinstance(model, str) else model.config._name_or_path


def revision_of(args: DistillationConfig) -> str | None:
    """The branch, tag or commit that a student is loaded from."""
    return (args.model_init_kwargs or {}).get("revision")


def load_tokenizer(model: Any, args: DistillationConfig) -> PreTrainedTokenizerBase:
    """The student's own.

    Raises:
        ValueError: there is none beside it.
    """
    name, revision = name_of(model), revision_of(args) if isinstance(model, str) else None
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer can be loaded for the student {name!r}: pass processing_class=..., or check the name, "
            f"HF_TOKEN for a gated repository, HF_HUB_OFFLINE. ({error})"
        ) from error


def require_supported(
    model: PreTrainedModel | PeftModel, num_gpus: int, padding_free: bool, parallelism: ParallelismConfig | None
) -> None:
    """Raises ValueError for a way to train that would go wrong unseen."""
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError("context and sequence parallelism cut labels apart in time, which is not supported yet.")
    if num_gpus > 1:
        raise ValueError(
            f"one process sees {num_gpus} GPUs and would copy the student by DataParallel, which is not supported. "
            "Start one process a GPU (accelerate launch), or choose one with CUDA_VISIBLE_DEVICES=0."
        )
    peft = model.active_peft_config if isinstance(model, PeftModel) else None
    if padding_free and getattr(peft, "is_prompt_learning", False):
        raise ValueError(
            "a learned prompt (prompt or prefix tuning) does not go with packing or padding_free: PEFT drops the "
            "positions, so that the student would read across documents. Use LoRA, or packing=False."
        )
