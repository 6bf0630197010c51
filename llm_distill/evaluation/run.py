"""Everything a gap report can hold, measured one part after the other: what `llm-distill evaluate` runs."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset

from llm_distill.config import DistillationConfig
from llm_distill.data.checks import require_rows
from llm_distill.data.prepare import PreparedData, prepare
from llm_distill.evaluation.bias import compare_bias, read_pairs
from llm_distill.evaluation.cka import TOKENS, compare_layers
from llm_distill.evaluation.compare import TEACHER, TEXT, HeldOutTexts, compare
from llm_distill.evaluation.config import BUILT_IN, NONE, EvaluateConfig
from llm_distill.evaluation.domains import measure_domain, sample_texts, split_into_windows, usable_rows
from llm_distill.evaluation.figures import DomainFigures, domain_figures
from llm_distill.evaluation.generations import BATCH_SIZE, compare_generations
from llm_distill.evaluation.harness import require_tasks, run_tasks
from llm_distill.evaluation.report import NAME, GapReport, header
from llm_distill.evaluation.resources import VARIANTS, measure_resources
from llm_distill.evaluation.stages import stage_figures, text_losses
from llm_distill.files import locked
from llm_distill.machine import duration, seconds
from llm_distill.models import LanguageModel
from llm_distill.probes import require_causal, student_forward
from llm_distill.ranks import ranks, run_on_first_rank
from llm_distill.teachers.live import LiveTeacher

Models = dict[str, LanguageModel]
"""`student`, `teacher` and perhaps `baseline`."""
AT_WORK = "another `llm-distill evaluate`"
OPTIONS_OF_PARTS = {
    "previous": ("previous",),
    "generations": ("generations", "max_new_tokens"),
    "bias": ("bias",),
    "layers": ("layers",),
    "tasks": ("tasks", "task_limit", "task_path"),
    "resources": ("resources", "resource_batch_sizes", "resource_seconds", "quantized"),
}
"""Of each part beside the domains, in the order of measuring, the options that it alone depends on."""
BUILT_IN_TOKENS = 1500
"""Of the pairs of sentences that are built in."""
FIRST_LOOK_SECONDS = 20
"""Where all domains take much longer, some rows of each are measured first."""
SAMPLE_TOKENS = 256
"""By which the speed of the models is guessed."""
START_SECONDS = 15
"""What it takes to load a model in a process of its own."""


class Part(NamedTuple):
    """Something to measure."""

    name: str
    seconds: float | None
    """How long it takes about, if that can be known."""
    inputs: str
    """A hash of all that it depends on."""
    measure: Callable[[], Any]


def make_gap_report(config: EvaluateConfig, datasets: Mapping[str, Any], command: str = "") -> GapReport:
    """The report of `config`, saved in its folder after each part. What an earlier, perhaps killed, command has left
    there of the same models, data and options is not measured again.

    Args:
        datasets: by the domain's name, as they are loaded.
        command: what to say that it came from.

    Raises:
        ValueError: a model, a domain, a task or a file of pairs that cannot be used, or a folder that holds something
            else.
    """
    with locked(Path(config.output_dir), AT_WORK) if ranks().is_main_process else nullcontext():
        return _make_gap_report(config, datasets, command)


def _make_gap_report(config: EvaluateConfig, datasets: Mapping[str, Any], command: str) -> GapReport:
    if config.bias not in (NONE, BUILT_IN):
        list(read_pairs(config.bias))  # to be refused now if at all
    if config.tasks:
        run_on_first_rank(lambda: require_tasks(config.tasks, config.task_path))
    samples = {name: sample_texts(data, config.max_texts or None, config.seed) for name, data in datasets.items()}
    usable = {name: usable_rows(data) for name, data in samples.items()}
    if empty := [name for name, data in usable.items() if not len(data)]:
        raise ValueError(f"there is no text in {', '.join(empty)}.")
    models = {name: _load(config, name) for name in (TEACHER, "student", "baseline") if getattr(config, name)}
    lengths = [limit for model in models.values() if (limit := model.max_length)]
    config = replace(config, max_length=min([config.max_length, *lengths]))  # the same text for all
    report = GapReport(header(command) | {name: model.describe() for name, model in models.items()})
    comparable = _comparable(models["student"], models[TEACHER])
    report.content.update({"comparable": comparable, "domains": {}, "inputs": {}})
    report.content["left_out"] = {
        name: f"{missing} of its {len(samples[name])} rows, in which there is no text"
        for name, data in usable.items()
        if (missing := len(samples[name]) - len(data))
    }
    earlier = _earlier_report(config.output_dir, report)
    for part in _parts(config, models, usable, comparable is True):
        known = earlier["domains"].get(part.name) if part.name in usable else earlier.get(part.name)
        is_known = known is not None and earlier["inputs"].get(part.name) == part.inputs
        if not is_known:
            about = "" if part.seconds is None else f", about {duration(part.seconds)}"
            ranks().print(f"Measuring {part.name}{about}.")
        try:
            measured = known if is_known else part.measure()
        except ValueError as error:  # such as a library that is not there, or prompts that are all too long
            ranks().print(f"Skipped {part.name}: {error}")
            if part.name in usable:
                report.content["left_out"][part.name] = str(error)
            else:
                report.content[part.name] = {"skipped": str(error)}
        else:
            report.content["inputs"][part.name] = part.inputs
            (report.content["domains"] if part.name in usable else report.content)[part.name] = measured
            if part.name in usable:
                ranks().print(report.headline(part.name))
        if ranks().is_main_process:
            report.save(config.output_dir)
    if not report.domains:
        raise ValueError(f"no domain could be measured: {'; '.join(report.content['left_out'].values())}")
    return report


def _earlier_report(folder: str, report: GapReport) -> dict[str, Any]:
    """What lies in the folder of the same student and teacher, to go on from; on the first rank alone it counts.

    Raises:
        ValueError: a report on others, or another file in its place.
    """
    nothing: dict[str, Any] = {"domains": {}, "inputs": {}}

    def load() -> dict[str, Any]:
        if not any(Path(folder).glob(f"{NAME}.*")):
            return nothing
        content = GapReport.load(folder).content
        for name in (TEACHER, "student"):
            theirs, own = (of.get(name, {}).get("model") for of in (content, report.content))
            if theirs != own:
                raise ValueError(
                    f"{folder} holds the report on another {name}, {theirs}, and this one is {own}: name another "
                    "output_dir."
                )
        return nothing | content

    return run_on_first_rank(load)


def _parts(config: EvaluateConfig, models: Models, samples: Mapping[str, Dataset], comparable: bool) -> Iterator[Part]:
    """The domains, and what is measured beside them: what people look at first comes first, and what loads the models
    again, with the memory free, last.
    """
    hashes = {name: _hash(list(data)) for name, data in samples.items()}
    pairs = None if config.bias in (NONE, BUILT_IN) else Path(config.bias)
    files = [*([pairs] if pairs else []), *(sorted(Path(config.task_path).rglob("*.y*ml")) if config.task_path else [])]
    of_files = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
    of_parts = {option for options in OPTIONS_OF_PARTS.values() for option in options}
    options = {name: value for name, value in asdict(config).items() if name not in {*of_parts, "data", "output_dir"}}
    common = [options, [model.describe() for model in models.values()]]
    tokens_of, measure_rows, texts = _domains(config, models, samples, comparable)
    reading, writing = _seconds_a_token(models, min(SAMPLE_TOKENS, config.max_length))
    looks = []
    for name, tokens in tokens_of.items():
        if sum(tokens) * reading > 2 * FIRST_LOOK_SECONDS:
            looks.append(
                (name, int(np.searchsorted(np.cumsum(tokens) * reading, FIRST_LOOK_SECONDS / len(samples))) + 1)
            )
    for name, rows in looks + [(name, len(tokens)) for name, tokens in tokens_of.items()]:
        of_rows, estimate = partial(measure_rows, name, rows), sum(tokens_of[name][:rows]) * reading
        yield Part(name, estimate, _hash([common, hashes[name], rows]), of_rows)

    prompts = [min(config.generations, len(data)) for data in samples.values()]
    count = len(models) + (len(VARIANTS) if config.quantized else 0)
    limits: dict[str, Any] = {"limit": config.generations, "max_new_tokens": config.max_new_tokens}
    wanted: dict[str, tuple[bool, float | None, Callable[[], Any]]] = {
        "previous": (bool(config.previous), None, lambda: _measure_stages(config, models["student"], samples)),
        "generations": (
            config.generations > 0,
            sum(math.ceil(count / BATCH_SIZE) for count in prompts) * config.max_new_tokens * writing,
            lambda: {name: compare_generations(models, data, **limits) for name, data in samples.items()},
        ),
        "bias": (
            config.bias != NONE,
            None if pairs else BUILT_IN_TOKENS * reading,
            lambda: compare_bias(models, pairs),
        ),
        "layers": (
            config.layers and comparable,
            TOKENS * reading,
            lambda: compare_layers(models, texts),
        ),
        "tasks": (
            bool(config.tasks),
            None,
            lambda: run_tasks(models, config.tasks, limit=config.task_limit, include_path=config.task_path),
        ),
        "resources": (
            config.resources,
            count * (config.resource_seconds + START_SECONDS),
            lambda: run_on_first_rank(lambda: _resources(config)),
        ),
    }
    for name, (is_wanted, about, measure) in wanted.items():
        if not is_wanted:
            continue
        if name == "resources":
            models.clear()
            clear_device_cache(garbage_collection=True)
        own = {option: getattr(config, option) for option in OPTIONS_OF_PARTS[name]}
        yield Part(name, about, _hash([common, hashes, own, of_files]), measure)


def _seconds_a_token(models: Models, length: int) -> tuple[float, float]:
    """How long all models together take to read a token of a text of this length, and to write the next of BATCH_SIZE
    answers at once.
    """
    totals = [0.0, 0.0]
    for model in models.values():
        for place, shape in enumerate([(1, length), (BATCH_SIZE, 1)]):
            ids = torch.zeros(shape, dtype=torch.long, device=ranks().device)
            forward = partial(model.model.to(ids.device), input_ids=ids)
            with torch.inference_mode():
                forward()
                totals[place] += min(seconds(forward, ids.device) for _ in range(3)) / shape[1]
    return totals[0], totals[1]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _domains(
    config: EvaluateConfig, models: Models, samples: Mapping[str, Dataset], comparable: bool
) -> tuple[dict[str, list[int]], Callable[[str, int], DomainFigures], list[HeldOutTexts]]:
    """How many tokens each row of each domain has, what measures the first rows of one, and the domains in the
    student's tokens. Models with these run over the same batches, each other one over its own.

    Raises:
        ValueError: a domain with nothing to score, before any is.
    """
    alone = _alone(models, comparable)
    prepared = {name: dict(_prepared(config, models[name], samples)) for name in ("student", *alone)}
    together = {name: model.model for name, model in models.items() if name not in alone and name != TEACHER}

    def measure(domain: str, rows: int) -> DomainFigures:
        datasets = {name: data[domain].evaluation[domain] for name, data in prepared.items()}
        datasets = _same_texts(datasets, rows) if alone else {"student": datasets["student"].select(range(rows))}
        texts = {name: _held_out(prepared[name][domain], config, domain, rows) for name, rows in datasets.items()}
        others = {name: compare({name: models[name].model}, None, texts[name])[name] for name in alone}
        of_student = prepared["student"][domain]
        if comparable:
            live = LiveTeacher(models[TEACHER])
            live.prepare(of_student.accelerator, torch.nn.Module())
            figures = measure_domain(together, live, texts["student"], others)
        else:
            figures = domain_figures(compare(together, None, texts["student"]) | others, comparable=False)
        if (counts := of_student.row_counts.get(domain)) and counts.lost:
            figures["lost"] = str(counts)
        return figures

    rows = {name: data.evaluation[name]["input_ids"] for name, data in prepared["student"].items()}
    texts = [_held_out(data, config, name, data.evaluation[name]) for name, data in prepared["student"].items()]
    return {name: list(map(len, of_domain)) for name, of_domain in rows.items()}, measure, texts


def _measure_stages(config: EvaluateConfig, student: LanguageModel, samples: Mapping[str, Dataset]) -> dict[str, Any]:
    """What the student says of each domain after each stage, one model at a time.

    Raises:
        ValueError: a student that cannot be loaded, or has other tokens than the last.
    """
    prepared = dict(_prepared(config, student, samples))
    texts = {name: _held_out(data, config, name, data.evaluation[name]) for name, data in prepared.items()}
    stages = []
    for path in config.previous:
        model = LanguageModel.load(path, dtype=config.dtype, trust_remote_code=config.trust_remote_code)
        if (reason := _comparable(student, model)) is not True:
            raise ValueError(f"{path} is no earlier stage of the student: {reason}")
        model.model.to(ranks().device).eval()
        stages.append({name: text_losses(model.model, of_domain) for name, of_domain in texts.items()})
    stages.append({name: text_losses(student.model, of_domain) for name, of_domain in texts.items()})
    return stage_figures(stages)


def _alone(models: Models, comparable: bool) -> list[str]:
    """Models with tokens of their own."""
    alone = [] if comparable else [TEACHER]
    if "baseline" in models and _comparable(models["student"], models["baseline"]) is not True:
        alone.append("baseline")
    return alone


def _prepared(
    config: EvaluateConfig, model: LanguageModel, samples: Mapping[str, Dataset]
) -> Iterator[tuple[str, PreparedData]]:
    """Each domain in a model's tokens, with labels of prompts and chats as for training; long texts are read to their
    end, in windows. What counts is one setting for all, so domains with and without prompts are prepared apart.
    """
    tokenizer = model.require_tokenizer("model")
    args = DistillationConfig(
        output_dir=config.output_dir,
        max_length=config.max_length,
        assistant_only_loss=config.assistant_only_loss,
        bf16=False,
        report_to="none",
        trust_remote_code=config.trust_remote_code,
        use_cpu=ranks().device.type == "cpu",
    )
    prepared: dict[str, PreparedData] = {}
    for name, dataset in samples.items():
        kind = _kind(dataset)
        if kind not in prepared:
            alike = {n: d for n, d in samples.items() if _kind(d) == kind}
            if kind != "text":
                alike = {n: d.add_column(TEXT, range(len(d))) for n, d in alike.items()}
            else:
                alike = {n: split_into_windows(d, tokenizer, config.max_length) for n, d in alike.items()}
            prepared[kind] = prepare(tokenizer, args, next(iter(alike.values())), alike)
            for domain, data in prepared[kind].evaluation.items():
                require_rows(data, domain)
        model.model.to(prepared[kind].device)
        require_causal(model.model, student_forward(model.model, model.head), prepared[kind].accelerator)
        yield name, prepared[kind]


def _kind(data: Dataset) -> str:
    return next((column for column in ("prompt", "messages", "text") if column in data.column_names), "other")


def _held_out(data: PreparedData, config: EvaluateConfig, name: str, rows: Dataset) -> HeldOutTexts:
    return HeldOutTexts(rows, data.collate, data.tokenizer, config.batch_size, name)


def _same_texts(datasets: Mapping[str, Dataset], rows: int) -> dict[str, Dataset]:
    """Of datasets in other tokens, the texts that all of them have: those of the student's first rows, whole.

    Raises:
        ValueError: there are none.
    """
    texts_of = {name: np.asarray(dataset[TEXT]) for name, dataset in datasets.items()}
    of_student = texts_of["student"]
    whole = of_student if rows >= len(of_student) else of_student[of_student < of_student[rows]]
    wanted = {*whole} or {of_student[0]}
    for texts in texts_of.values():
        wanted &= set(texts)
    if not wanted:
        raise ValueError("each of its texts is too long in the tokens of one of the models: raise max_length.")
    return {name: datasets[name].select(np.flatnonzero(np.isin(texts, [*wanted]))) for name, texts in texts_of.items()}


def _load(config: EvaluateConfig, name: str) -> LanguageModel:
    """Any of the models; adapters are merged into what they are of.

    Raises:
        ValueError: it cannot be loaded, or comes without a tokenizer.
    """
    path, revision = getattr(config, name), getattr(config, f"{name}_revision")
    bits: dict[str, Any] = {
        f"load_in_{n}bit": True for n in (4, 8) if name == TEACHER and getattr(config, f"teacher_load_in_{n}bit")
    }
    options = {"revision": revision, "dtype": config.dtype, "trust_remote_code": config.trust_remote_code}
    model = LanguageModel.load(path, **options, **bits)
    if model.tokenizer is None:
        raise ValueError(f"the {name} {path!r} comes without a tokenizer: save it beside the weights.")
    model.model.eval()
    return model


def _comparable(student: LanguageModel, other: LanguageModel) -> bool | str:
    """Whether their distributions are over the same tokens; if not, why."""
    try:
        other.fit_to(student.require_tokenizer("student"))
    except ValueError as reason:
        return str(reason)
    return True


def _resources(config: EvaluateConfig) -> dict[str, Any]:
    models = {name: getattr(config, name) for name in (TEACHER, "student", "baseline") if getattr(config, name)}
    return measure_resources(
        models,
        variants=VARIANTS if config.quantized else (),
        batch_sizes=config.resource_batch_sizes,
        dtype=config.dtype,
        revisions={name: revision for name in models if (revision := getattr(config, f"{name}_revision"))},
        teacher_bits=4 if config.teacher_load_in_4bit else 8 if config.teacher_load_in_8bit else None,
        seconds=config.resource_seconds,
        trust_remote_code=config.trust_remote_code,
    )
