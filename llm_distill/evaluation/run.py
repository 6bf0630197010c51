"""Everything a gap report can hold, measured one part after the other: what `llm-distill evaluate` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset

from llm_distill.config import DistillationConfig
from llm_distill.data.checks import require_rows
from llm_distill.data.prepare import PreparedData, prepare
from llm_distill.evaluation.bias import compare_bias, read_pairs
from llm_distill.evaluation.compare import TEACHER, HeldOutTexts, Scores, compare
from llm_distill.evaluation.config import BUILT_IN, NONE, EvaluateConfig
from llm_distill.evaluation.domains import measure_domain, sample_texts, split_into_windows
from llm_distill.evaluation.figures import DomainFigures, domain_figures
from llm_distill.evaluation.generations import compare_generations
from llm_distill.evaluation.harness import run_tasks
from llm_distill.evaluation.report import GapReport, header
from llm_distill.evaluation.resources import VARIANTS, measure_resources
from llm_distill.models import LanguageModel
from llm_distill.ranks import ranks, run_on_first_rank
from llm_distill.teachers.live import LiveTeacher

Models = Mapping[str, LanguageModel]
"""`student`, `teacher` and perhaps `baseline`."""


def make_gap_report(config: EvaluateConfig, datasets: Mapping[str, Any], command: str = "") -> GapReport:
    """The report of `config`, saved in its folder after each part, so that a part that fails costs no other.

    Args:
        datasets: by the domain's name, as they are loaded.
        command: what to say that it came from.

    Raises:
        ValueError: a model, a domain or a file of pairs that cannot be used.
    """
    pairs = None if config.bias in (NONE, BUILT_IN) else config.bias
    if pairs is not None:
        list(read_pairs(pairs))  # to be refused now if at all
    samples = {name: sample_texts(data, config.max_texts or None, config.seed) for name, data in datasets.items()}
    if empty := [name for name, data in samples.items() if not len(data)]:
        raise ValueError(f"there is no text in {', '.join(empty)}.")
    report = GapReport(header(command))
    resources = run_on_first_rank(lambda: _resources(config)) if config.resources else None  # with the memory free
    models = {name: _load(config, name) for name in (TEACHER, "student", "baseline") if getattr(config, name)}
    report.content.update({name: model.describe() for name, model in models.items()})
    lengths = [limit for model in models.values() if (limit := model.max_length)]
    config = replace(config, max_length=min([config.max_length, *lengths]))  # the same text for all
    report.content["comparable"] = _comparable(models["student"], models[TEACHER])
    report.content["domains"] = dict(_domains(config, models, samples, report.content["comparable"] is True))
    if resources is not None:
        report.content["resources"] = resources
    for name, measure in _parts(config, models, samples, pairs):
        _save(report, config.output_dir)
        try:
            report.content[name] = measure()
        except ValueError as error:  # such as a library that is not there, or prompts that are all too long
            report.content[name] = {"skipped": str(error)}
            ranks().print(f"Skipped {name}: {error}")
    _save(report, config.output_dir)
    return report


def _parts(
    config: EvaluateConfig, models: Models, samples: Mapping[str, Dataset], pairs: str | None
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """What is measured beside the domains."""
    if config.generations:
        options: dict[str, Any] = {"limit": config.generations, "max_new_tokens": config.max_new_tokens}
        yield (
            "generations",
            lambda: {name: compare_generations(models, data, **options) for name, data in samples.items()},
        )
    if config.tasks:
        yield (
            "tasks",
            lambda: run_tasks(models, config.tasks, limit=config.task_limit, include_path=config.task_path),
        )
    if config.bias != NONE:
        yield "bias", lambda: compare_bias(models, pairs)


def _domains(
    config: EvaluateConfig, models: Models, samples: Mapping[str, Dataset], comparable: bool
) -> Iterator[tuple[str, DomainFigures]]:
    """(name, figures). Models with the student's tokens run over the same batches, each other one over its own."""
    student, teacher = models["student"], models[TEACHER]
    alone = [] if comparable else [TEACHER]
    if "baseline" in models and _comparable(student, models["baseline"]) is not True:
        alone.append("baseline")
    of_alone = {name: _scores_alone(config, name, models[name], samples) for name in alone}
    together = {name: model.model for name, model in models.items() if name not in alone and name != TEACHER}
    for name, data in _prepared(config, student, samples):
        others = {model: scores[name] for model, scores in of_alone.items()}
        texts = _held_out(data, config, name)
        if comparable:
            live = LiveTeacher(teacher)
            live.prepare(data.accelerator, torch.nn.Module())
            figures = measure_domain(together, live, texts, others)
        else:
            figures = domain_figures(compare(together, None, texts) | others, comparable=False)
        if (counts := data.row_counts.get(name)) and counts.lost:
            figures["lost"] = str(counts)
        yield name, figures


def _scores_alone(
    config: EvaluateConfig, name: str, model: LanguageModel, samples: Mapping[str, Dataset]
) -> dict[str, Scores]:
    """Of a model with tokens of its own, on each domain."""
    return {
        domain: compare({name: model.model}, None, _held_out(data, config, domain))[name]
        for domain, data in _prepared(config, model, samples)
    }


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
            if kind == "text":
                alike = {n: split_into_windows(d, tokenizer, config.max_length) for n, d in alike.items()}
            prepared[kind] = prepare(tokenizer, args, next(iter(alike.values())), alike)
            for domain, data in prepared[kind].evaluation.items():
                require_rows(data, domain)
        model.model.to(prepared[kind].device)
        yield name, prepared[kind]


def _kind(data: Dataset) -> str:
    return next((column for column in ("prompt", "messages", "text") if column in data.column_names), "other")


def _held_out(data: PreparedData, config: EvaluateConfig, name: str) -> HeldOutTexts:
    return HeldOutTexts(data.evaluation[name], data.collate, data.tokenizer, config.batch_size, name)


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
        trust_remote_code=config.trust_remote_code,
    )


def _save(report: GapReport, folder: str) -> None:
    if ranks().is_main_process:
        report.save(folder)
