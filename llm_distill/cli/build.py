"""What the options of a command describe, loaded: a trainer, or a teacher with the texts that it is asked about."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_distill.data.load import load_data

if TYPE_CHECKING:
    from trl import ModelConfig, ScriptArguments

    from llm_distill.config import DistillationConfig
    from llm_distill.data.earlier import EarlierTexts
    from llm_distill.data.prepare import PreparedData
    from llm_distill.models import LanguageModel
    from llm_distill.teachers import Teacher
    from llm_distill.trainer import DistillationTrainer


def require_free_folder(
    script: ScriptArguments, args: DistillationConfig, model: ModelConfig, *, is_new: bool = True
) -> None:
    """Raises ValueError, before anything is loaded, if the student would be written over something.

    Args:
        is_new: the run begins anew, and does not go on in the folder.
    """
    from llm_distill.publish.folder import require_output_folder, require_unused

    inputs = {
        "the student": model.model_name_or_path,
        "the teacher": args.teacher_model_name_or_path,
        "the teacher_cache": args.teacher_cache,
        "the dataset": script.dataset_name,
    }
    for number, teacher in enumerate(args.teachers or ()):
        assert isinstance(teacher, dict), "it is parsed"
        inputs[f"teachers[{number}]"] = teacher.get("cache") or teacher.get("model")
    require_output_folder(args.output_dir, inputs)
    if is_new:
        require_unused(Path(args.output_dir))


def build_trainer(
    script: ScriptArguments,
    args: DistillationConfig,
    model: ModelConfig,
    teacher: Teacher | None = None,
    earlier: EarlierTexts | None = None,
) -> DistillationTrainer:
    """The trainer that the options describe, with their teacher or another one, perhaps on earlier texts too.

    Raises:
        ValueError: something is missing, cannot be loaded or does not fit together.
    """
    train, evaluation = _load_splits(script, args, model)
    train = train if earlier is None else earlier.add_to(train)
    from trl import get_peft_config, get_quantization_config

    from llm_distill.trainer import DistillationTrainer

    args.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(args.model_init_kwargs or {}),
    }
    return DistillationTrainer(
        model=model.model_name_or_path,
        teacher=teacher,
        args=args,
        train_dataset=train,
        eval_dataset=evaluation,
        quantization_config=get_quantization_config(model),
        peft_config=get_peft_config(model),
    )


def build_capture(
    script: ScriptArguments, args: DistillationConfig, model: ModelConfig
) -> tuple[Teacher, PreparedData]:
    """The teacher that the options name, and the texts in the student's tokens. The student's weights stay where they
    are.

    Raises:
        ValueError: something is missing or cannot be loaded.
    """
    args.teacher_cache, args.on_miss = None, "error"
    if args.teacher_ema_decay is not None:
        raise ValueError("teacher_ema_decay: the student's average changes while it is trained, and is not captured.")
    if args.teacher_codistilled is not None:
        raise ValueError("teacher_codistilled: other runs change while this one is trained, and are not captured.")
    if args.teacher_adapters_off:  # the teacher is a part of the student
        trainer = build_trainer(script, args, model)
        assert trainer.teacher is not None, "or its options were refused"
        return trainer.teacher, trainer.data
    train, evaluation = _load_splits(script, args, model)
    from llm_distill.data.prepare import prepare
    from llm_distill.teachers import make_teacher

    data = prepare(_load_tokenizer(args, model), args, train, evaluation)
    teacher = make_teacher(None, args, is_needed=True, trust_remote_code=args.trust_remote_code)
    assert teacher is not None, "it is needed"
    return teacher, data


def load_student(data: PreparedData, model: ModelConfig) -> LanguageModel:
    """The student of a capture, at whose place its fidelity is measured."""
    from llm_distill.models import LanguageModel, vocabulary_size

    student = LanguageModel.load(
        model.model_name_or_path,
        revision=model.model_revision,
        trust_remote_code=data.args.trust_remote_code,
        dtype=model.dtype,
    )
    if student.head.vocab_size < vocabulary_size(data.tokenizer):  # a cloned chat template has added tokens
        student.model.resize_token_embeddings(vocabulary_size(data.tokenizer))
    student.tokenizer = data.tokenizer
    return student


def _load_splits(script: ScriptArguments, args: DistillationConfig, model: ModelConfig) -> tuple[Any, Any]:
    """The texts to learn from, and those to evaluate on, if there are some."""
    if not model.model_name_or_path:
        raise ValueError("--model_name_or_path is missing: the student, a Hub id or a folder.")
    if not script.dataset_name:
        raise ValueError("--dataset_name is missing: a Hub id, a folder, a file, or `stdlib`.")
    dataset = load_data(script, partial(_load_tokenizer, args, model))
    evaluation = dataset.get(script.dataset_test_split)
    if evaluation is None and args.eval_strategy != "no":
        raise ValueError(
            f"eval_strategy={args.eval_strategy} needs the split {script.dataset_test_split!r} in "
            f"{script.dataset_name!r}, which has only {', '.join(dataset)}. Name another with --dataset_test_split."
        )
    return dataset[script.dataset_train_split], evaluation


def _load_tokenizer(args: DistillationConfig, model: ModelConfig) -> Any:
    from llm_distill.loading import load_tokenizer

    return load_tokenizer(
        model.model_name_or_path, revision=model.model_revision, trust_remote_code=args.trust_remote_code
    )
