"""What a student may be given as, and its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import transformers
from accelerate.parallelism_config import ParallelismConfig
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl.trainer.utils import create_model_from_path

from llm_distill.config import DistillationConfig
from llm_distill.loading import find_adapters, hub_options, load_config, load_model, load_tokenizer, tokenizer_in


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


def require_finite(model: PreTrainedModel | PeftModel) -> None:
    """Raises ValueError, naming the weight, if one that is trained is not finite."""
    for name, weight in model.named_parameters():
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        if weight.requires_grad and not local.isfinite().all():
            raise ValueError(
                f"the student's {name} has NaN or infinity in it, so the student is neither trained nor saved. Was "
                "learning_rate too high? A checkpoint from before may be whole."
            )


def name_of(model: Any) -> str:
    """What it was loaded from; nothing for one that was made from a configuration."""
    return model if isinstance(model, str) else model.config._name_or_path


def revision_of(args: DistillationConfig) -> str | None:
    """The branch, tag or commit that a student is loaded from."""
    return (args.model_init_kwargs or {}).get("revision")


def load_student(
    name: str, args: DistillationConfig, quantization_config: Any, peft_config: Any
) -> PreTrainedModel | PeftModel:
    """As `SFTTrainer` loads a student by its name, but whole. Of a folder of adapters, these are trained on.

    Raises:
        ValueError: it cannot be loaded, or lacks weights; adapters, and a `peft_config` for further ones.
    """
    options = {"trust_remote_code": args.trust_remote_code, **(args.model_init_kwargs or {})}
    if quantization_config is not None:
        if "quantization_config" in options:
            raise ValueError("there are two quantization_config, one of them in model_init_kwargs: give one.")
        options["quantization_config"] = quantization_config
    if args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
        options["device_map"] = None
    if find_adapters(name, **options) is not None and peft_config is not None:
        raise ValueError(
            f"the student {name!r} is a folder of adapters, which are trained on, and there is a peft_config for new "
            "ones: leave it out (--use_peft), or merge the adapters into their model and begin from that."
        )
    named = (load_config(name, args.trust_remote_code, **hub_options(options)).architectures or [""])[0]
    architecture = getattr(transformers, named, None)
    if not named or (architecture is not None and not architecture.can_generate()):  # a backbone, a classifier
        options["architecture"] = AutoModelForCausalLM
    set_seed(args.seed)  # as SFTTrainer does before it loads
    return load_model(name, load=create_model_from_path, is_trainable=True, **options)


@contextmanager
def loading_options_taken(args: DistillationConfig) -> Iterator[None]:
    """Inside, `args` do not say how to load a student: `SFTTrainer` would warn that it has one."""
    options, args.model_init_kwargs = args.model_init_kwargs, None
    try:
        yield
    finally:
        args.model_init_kwargs = options


def student_tokenizer(processing_class: Any, model: Any, args: DistillationConfig) -> PreTrainedTokenizerBase:
    """The one that is given, that of a processor, or else the student's own.

    Raises:
        ValueError: there is none beside it.
        TypeError: something else was given.
    """
    if processing_class is not None:
        return tokenizer_in(processing_class, "processing_class")
    name, revision = name_of(model), revision_of(args) if isinstance(model, str) else None
    try:
        return load_tokenizer(name, revision=revision, trust_remote_code=args.trust_remote_code)
    except ValueError as error:
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
