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

from llm_distill.evaluation.bias import bias_table
from llm_distill.evaluation.compare import TEACHER
from llm_distill.evaluation.domains import a_sample, measure_domain
from llm_distill.evaluation.generations import generations_table
from llm_distill.evaluation.harness import tasks_table
from llm_distill.evaluation.measure import machine
from llm_distill.evaluation.resources import resources_table
from llm_distill.evaluation.statistics import Interval, as_text
from llm_distill.models import describe_model
from llm_distill.ranks import ranks
from llm_distill.teachers.base import Teacher

FORMAT = 1
NAME = "report"
"""Of the files: report.json, report.md, report.html and report_*.png."""
SECTIONS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "generations": ("What they write", lambda found: "\n\n".join(map(generations_table, found.values()))),
    "tasks": ("Tasks", tasks_table),
    "bias": ("Bias transfer", bias_table),
    "resources": ("Speed, memory, energy", resources_table),
}
LIKENESS = {
    "kl": "KL(teacher‖student), nats",
    "reverse_kl": "KL(student‖teacher), nats",
    "top1_agreement": "same likeliest token",
    "acceptance": "Σ min(p, q)",
}
SHARES = ("top1_agreement", "acceptance", "accuracy", "ece", "student_ece", "teacher_ece", "gap_closed")


def header(command: str) -> dict[str, Any]:
    """What a report begins with: when, where and by which command it was made."""
    device = ranks().device
    found = machine("cuda" if device.type == "cuda" else "cpu")
    versions = found.pop("versions")
    return {"format": FORMAT, "date": found.pop("date"), "command": command, "machine": found, "versions": versions}


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
    described = describe_model(model.get_base_model() if isinstance(model, PeftModel) else model, tokenizer)
    content |= {"student": described, TEACHER: teacher.describe(), "comparable": True, "domains": {}}
    for name, dataset in datasets.items():
        options: dict[str, Any] = {"collate": collate, "tokenizer": tokenizer, "batch_size": batch_size, "name": name}
        content["domains"][name] = measure_domain({"student": model}, teacher, a_sample(dataset, max_texts), **options)
    return GapReport(content)


@dataclass(frozen=True, repr=False)
class GapReport:
    """Shows itself in Jupyter. `content` is what report.json holds; `figure` and every other is
    `{"value", "low", "high"}`, the ends of a 95 % bootstrap interval over texts.
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
        try:
            content = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no gap report. ({error})") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} is no gap report of format {FORMAT}: make it anew with `llm-distill evaluate`.")
        return cls(content)

    def save(self, folder: str | Path) -> Path:
        """Writes all its forms into `folder`, the plots where matplotlib is installed; returns the page's path."""
        from llm_distill.evaluation.html import as_page

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in self.plots():
            figure.savefig(folder / f"{NAME}_{name}.png", dpi=120)
        (folder / f"{NAME}.md").write_text(self.as_markdown())
        (folder / f"{NAME}.html").write_text(as_page(self))
        (folder / f"{NAME}.json").write_text(
            json.dumps(_without_nan(self.content), indent=1, ensure_ascii=False) + "\n"
        )
        return folder / f"{NAME}.html"

    def plots(self) -> Iterator[tuple[str, Any]]:
        """(name, matplotlib figure); none without matplotlib."""
        with suppress(ImportError):
            from llm_distill.evaluation.plots import plots

            yield from plots(self.content)

    def headline(self) -> str:
        """The report in a sentence or two."""
        domains: dict[str, Any] = self.content["domains"]
        name, domain = next(iter(domains.items()))
        student, teacher = (domain["models"][each]["bits_per_byte"]["value"] for each in ("student", TEACHER))
        said = [f"On {name}, the student takes {student:.3f} bits a byte and its teacher {teacher:.3f}."]
        if domain["gap_closed"] is not None:
            said.append(
                f"It closes {shown(domain['gap_closed'], 'gap_closed')} of the gap between baseline and teacher."
            )
        if likeness := domain["likeness"]:
            agreement, accepted = (f"{likeness[key]['value']:.0%}" for key in ("top1_agreement", "acceptance"))
            said.append(f"Their likeliest token is the same in {agreement} of places, and speculative decoding would "
                        f"accept {accepted} of its tokens.")  # fmt: skip
        if len(domains) > 1:
            said.append(f"It is furthest behind on {self.domain_that_lost_most()}.")
        return " ".join(said)

    def domain_that_lost_most(self) -> str:
        """By bits a byte more than the teacher."""
        domains: dict[str, Any] = self.content["domains"]
        return max(domains, key=lambda name: domains[name]["behind"]["value"])

    def as_markdown(self) -> str:
        """Its tables, without the passages."""
        parts = ["# Gap report", self.headline(), self.subjects_table(), "## Quality", self.quality_table()]
        if self.content["comparable"] is not True:
            parts.append(f"Likeness is not comparable: {self.content['comparable']}")
        else:
            parts += ["## Likeness", self.likeness_table()]
        parts += ["## Calibration", self.calibration_table()]
        for title, body in self.sections():
            parts += [f"## {title}", body]
        parts.append(self.made())
        return "\n\n".join(parts) + "\n"

    def sections(self) -> Iterator[tuple[str, str]]:
        """(title, Markdown) of the parts that were measured, or why one was not."""
        for key, (title, table) in SECTIONS.items():
            if found := self.content.get(key):
                yield title, f"Skipped: {found['skipped']}" if "skipped" in found else table(found)

    def subjects_table(self) -> str:
        """Who is compared."""
        rows = []
        for name in ("student", TEACHER, "baseline"):
            if described := self.content.get(name):
                parameters = described.get("parameters")
                size = f"{parameters / 1e6:,.2f} M" if parameters else ""
                said = [described.get(key) for key in ("model", "revision", "dtype")]
                rows.append([name, *(str(value or "") for value in said), size])
        return table(["", "model", "revision", "dtype", "parameters"], rows)

    def quality_table(self) -> str:
        """Losses of all models on all domains."""
        rows = []
        for domain, found in self.content["domains"].items():
            for model, figures in found["models"].items():
                cells = [shown(figures[key]) for key in ("loss", "perplexity", "bits_per_byte")]
                gap = found["gap_closed"] and shown(found["gap_closed"], "gap_closed")
                rows.append(
                    [domain, model, *cells, *([shown(found["behind"]), gap or ""] if model == "student" else ["", ""])]
                )
        header = [
            "domain",
            "model",
            "loss, nats a token",
            "perplexity",
            "bits a byte",
            "more than the teacher",
            "gap closed",
        ]
        return table(header, rows)

    def likeness_table(self) -> str:
        """Student and baseline beside the teacher on all domains."""
        rows = []
        for domain, found in self.content["domains"].items():
            for model, key in (("student", "likeness"), ("baseline", "baseline_likeness")):
                if figures := found.get(key):
                    rows.append([domain, model, *(shown(figures[name], name) for name in LIKENESS)])
        return table(["domain", "beside the teacher", *LIKENESS.values()], rows)

    def where_table(self, domain: str, key: str) -> str:
        """A domain's figures `by_position` or `by_frequency`."""
        names = [name for name in self.content["domains"][domain][key][0] if name not in ("from", "to", "tokens")]
        rows = [
            [
                f"{each['from']:,}–{each['to'] or ''}",
                f"{each['tokens']:,}",
                *(shown(each[name], name) for name in names),
            ]
            for each in self.content["domains"][domain][key]
        ]
        return table([key.removeprefix("by_"), "tokens", *(name.replace("_", " ") for name in names)], rows)

    def calibration_table(self) -> str:
        """Of every model on every domain."""
        rows = [
            [domain, model, *(shown(figures[key], key) for key in ("accuracy", "ece"))]
            for domain, found in self.content["domains"].items()
            for model, figures in found["calibration"].items()
        ]
        return table(["domain", "model", "next token right", "expected calibration error"], rows)

    def made(self) -> str:
        """Where the figures come from."""
        machine = ", ".join(f"{value}" for value in self.content["machine"].values() if value)
        sizes = "; ".join(
            f"{name}: {d['texts']:,} texts, {d['tokens']:,} tokens" for name, d in self.content["domains"].items()
        )
        how = "Intervals are 95 % bootstraps over texts."
        return f"{self.content['date']}, {machine}. {sizes}. {how} `{self.content['command']}`"

    def _repr_html_(self) -> str:
        from llm_distill.evaluation.html import as_fragment

        return as_fragment(self)

    def __repr__(self) -> str:
        return self.as_markdown()


def shown(figure: Interval | None, name: str = "") -> str:
    """A figure with its interval, as text."""
    if figure is None or figure["value"] is None:
        return "–"  # JSON has no NaN
    return as_text(figure, ".1%" if name in SHARES else ".4g")


def table(header: list[str], rows: list[list[str]]) -> str:
    """Markdown, without columns that are empty; those that are all numbers stand on the right."""
    columns = [(name, [row[i] for row in rows]) for i, name in enumerate(header) if any(row[i] for row in rows)]
    right = [all(cell[:1].isdigit() or cell[:1] in ("", "-", "–") for cell in cells) for _, cells in columns]
    lines = [[name for name, _ in columns], ["---:" if each else "---" for each in right]]
    lines += [list(row) for row in zip(*(cells for _, cells in columns), strict=True)]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
