"""The model card, from what lies in a student's folder: `distillation.json`, `run.yaml`, a gap report if one is there.

So it can be written again at any time, with a report that was made later, on a machine that has not trained.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from llm_distill.evaluation.figures import LIKENESS, LOSSES, DomainFigures
from llm_distill.evaluation.report import PLOTS, GapReport
from llm_distill.evaluation.statistics import Interval, format_interval
from llm_distill.files import read_json
from llm_distill.losses.metrics import LABELS
from llm_distill.publish.hub import TAGS, common_licence, licence_of, link_to, teachers_of, terms_of
from llm_distill.publish.record import FILE, OPTIONS_FILE
from llm_distill.tables import Markdown, Table, as_code, escape_markdown

CARD_FILE = "README.md"
REPORT_FILE, REPORT_PAGES = "report.json", ("report.md", "report.html")
PICTURES = tuple(f"report_{plot}.png" for plot in PLOTS)
MARK = "<!-- llm-distill writes this card anew with every push. Remove this line to keep what you change. -->"
UNFILLED = "[More Information Needed]"
"""Of the template that PEFT leaves."""
CHAT_INPUTS = """messages = [{"role": "user", "content": "What is a language model?"}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)"""
MODELS = ("student", "teacher", "baseline")
PARTS = {"generations": "what it writes", "tasks": "tasks", "bias": "bias", "resources": "speed and memory"}
"""Of a report, beside its domains."""


def write_model_card(
    folder: str | Path,
    *,
    name: str,
    repo_id: str | None = None,
    base_model: str | None = None,
    tags: str | list[str] | None = None,
    api: HfApi | None = None,
) -> None:
    """Writes `folder/README.md`: what was distilled from what, how, and how well. Nothing local, nothing secret. A card
    that somebody has made their own stays.

    Args:
        folder: of a student, with its record.
        name: the title.
        repo_id: where it will be; by default it is loaded from its folder.
        base_model: what it was before, if that is on the Hub and the record does not know; for adapters their model.
        tags: beside `TAGS` and the teacher's name.
        api: for the licences that teacher and base model have on the Hub.
    """
    folder = Path(folder)
    path = folder / CARD_FILE
    if path.is_file() and not any(
        sign in path.read_text(encoding="utf-8", errors="replace") for sign in (MARK, UNFILLED)
    ):
        return
    record = read_json(folder / FILE)
    report = GapReport.load(folder).content if (folder / REPORT_FILE).is_file() else None
    base_model = base_model or base_model_of(record)
    licences = {"teacher": licence_of(_teacher(record), api or HfApi())} if taught(record) else {}
    if record.get("student.revision"):
        start = {"model": record["student.model"], "revision": record["student.revision"]}
        licences["start"] = licence_of(start, api or HfApi())
    adapter = (folder / "adapter_config.json").is_file()
    further = [tags] if isinstance(tags, str) else tags or []
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        tags=sorted({*TAGS, *further, *(f"distilled-from:{name}" for name in _hub_teachers(record))}),
        base_model=base_model,
        datasets=[record["run.dataset"]] if record.get("run.dataset") else None,
        pipeline_tag="text-generation",
        model_name=name,
        eval_results=list(_eval_results(record, report)) or None,
        **common_licence(list(licences.values())),
    )
    if base_model is not None:
        data["base_model_relation"] = "adapter" if adapter else "finetune"
    sections = [
        f"# {escape_markdown(name)}\n\n{_origin(record)}",
        _lineage(record, base_model, licences),
        f"## Use\n\n{_usage(folder, repo_id, adapter)}",
        *(_results(folder, record, report)),
        f"## How\n\n{_how(folder, record)}",
        f"## Limits\n\n{_limits(record, report, folder)}",
        Table(("library", "version"), list(record.get("run.versions", {}).items())).markdown(),
    ]
    text = "\n\n".join(section.strip() for section in sections if section)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{MARK}\n\n{text}\n").save(path)


def read_options(folder: Path) -> dict[str, Any]:
    """The options of a run. Raises ValueError if they are not what was written."""
    path = folder / OPTIONS_FILE
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML. ({error})") from error
    if not isinstance(options, dict):
        raise ValueError(f"{path} should hold a run's options, and holds a {type(options).__name__}.")
    return options


def base_model_of(record: dict[str, Any]) -> str | None:
    """What the student was before, if that is on the Hub."""
    return record["student.model"] if record.get("student.revision") else None


def taught(record: dict[str, Any]) -> bool:
    """Whether there was a teacher to learn from, and not text alone."""
    return bool(record["objective.kd_weight"]) and any(name.startswith("teacher.") for name in record)


def _teacher(record: dict[str, Any]) -> dict[str, Any]:
    return _part(record, "teacher.")


def _part(record: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {name.removeprefix(prefix): value for name, value in record.items() if name.startswith(prefix)}


def _hub_teachers(record: dict[str, Any]) -> list[str]:
    teachers = teachers_of(_teacher(record)) if taught(record) else []
    return [teacher["model"] for teacher in teachers if teacher.get("revision")]


def _origin(record: dict[str, Any]) -> str:
    if not taught(record):
        return "Trained with llm-distill on text alone."
    teachers = teachers_of(_teacher(record))
    if len(teachers) > 1:
        return f"Distilled with llm-distill from an ensemble of {len(teachers)} teachers."
    name = teachers[0].get("model") or teachers[0].get("architecture")
    return (
        f"Distilled with llm-distill from {as_code(name)}{_size(teachers[0])}."
        if name
        else "Distilled with llm-distill."
    )


def _lineage(record: dict[str, Any], base_model: str | None, licences: dict[str, dict[str, Any]]) -> str:
    start = _part(record, "student.")
    if base_model is not None:
        start["model"] = base_model
        start["revision"] = start.get("revision") or "main"
    rows = [("student, before", link_to(start) + _size(start), terms_of(licences.get("start", {})))]
    if taught(record):
        terms = terms_of(licences["teacher"])
        rows += [("teacher", link_to(member) + _size(member), terms) for member in teachers_of(_teacher(record))]
    data = record.get("run.dataset") or record.get("data.name")
    if data:
        address = f"https://huggingface.co/datasets/{quote(data)}"
        linked = f"[{escape_markdown(data)}]({address})" if record.get("run.dataset") else as_code(data)
        texts, lost, cut = (
            record.get(f"data.{n}") or record.get(f"run.{n}") for n in ("texts", "texts_lost", "texts_cut")
        )
        count = f", {texts:,} texts" if texts else ""
        if lost:
            count += f" (nothing was left to learn in {lost:,} of them)"
        if cut:
            count += f", {cut:,} cut at max_length"
        rows.append(("data", linked + count, "see there"))
    return Table(("", "what", "licence"), [(name, *map(Markdown, cells)) for name, *cells in rows]).markdown()


def _size(model: dict[str, Any]) -> str:
    count = model.get("parameters") or 0
    size = f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"
    return f" ({size} parameters)" if count else ""


def _usage(folder: Path, repo_id: str | None, adapter: bool) -> str:
    model = "AutoPeftModelForCausalLM" if adapter else "AutoModelForCausalLM"
    has_template = any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json"))
    lines = [
        f"from peft import {model}\nfrom transformers import AutoTokenizer"
        if adapter
        else f"from transformers import {model}, AutoTokenizer",
        "",
        f'name = "{repo_id}"' if repo_id else 'name = "."  # the folder of this card',
        "tokenizer = AutoTokenizer.from_pretrained(name)",
        f"model = {model}.from_pretrained(name)",
        CHAT_INPUTS if has_template else 'inputs = tokenizer("A language model is", return_tensors="pt")',
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))",
    ]
    return as_code("\n".join(lines), "python")


def _how(folder: Path, record: dict[str, Any]) -> str:
    settings = _part(record, "objective.") if taught(record) else {"ce_weight": record["objective.ce_weight"]}
    run = _part(record, "run.")
    rows = [(name.replace("_", " "), f"{value}") for name, value in settings.items()]
    rows += [(name, run[name]) for name in ("steps", "ranks", "device", "date") if run.get(name)]
    command = f"\n\n{as_code(run['command'], 'text')}" if run.get("command") else ""
    options = (folder / OPTIONS_FILE).read_text() if (folder / OPTIONS_FILE).is_file() else ""
    told = f"\n\n`{OPTIONS_FILE}`, for `llm-distill train --config {OPTIONS_FILE}`:\n\n{as_code(options, 'yaml')}"
    return Table(("setting", "value"), rows).markdown() + command + (told if options else "")


def _results(folder: Path, record: dict[str, Any], report: dict[str, Any] | None) -> Iterator[str]:
    if report is None:
        figures = list(_trained_figures(record))
        if figures:
            rows = [(LABELS[name] + (f" ({data})" if data else ""), f"{value:.4g}") for name, data, value in figures]
            yield f"## Results on held-out text\n\n{Table(('figure', 'value'), rows).markdown()}"
        return
    quality, likeness = [], []
    domains: dict[str, DomainFigures] = report["domains"]
    for name, domain in domains.items():
        for model in MODELS:
            if of_model := domain["models"].get(model):
                losses = (_interval(of_model.get(figure)) for figure in LOSSES)
                quality.append((name, model, f"{domain['tokens']:,}", *losses))
        gap, alike = domain["gap_closed"], domain["likeness"] or {}
        if gap or alike:
            likeness.append((name, _interval(gap), *(_interval(alike.get(figure)) for figure in LIKENESS)))
    header = ("domain", "model", "tokens", *(LABELS[figure] for figure in LOSSES))
    made = f"With 95% intervals, {escape_markdown(report['date'])}."
    yield f"## Results on held-out text\n\n{made}\n\n{Table(header, quality).markdown()}\n"
    if likeness:
        table = Table(("domain", "gap closed", *(LABELS[figure] for figure in LIKENESS)), likeness)
        yield f"How like its teacher it is:\n\n{table.markdown()}"
    yield "\n\n".join(
        f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in PICTURES if (folder / name).is_file()
    )
    pages = [f"[{name}]({name})" for name in REPORT_PAGES if (folder / name).is_file()]
    yield f"The whole report: {', '.join(pages)}." if pages else ""


def _trained_figures(record: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(figure, dataset, value) of the last evaluation in training: of `eval_ce`, or of `eval_NAME_ce`."""
    for key, value in record.get("run.figures", {}).items():
        figure = max((name for name in LABELS if key.endswith(f"_{name}")), key=len, default=None)
        if figure:
            yield figure, key.removeprefix("eval_").removesuffix(figure).rstrip("_"), value


def _eval_results(record: dict[str, Any], report: dict[str, Any] | None) -> Iterator[EvalResult]:
    """For `model-index`, by which the Hub shows figures."""
    if report is None:
        figures = [(data or "held-out text", figure, value) for figure, data, value in _trained_figures(record)]
    else:
        figures = [
            (domain, figure, interval["value"])
            for domain, values in report["domains"].items()
            for part in (values["models"].get("student") or {}, values.get("likeness") or {})
            for figure, interval in part.items()
            if figure in LABELS and interval is not None and interval["value"] is not None
        ]
    for domain, figure, value in figures:
        yield EvalResult(
            task_type="text-generation",
            task_name="Text generation",
            dataset_type=re.sub(r"\W+", "-", domain).strip("-").lower(),  # by which the Hub tells them apart
            dataset_name=domain,
            metric_type=figure,
            metric_name=LABELS[figure],
            metric_value=value,
        )


def _limits(record: dict[str, Any], report: dict[str, Any] | None, folder: Path) -> str:
    """What is not known, and what is known to be bad, in words."""
    lines = []
    if taught(record):
        lines.append("It imitates its teacher: what that gets wrong, or says with prejudice, it says too.")
        lines += [
            f"The teacher was loaded in {teacher['bits']} bits, and it learned from that, not from the full weights."
            for teacher in teachers_of(_teacher(record))
            if teacher.get("bits")
        ]
    options = read_options(folder)
    if options.get("max_length"):
        lines.append(f"It was trained on at most {options['max_length']:,} tokens at a time.")
    if report is None:
        lines.append(
            "Its figures are those of the evaluation while it was trained; no gap report was made."
            if record.get("run.figures")
            else "It was not evaluated: nothing is known of how good it is."
        )
    else:
        if report.get("comparable", True) is not True:
            lines.append(
                f"It is not compared with its teacher token by token: {escape_markdown(report['comparable'])}."
            )
        closed = {name: figures.get("gap_closed") for name, figures in report["domains"].items()}
        gaps = {name: figure["value"] for name, figure in closed.items() if figure and figure["value"] is not None}
        if len(gaps) > 1:
            worst = min(gaps, key=lambda name: gaps[name])
            where = f"{escape_markdown(worst)}: {gaps[worst]:.0%} of the gap is closed there"
            lines.append(f"It is weakest, beside its teacher, on {where}.")
        measured = {part for part in PARTS if report.get(part) and not isinstance(report[part].get("skipped"), str)}
        if lacking := [what for part, what in PARTS.items() if part not in measured]:
            lines.append(f"Not measured: {', '.join(lacking)}.")
        lines.append("The figures hold for text like that of these domains, and for no other.")
    return "\n".join(f"- {line}" for line in lines)


def _interval(figure: Interval | None) -> str:
    return "" if figure is None else format_interval(figure, ".4g")
