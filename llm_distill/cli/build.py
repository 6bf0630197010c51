"""The trainer that the options of a command describe."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from llm_distill.data.load import load_data

if TYPE_CHECKING:
    from trl import ModelConfig, ScriptArguments

    from llm_distill.config import DistillationConfig
    from llm_distill.trainer import DistillationTrainer


def build_trainer(script: ScriptArguments, args: DistillationConfig, model: ModelConfig) -> DistillationTrainer:
    """The trainer that the options describe.

    Raises:
        ValueError: something is missing, cannot be loaded or does not fit together.
    """
    if not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing: the student, a Hub id or a folder.")
    if not script.dataset_name:
        raise ValueError("--dataset_name is missing: a Hub id, a folder, a file, or `stdlib`.")
    from transformers import AutoTokenizer
    from trl import get_peft_config, get_quantization_config

    from llm_distill.trainer import DistillationTrainer

    tokenizer = partial(
        AutoTokenizer.from_pretrained,
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=args.trust_remote_code,
    )
    dataset = load_data(script, tokenizer)
    evaluation = dataset.get(script.dataset_test_split)
    if evaluation is None and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy} needs the split {script.dataset_test_split!r} in "
            f"{script.dataset_name!r}, which has only {', '.join(dataset)}. Name another with --dataset_test_split."
        )
    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    return DistillationTrainer(
        model=model.model_name_or_path,
        args=args,
        train_dataset=dataset[script.dataset_train_split],
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )
