"""The teacher that a configuration names: live, without adapters, averaged, of other runs, served, or from a cache."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from llm_distill.cache import TeacherCache
from llm_distill.models import describe_checkpoint
from llm_distill.teachers.adapters_off import AdaptersOffTeacher
from llm_distill.teachers.base import Teacher
from llm_distill.teachers.cached import CachedTeacher, require_same_teacher
from llm_distill.teachers.codistilled import CodistilledTeacher
from llm_distill.teachers.ema import EMATeacher
from llm_distill.teachers.live import LiveTeacher
from llm_distill.teachers.options import TeacherOptions
from llm_distill.teachers.served import ServedTeacher


def make_teacher(
    teacher: str | PreTrainedModel | Teacher | None,
    args: TeacherOptions,
    *,
    is_needed: bool,
    trust_remote_code: bool = False,
) -> Teacher | None:
    """What `DistillationTrainer`'s argument or its configuration names; each option must have something to act on.

    Raises:
        ValueError: two teachers, none where one is needed, options without effect, or a cache that another one made.
        TypeError: something that is no teacher.
    """
    assert isinstance(args.teacher_model_init_kwargs, dict), "it is parsed"
    name = teacher if isinstance(teacher, str) else args.teacher_model_name_or_path if teacher is None else None
    if teacher is not None and args.teacher_model_name_or_path not in (None, teacher):
        given = repr(teacher) if isinstance(teacher, str) else f"a {type(teacher).__name__}"
        raise ValueError(
            f"there are two teachers, teacher={given} and teacher_model_name_or_path="
            f"{args.teacher_model_name_or_path!r}: give one. For several at once, EnsembleTeacher."
        )
    options = {
        "revision": args.teacher_model_revision,
        "load_in_4bit": args.teacher_load_in_4bit,
        "load_in_8bit": args.teacher_load_in_8bit,
        **args.teacher_model_init_kwargs,
    }
    if args.teacher_server_url is not None and teacher is not None and not isinstance(teacher, str):
        raise ValueError(f"there are two teachers, a {type(teacher).__name__} and teacher_server_url: give one.")
    if name is None and (unused := [option for option, value in options.items() if value]):
        raise ValueError(f"{', '.join(unused)}: these options load a teacher from a name or folder, and none is given.")
    options["trust_remote_code"] = trust_remote_code
    cache = None if args.teacher_cache is None else TeacherCache.open(args.teacher_cache)
    if cache is not None and args.on_miss != "live":
        if args.teacher_server_url is not None or (teacher is not None and not isinstance(teacher, str)):
            raise ValueError("the teacher would not be asked, because there is a teacher_cache: set on_miss=live.")
        if name is not None:
            require_same_teacher(cache, describe_checkpoint(name, **options))
        return CachedTeacher(cache, args.on_miss)
    live = _live_teacher(teacher, name, options, args, is_needed)
    if cache is None:
        return live
    if live is None:
        raise ValueError("on_miss=live asks the teacher, and there is none: teacher_model_name_or_path is missing.")
    return CachedTeacher(cache, "live", live)


def _live_teacher(
    teacher: str | PreTrainedModel | Teacher | None,
    name: str | None,
    options: dict[str, Any],
    args: TeacherOptions,
    is_needed: bool,
) -> Teacher | None:
    if args.teacher_adapters_off:
        if teacher is not None or name is not None:
            raise ValueError("teacher_adapters_off makes the student's base model the teacher: give no other one.")
        return AdaptersOffTeacher()
    if args.teacher_ema_decay is not None:
        if teacher is not None or name is not None:
            raise ValueError("teacher_ema_decay makes the student's own average the teacher: give no other one.")
        return EMATeacher(args.teacher_ema_decay)
    if args.teacher_codistilled is not None:
        if teacher is not None or name is not None:
            raise ValueError("teacher_codistilled makes other runs the teacher: give no other one.")
        return CodistilledTeacher(args.teacher_codistilled, vars(args)["output_dir"])
    if args.teacher_server_url is not None:
        return ServedTeacher(args.teacher_server_url, name, args.teacher_server_k, args.teacher_server_timeout)
    if name is not None:
        return LiveTeacher.load(name, **options)
    if isinstance(teacher, PreTrainedModel):
        return LiveTeacher(teacher)
    if teacher is None and is_needed:
        raise ValueError(
            "there is no teacher: pass teacher=... or teacher_model_name_or_path, teacher_server_url for one behind a "
            "server, teacher_cache for a stored one, teacher_adapters_off or teacher_ema_decay for the student itself, "
            "teacher_codistilled for other runs, or kd_weight=0 with ce_weight=1 to train on the text alone."
        )
    if teacher is not None and not isinstance(teacher, Teacher):
        hint = " Merge its adapters first: merge_and_unload()." if isinstance(teacher, PeftModel) else ""
        raise TypeError(f"teacher must be a name, a PreTrainedModel or a Teacher, got {type(teacher).__name__}.{hint}")
    return teacher
