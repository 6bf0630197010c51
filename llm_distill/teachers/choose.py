"""The teacher that a configuration names: live, without adapters, averaged, of other runs, served, or from a cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
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
from llm_distill.teachers.ensemble import EnsembleTeacher, words_of
from llm_distill.teachers.live import LiveTeacher
from llm_distill.teachers.options import OF_A_MEMBER, TeacherOptions
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
    name = teacher if isinstance(teacher, str) else args.teacher_model_name_or_path if teacher is None else None
    if teacher is not None and args.teacher_model_name_or_path not in (None, teacher):
        given = repr(teacher) if isinstance(teacher, str) else f"a {type(teacher).__name__}"
        raise ValueError(
            f"there are two teachers, teacher={given} and teacher_model_name_or_path="
            f"{args.teacher_model_name_or_path!r}: give one. Several at once are teachers=[…], or an EnsembleTeacher."
        )
    options = _loading_options(args)
    if args.teacher_server_url is not None and teacher is not None and not isinstance(teacher, str):
        raise ValueError(f"there are two teachers, a {type(teacher).__name__} and teacher_server_url: give one.")
    if name is None and (unused := [option for option, value in options.items() if value]):
        raise ValueError(f"{', '.join(unused)}: these options load a teacher from a name or folder, and none is given.")
    options["trust_remote_code"] = trust_remote_code
    if args.teachers and teacher is not None:
        raise ValueError("there are two teachers, that of the trainer and those of teachers: give one.")
    cache = None if args.teacher_cache is None else TeacherCache.open(args.teacher_cache)
    if cache is not None and args.on_miss != "live":
        if args.teacher_server_url is not None or (teacher is not None and not isinstance(teacher, str)):
            raise ValueError("the teacher would not be asked, because there is a teacher_cache: set on_miss=live.")
        if name is not None:
            require_same_teacher(cache, describe_checkpoint(name, **options))
        if args.teachers:
            require_same_teacher(cache, _describe_mixture(args, trust_remote_code))
        return CachedTeacher(cache, args.on_miss)
    if args.teachers:
        live: Teacher | None = _make_mixture(args, trust_remote_code)
    else:
        live = _live_teacher(teacher, name, options, args, is_needed)
    if cache is None:
        return live
    if live is None:
        raise ValueError("on_miss=live asks the teacher, and there is none: teacher_model_name_or_path is missing.")
    return CachedTeacher(cache, "live", live)


def _loading_options(args: TeacherOptions) -> dict[str, Any]:
    assert isinstance(args.teacher_model_init_kwargs, dict), "it is parsed"
    return {
        "revision": args.teacher_model_revision,
        "load_in_4bit": args.teacher_load_in_4bit,
        "load_in_8bit": args.teacher_load_in_8bit,
        **args.teacher_model_init_kwargs,
    }


@dataclass
class _MemberOptions(TeacherOptions):
    """Those of one teacher of a mixture."""

    kd_weight: float = 1.0


def _options_of_members(args: TeacherOptions) -> Iterator[tuple[str, _MemberOptions]]:
    """Those of each teacher of a mixture, as of one alone, with where it stands."""
    assert isinstance(args.teachers, list), "it is parsed"
    for number, entry in enumerate(args.teachers):
        where = f"teachers[{number}], {entry['name']}"
        try:
            yield where, _MemberOptions(**{OF_A_MEMBER[key]: entry[key] for key in entry if key in OF_A_MEMBER})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def _make_mixture(args: TeacherOptions, trust_remote_code: bool) -> EnsembleTeacher:
    assert isinstance(args.teachers, list), "it is parsed"
    members = []
    for where, options in list(_options_of_members(args)):
        try:
            if options.on_miss == "live":
                raise ValueError("on_miss=live is not for a teacher of a mixture: use error or skip, or capture first.")
            member = make_teacher(None, options, is_needed=True, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        assert member is not None, "it is needed"
        members.append(member)
    return EnsembleTeacher(
        members,
        [entry.get("weight", 1.0) for entry in args.teachers],
        mixture=args.mixture,
        weights_by=args.mixture_weights,
        temperature=args.mixture_temperature,
        names=[entry["name"] for entry in args.teachers],
    )


def _describe_mixture(args: TeacherOptions, trust_remote_code: bool) -> dict[str, Any]:
    """What can be said of a mixture without loading it; of a server nothing."""
    assert isinstance(args.teachers, list), "it is parsed"
    members: list[dict[str, Any]] = []
    for _, options in _options_of_members(args):
        if options.teacher_cache is not None:
            members.append(CachedTeacher(options.teacher_cache).describe())
        elif options.teacher_server_url is not None:
            members.append({})
        else:
            assert options.teacher_model_name_or_path is not None, "or it was refused"
            loading = _loading_options(options) | {"trust_remote_code": trust_remote_code}
            members.append(describe_checkpoint(options.teacher_model_name_or_path, **loading))
    weights = [entry.get("weight", 1.0) for entry in args.teachers]
    how = words_of(args.mixture, args.mixture_weights, args.mixture_temperature)
    return {"ensemble": members, "weights": [weight / sum(weights) for weight in weights], "mixture": how}


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
            "server, teacher_cache for a stored one, teachers for several, teacher_adapters_off or teacher_ema_decay "
            "for the student itself, teacher_codistilled for other runs, or kd_weight=0 with ce_weight=1 to train on "
            "the text alone."
        )
    if teacher is not None and not isinstance(teacher, Teacher):
        hint = " Merge its adapters first: merge_and_unload()." if isinstance(teacher, PeftModel) else ""
        raise TypeError(f"teacher must be a name, a PreTrainedModel or a Teacher, got {type(teacher).__name__}.{hint}")
    return teacher
