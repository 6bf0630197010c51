"""What a person can choose of the teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from llm_distill.options import Options, is_chosen, option, parse_mapping, parse_mappings, parse_text
from llm_distill.templates import read_template

LOADING = ("teacher_model_revision", "teacher_model_init_kwargs", "teacher_load_in_4bit", "teacher_load_in_8bit")
"""Options that act where the teacher is loaded here."""


MIXTURES = ("mean", "geometric", "vote", "best")
MIXTURE_WEIGHTS = ("fixed", "likelihood", "entropy")
KINDS = ("model", "cache", "server")
"""What a teacher of a mixture is."""
OF_A_MEMBER = {
    "model": "teacher_model_name_or_path",
    "cache": "teacher_cache",
    "server": "teacher_server_url",
    "revision": "teacher_model_revision",
    "init_kwargs": "teacher_model_init_kwargs",
    "load_in_4bit": "teacher_load_in_4bit",
    "load_in_8bit": "teacher_load_in_8bit",
    "k": "teacher_server_k",
    "timeout": "teacher_server_timeout",
    "on_miss": "on_miss",
}
"""What may be said of one teacher of `teachers`, and the option that it is where there is no other."""


def parse_teachers(name: str, value: Any) -> list[dict[str, Any]] | None:
    """A list of teachers. Models with their weights are short for those that have all else by default.

    Raises:
        ValueError: it is neither, or one has no kind or more than one, a key that there is not, or a weight that cannot
            be.
    """
    parsed = parse_text(name, value)
    if isinstance(parsed, dict):
        parsed = [{"model": model, "weight": weight} for model, weight in parsed.items()]
    teachers = [dict(teacher) for teacher in parse_mappings(name, parsed)]
    known = (*OF_A_MEMBER, "weight", "name")
    for number, teacher in enumerate(teachers):
        if unknown := [key for key in teacher if key not in known]:
            raise ValueError(f"{name}[{number}] has no {unknown[0]!r}, only {', '.join(known)}.")
        if not any(teacher.get(kind) for kind in KINDS):
            raise ValueError(f"{name}[{number}] must be a model, a cache or a server, got {teacher}.")
        weight = teacher.get("weight", 1.0)
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
            raise ValueError(
                f"{name}[{number}] has weight={weight!r}, and a weight must be positive and finite: leave out a "
                "teacher that shall not speak."
            )
        teacher.setdefault("name", str(next(teacher[kind] for kind in (*KINDS[1:], KINDS[0]) if teacher.get(kind))))
    names = [teacher["name"] for teacher in teachers]
    if repeated := [own for own in names if names.count(own) > 1]:
        raise ValueError(f"{name} has {repeated[0]!r} twice: give one a name of its own.")
    return teachers or None


@dataclass
class TeacherModelOptions(Options):
    """Which model the teacher is and how it is loaded, for training and for writing alike."""

    heading = "the teacher"

    teacher_model_name_or_path: str | None = option(
        None,
        "The teacher is this model: a model id on the Hub, a folder, or the name that a server or an endpoint gives "
        "it. One in memory may have another tokenizer than the student: see teacher_alignment.",
    )
    teacher_model_revision: str | None = option(None, "The teacher is of this branch, tag or commit.")
    teacher_model_init_kwargs: dict[str, Any] | str | None = option(
        None,
        "AutoModelForCausalLM.from_pretrained gets these arguments when the teacher is loaded, as JSON or YAML. Its "
        "dtype is the checkpoint's own unless one is given here.",
        parse=parse_mapping,
    )
    teacher_load_in_4bit: bool = option(False, "The teacher is loaded in 4 bits (bitsandbytes, NF4).")
    teacher_load_in_8bit: bool = option(
        False, "The teacher is loaded in 8 bits (bitsandbytes).", needs={"teacher_load_in_4bit": (False,)}
    )

    def conflicts(self) -> dict[str, Any]:
        assert isinstance(self.teacher_model_init_kwargs, dict), "it is parsed"
        return super().conflicts() | {
            "teacher_model_revision (teacher_model_init_kwargs has another)": self.teacher_model_revision
            and "revision" in self.teacher_model_init_kwargs
        }


@dataclass
class TeacherOptions(TeacherModelOptions):
    """Who the teacher of a training run is: a model, a server, what was stored of either, or the student's own base."""

    teacher_adapters_off: bool = option(
        False,
        "The teacher is the student's own base model with its LoRA adapters off. This keeps a fine-tuned student near "
        "what it was, at no extra memory. Use it with ce_weight.",
        needs="kd_weight",
    )
    teacher_ema_decay: float | None = option(
        None,
        "The teacher is the exponential average of the student's trained weights over its steps, with this decay: "
        "0.999 remembers some thousand steps. Where it reads what the student reads, use it with ce_weight.",
        needs="kd_weight",
        at_least=0,
    )
    teacher_codistilled: str | None = option(
        None,
        "The teacher is the other runs whose output folders are in this folder, where output_dir is too, as their last "
        "checkpoints are. They are taken up when they appear, so that runs on several machines teach each other. Use "
        "it with ce_weight.",
        needs="kd_weight",
    )
    teacher_server_url: str | None = option(
        None,
        "The teacher is behind vLLM's server at http://host:port, or behind several with commas between, which share "
        "the work. No weights are loaded, and teacher_model_name_or_path is the name that it is served by. A key is "
        "read from OPENAI_API_KEY.",
        parse=lambda _, value: ",".join(value) if isinstance(value, list) else value,
    )
    teacher_server_k: int = option(
        20,
        "The server tells the probabilities of this many tokens of each row, and all others are one more cell. vLLM "
        "allows 20 unless it was started with --max-logprobs. At 0 it tells those of the text's own tokens alone, "
        "enough for reverse_kl on what the student wrote.",
        needs="teacher_server_url",
        at_least=0,
    )
    teacher_server_timeout: float = option(
        600.0,
        "A request is tried again for this many seconds, on any of the servers, before the run ends.",
        needs="teacher_server_url",
        positive=True,
    )
    teacher_cache: str | None = option(
        None,
        "The teacher's answers are read from what `llm-distill capture` has stored: a folder, a dataset repository on "
        "the Hub, or hf://datasets/… to read them over the network. No teacher is loaded, and one that is named must "
        "be the one that was stored.",
        needs="kd_weight",
    )
    on_miss: str = option(
        "error",
        "A text that is not in teacher_cache ends the run (error), is left out of the loss (skip), or is given to the "
        "teacher, which is loaded for it and whose answer is added to the cache (live).",
        choices=("error", "skip", "live"),
        needs="teacher_cache",
    )

    teachers: list[dict[str, Any]] | str | None = option(
        None,
        "There are several teachers, as JSON or YAML: a list of {model}, {cache} or {server}, each with what it needs "
        "(weight, name, revision, init_kwargs, load_in_4bit, load_in_8bit, k, timeout, on_miss), or in short `{name: "
        "weight}` for models. A column `teacher` of the data names the one that speaks about a row.",
        needs="kd_weight",
        parse=parse_teachers,
    )
    mixture: str = option(
        "mean",
        "What several teachers say together is the mean of their probabilities, their geometric mean (of whole "
        "distributions), a vote (each one's weight on its likeliest token), or what the one says that predicts the "
        "text at hand best.",
        choices=MIXTURES,
        needs="teachers",
    )
    mixture_weights: str = option(
        "fixed",
        "A teacher weighs what `teachers` says, or more in a text that it predicts well (likelihood), or where it is "
        "sure (entropy).",
        choices=MIXTURE_WEIGHTS,
        needs="teachers",
    )
    mixture_temperature: float = option(
        1.0,
        "At this temperature, in nats, loss or entropy become weights: the lower, the more the best one has.",
        needs={"mixture_weights": ("likelihood", "entropy")},
        positive=True,
    )

    teacher_system_prompt: str | None = option(
        None,
        "The teacher reads every conversation with this system turn, and the student as it is. What one row alone "
        "tells it is in the columns teacher_prompt or teacher_messages.",
    )
    teacher_chat_template: str | None = option(
        None,
        "The teacher reads conversations in this chat template, a Jinja file or its text. The tokens that are learned "
        "must be the same as in the student's.",
        parse=lambda _, value: None if value is None else read_template(value),
    )
    teacher_max_length: int | None = option(
        None,
        "The teacher reads at most this many tokens (by default all that it can) where it reads more than the "
        "student. A longer row is refused, never cut.",
        at_least=2,
    )

    def conflicts(self) -> dict[str, Any]:
        is_served = self.teacher_server_url is not None
        unused = [name for name in LOADING if is_served and is_chosen(self, name)]
        others = ("teacher_adapters_off", "teacher_server_url", "teacher_cache")
        has_other = [name for name in others if is_chosen(self, name)]
        beside = [name for name in (*others, "teacher_ema_decay") if is_chosen(self, name)]
        of_one = ("teacher_model_name_or_path", "teacher_adapters_off", "teacher_server_url", "teacher_ema_decay")
        alone = [name for name in (*of_one, "teacher_codistilled", *LOADING) if is_chosen(self, name)]
        return super().conflicts() | {
            f"teacher_codistilled ({', '.join(beside)} names another teacher)": self.teacher_codistilled is not None
            and beside,
            f"teacher_ema_decay ({', '.join(has_other)} names another teacher)": self.teacher_ema_decay is not None
            and has_other,
            f"{', '.join(alone)} (teachers says who they are)": self.teachers and alone,
            "mixture_weights (mixture=best gives all weight to one teacher)": self.mixture == "best"
            and self.mixture_weights != "fixed",
            "teacher_adapters_off (teacher_server_url is the teacher)": self.teacher_adapters_off and is_served,
            "teacher_adapters_off (teacher_cache has the answers)": self.teacher_adapters_off
            and self.teacher_cache is not None
            and self.on_miss != "live",
            f"{', '.join(unused)} (teacher_server_url has loaded the teacher)": unused,
        }
