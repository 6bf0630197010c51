"""The gap report: what the student is beside its teacher, as JSON, Markdown and one page of HTML with plots."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llm_distill.evaluation.bias import bias_tables
from llm_distill.evaluation.cka import layers_parts
from llm_distill.evaluation.compare import TEACHER, HeldOutTexts
from llm_distill.evaluation.domains import measure_domain, sample_texts
from llm_distill.evaluation.figures import LIKENESS, LOSSES, DomainFigures
from llm_distill.evaluation.generations import generations_parts
from llm_distill.evaluation.harness import tasks_parts
from llm_distill.evaluation.html import Section, as_fragment, as_page
from llm_distill.evaluation.resources import resources_parts
from llm_distill.evaluation.stages import stage_parts
from llm_distill.evaluation.statistics import Interval, format_interval
from llm_distill.files import write_atomically
from llm_distill.heads import base_of
from llm_distill.losses.metrics import LABELS
from llm_distill.machine import describe_machine
from llm_distill.models import describe_model
from llm_distill.ranks import ranks
from llm_distill.tables import Table, as_code, escape_markdown
from llm_distill.teachers.base import Teacher

FORMAT = 1
NAME = "report"
"""Of the files: report.json, report.md, report.html and report_*.png."""
BESIDE_THE_DOMAINS: dict[str, tuple[str, Callable[[Any], Sequence[Table | str]]]] = {
    "previous": ("What was learned and forgotten", stage_parts),
    "generations": ("What they write", lambda domains: [p for d in domains.values() for p in generations_parts(d)]),
    "layers": ("Which layers are alike", layers_parts),
    "tasks": ("Tasks", tasks_parts),
    "bias": ("Bias transfer", bias_tables),
    "resources": ("Speed, memory, energy", resources_parts),
}
"""Other parts of the content: the title of each, and what makes a section of it."""
PLOTS = ("quality", "furthest", "calibration", "layers", "resources")
SHARES = ("top1_agreement", "acceptance", "accuracy", "ece", "student_ece", "teacher_ece", "gap_closed")
PASSAGES = (
    "The redder a token, the larger KL(teacher‖student) where it is predicted. Point at one to see what both expected. "
    "In grey, what comes before."
)


def header(command: str) -> dict[str, Any]:
    """What a report begins with: when, where and by which command it was made."""
    device = ranks().device
    machine = describe_machine("cuda" if device.type == "cuda" else "cpu")
    date, versions = machine.pop("date"), machine.pop("versions")
    return {"format": FORMAT, "date": date, "command": command, "machine": machine, "versions": versions}


def report_on(
    model: PreTrainedModel | PeftModel,
    teacher: Teacher,
    datasets: Mapping[str, Any],
    *,
    collate: Callable[[Sequence[Any]], Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    max_texts: int | None,
) -> GapReport:
    """Of models in memory on prepared datasets: the domains alone. See `DistillationTrainer.report`."""
    content = header("trainer.report()")
    described = describe_model(base_of(model), tokenizer)
    content |= {"student": described, TEACHER: teacher.describe(), "comparable": True, "domains": {}}
    for name, dataset in datasets.items():
        texts = HeldOutTexts(sample_texts(dataset, max_texts), collate, tokenizer, batch_size, name)
        content["domains"][name] = measure_domain({"student": model}, teacher, texts)
    return GapReport(content)


@dataclass(frozen=True, repr=False)
class GapReport:
    """Shows itself in Jupyter. `content` is what report.json holds. A figure in it is `{"value", "low", "high"}`, with
    the ends of a 95 % bootstrap interval over texts.
    """

    content: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> GapReport:
        """From report.json or the folder that holds it.

        Raises:
            ValueError: it is no report, or of another format.
        """
        path = Path(path)
        path = path / f"{NAME}.json" if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"there is no report {path}.")
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no gap report. ({error})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is no gap report of format {FORMAT}: make it anew with `llm-distill evaluate`.")
        report = cls(content)
        try:
            report.as_markdown()
            as_fragment("", report.subjects_table(), report.sections(), {}, "", "")
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{path} is a gap report without some of its figures, or with some that are none. ({error!r})"
            ) from error
        return report

    @property
    def domains(self) -> dict[str, DomainFigures]:
        """The figures of each dataset."""
        return self.content["domains"]

    def save(self, folder: str | Path) -> Path:
        """Writes all its forms into `folder`, the plots where matplotlib is installed; returns the page's path."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = json.dumps(_without_nan(self.content), indent=1, ensure_ascii=False)
        write_atomically(folder / f"{NAME}.json", (content + "\n").encode())  # the rest can be made of it
        (folder / f"{NAME}.md").write_text(self.as_markdown())
        (folder / f"{NAME}.html").write_text(as_page(self._repr_html_()))
        for name, figure in self.plots():
            figure.savefig(folder / f"{NAME}_{name}.png", dpi=120)
        return folder / f"{NAME}.html"

    def plots(self) -> Iterator[tuple[str, Any]]:
        """(name, matplotlib figure); none without matplotlib."""
        with suppress(ImportError):
            from llm_distill.evaluation.plots import plots

            yield from plots(self.content)

    def headline(self, name: str | None = None) -> str:
        """The report in a sentence or two, on a domain, by default the first."""
        if not self.domains:
            return "No domain was measured."
        name = next(iter(self.domains)) if name is None else name
        domain = self.domains[name]
        student, teacher = (domain["models"][model]["bits_per_byte"]["value"] for model in ("student", TEACHER))
        sentences = [f"On {name}, the student takes {student:.3f} bits a byte and its teacher {teacher:.3f}."]
        if gap := domain["gap_closed"]:
            sentences.append(f"It closes {format_figure('gap_closed', gap)} of the gap between baseline and teacher.")
        if likeness := domain["likeness"]:
            agreement, accepted = (f"{likeness[key]['value']:.0%}" for key in ("top1_agreement", "acceptance"))
            sentences.append(f"Their likeliest token is the same in {agreement} of places, and speculative decoding "
                             f"would accept {accepted} of its tokens.")  # fmt: skip
        if len(self.domains) > 1:
            sentences.append(f"It is furthest behind on {self.domain_that_lost_most()}.")
        return " ".join(sentences)

    def domain_that_lost_most(self) -> str:
        """By bits a byte more than the teacher."""
        return max(self.domains, key=lambda name: self.domains[name]["behind"]["value"])

    def as_markdown(self) -> str:
        """Its tables, without the passages."""
        sections = [section.markdown() for section in self.sections() if not section.passages]
        made = f"{escape_markdown(self.made())} {as_code(self.content['command'])}"
        headline, subjects = escape_markdown(self.headline()), self.subjects_table().markdown()
        return "\n\n".join(["# Gap report", headline, subjects, *sections, made]) + "\n"

    def sections(self) -> Iterator[Section]:
        """All that was measured, or why it was not."""
        comparable = self.content["comparable"]
        lost = [f"{name}: {domain['lost']}." for name, domain in self.domains.items() if "lost" in domain]
        left_out = [f"Left out of {name}: {what}." for name, what in self.content.get("left_out", {}).items()]
        yield Section("Quality", [self.quality_table(), *lost, *left_out], plot="quality")
        if comparable is True:
            folded = {
                f"By position and frequency: {name}": [
                    self.where_table(name, "by_position"),
                    self.where_table(name, "by_frequency"),
                ]
                for name in self.domains
            }
            yield Section("Likeness", [self.likeness_table()], plot="furthest", folded=folded)
        else:
            yield Section("Likeness", [f"Likeness is not comparable: {comparable}"])
        for name, domain in self.domains.items():
            if passages := domain.get("passages"):
                tokens = {"Tokens with the largest mean KL": [self.tokens_table(name)]}
                yield Section(f"Where it is furthest off: {name}", [PASSAGES], folded=tokens, passages=passages)
        yield Section("Calibration", [self.calibration_table()], plot="calibration")
        for key, (title, parts_of) in BESIDE_THE_DOMAINS.items():
            if measured := self.content.get(key):
                skipped = measured.get("skipped")  # of tasks this is a dict, beside what was not
                yield Section(title, [f"Skipped: {skipped}"] if isinstance(skipped, str) else parts_of(measured), key)

    def subjects_table(self) -> Table:
        """Who is compared."""
        rows = []
        for name in ("student", TEACHER, "baseline"):
            if model := self.content.get(name):
                size = f"{model['parameters'] / 1e6:,.2f} M" if model.get("parameters") else ""
                rows.append([name, *(model.get(key) or "" for key in ("model", "revision", "dtype")), size])
        return Table(["", "model", "revision", "dtype", "parameters"], rows).without_empty_columns()

    def quality_table(self) -> Table:
        """Losses of all models on all domains."""
        rows = []
        for name, domain in self.domains.items():
            gap = format_figure("gap_closed", domain["gap_closed"]) if domain["gap_closed"] else ""
            for model, figures in domain["models"].items():
                losses = [format_figure(key, figures[key]) for key in LOSSES]
                beside = [format_figure("behind", domain["behind"]), gap] if model == "student" else ["", ""]
                rows.append([name, model, *losses, *beside])
        header = ["domain", "model", *(LABELS[key] for key in LOSSES), "more than the teacher", "gap closed"]
        return Table(header, rows).without_empty_columns()

    def likeness_table(self) -> Table:
        """Student and baseline beside the teacher on all domains."""
        rows = []
        for name, domain in self.domains.items():
            for model, figures in (("student", domain["likeness"]), ("baseline", domain.get("baseline_likeness"))):
                if figures:
                    rows.append([name, model, *(format_figure(key, figures[key]) for key in LIKENESS)])
        return Table(["domain", "beside the teacher", *(LABELS[key] for key in LIKENESS)], rows)

    def where_table(self, domain: str, key: str) -> Table:
        """A domain's figures `by_position` or `by_frequency`."""
        bins: list[dict[str, Any]] = self.content["domains"][domain][key]
        names = [name for name in bins[0] if name not in ("from", "to", "tokens")]
        rows = [
            [
                f"{figures['from']:,}–{figures['to'] or ''}",
                f"{figures['tokens']:,}",
                *(format_figure(name, figures[name]) for name in names),
            ]
            for figures in bins
        ]
        return Table([key.removeprefix("by_"), "tokens", *(name.replace("_", " ") for name in names)], rows)

    def tokens_table(self, domain: str) -> Table:
        """The tokens of a domain with the largest mean KL."""
        rows = [
            [
                repr(token["token"]),
                f"{token['count']:,}",
                *(f"{token[key]:.2f}" for key in ("kl", "student_loss", "teacher_loss")),
            ]
            for token in self.domains[domain].get("furthest_tokens", [])
        ]
        return Table(["token", "times", "mean KL", "student's loss", "teacher's loss"], rows)

    def calibration_table(self) -> Table:
        """Of every model on every domain."""
        rows = [
            [name, model, *(format_figure(key, figures[key]) for key in ("accuracy", "ece"))]
            for name, domain in self.domains.items()
            for model, figures in domain["calibration"].items()
        ]
        return Table(["domain", "model", "next token right", "expected calibration error"], rows)

    def made(self) -> str:
        """When and where, and of how many texts."""
        machine = ", ".join(f"{value}" for value in self.content["machine"].values() if value)
        sizes = "; ".join(f"{name}: {d['texts']:,} texts, {d['tokens']:,} tokens" for name, d in self.domains.items())
        return f"{self.content['date']}, {machine}. {sizes}. Intervals are 95 % bootstraps over texts."

    def _repr_html_(self) -> str:
        plots, subjects = dict(self.plots()), self.subjects_table()
        return as_fragment(self.headline(), subjects, self.sections(), plots, self.made(), self.content["command"])

    def __repr__(self) -> str:
        return self.as_markdown()


def format_figure(name: str, figure: Interval | None) -> str:
    """With its interval: SHARES as percentages."""
    return format_interval(figure, ".1%" if name in SHARES else ".4g")


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
