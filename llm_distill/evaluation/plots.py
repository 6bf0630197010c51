"""The gap report's pictures."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from llm_distill.evaluation.figures import CALIBRATION_BINS, DomainFigures
from llm_distill.evaluation.resources import LABELS
from llm_distill.evaluation.statistics import Interval

COLOURS = {"teacher": "black", "student": "#c2410c", "baseline": "#7a7a7a"}
OF_DOMAINS = ("#c2410c", "#1d4ed8", "#15803d", "#a21caf", "#0e7490", "#7a7a7a")
RATIOS = (
    *("parameters", "bytes_on_disk", "peak_memory_bytes", "time_to_first_token_seconds"),
    *("prefill_tokens_per_second", "decode_tokens_per_second", "joules_per_token"),
)


def plots(content: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of each that the report has the figures for. The caller need not close them."""
    domains: dict[str, DomainFigures] = content["domains"]
    yield "quality", _plot_quality(domains)
    if all(domain["likeness"] for domain in domains.values()):
        yield "furthest", _plot_furthest(domains)
    yield "calibration", _plot_calibration(domains)
    if "cka" in content.get("layers", {}):
        yield "layers", _plot_layers(content["layers"]["cka"])
    if content.get("resources", {}).get("models"):
        yield "resources", _plot_resources(content["resources"]["models"])


def _plot_quality(domains: dict[str, DomainFigures]) -> Figure:
    """Bits a byte of every model on every domain."""
    figure, (axis,) = _figure(1, height=1.4 + 0.45 * len(domains))
    for model, colour in COLOURS.items():
        of_domain = (domain["models"].get(model) for domain in domains.values())
        losses = {place: figures["bits_per_byte"] for place, figures in enumerate(of_domain) if figures}
        if losses:
            values, errors = _with_errors(list(losses.values()))
            axis.errorbar(values, list(losses), xerr=errors, fmt="o", color=colour, capsize=3, label=model)
    axis.set(xlabel="bits a byte (less is better)", title="Quality")
    _label_rows(axis, list(map(_as_text, domains)))
    return figure


def _plot_furthest(domains: dict[str, DomainFigures]) -> Figure:
    """Mean KL over positions, and over how often a token occurs."""
    figure, axes = _figure(2)
    for (name, domain), colour in zip(domains.items(), itertools.cycle(OF_DOMAINS), strict=False):
        for axis, bins in zip(axes, (domain["by_position"], domain["by_frequency"]), strict=True):
            values, errors = _with_errors([figures["kl"] for figures in bins])
            places = [max(figures["from"], 1) for figures in bins]
            axis.errorbar(places, values, yerr=errors, fmt="o-", ms=4, capsize=2, color=colour, label=_as_text(name))
    axes[0].set(xscale="log", xlabel="position in the text", ylabel="KL(teacher‖student), nats", title="By position")
    axes[1].set(xscale="log", xlabel="how often the token occurs in these texts", title="By frequency")
    for axis in axes:
        axis.set_ylim(bottom=0)
    axes[1].legend(frameon=False)
    return figure


def _plot_calibration(domains: dict[str, DomainFigures]) -> Figure:
    """Accuracy against confidence, all domains together."""
    figure, (axis,) = _figure(1, width=4.6, height=4.2)
    axis.plot([0, 1], [0, 1], color="#d4d4d4", linewidth=1)
    for model, colour in COLOURS.items():
        sums = np.zeros((CALIBRATION_BINS + 1, 3))  # of tokens, confidence and accuracy; the last bin is that of 1
        for domain in domains.values():
            for part in domain["calibration"].get(model, {}).get("bins", []):
                values = np.array([1.0, part["confidence"], part["accuracy"]])
                sums[int(part["confidence"] * CALIBRATION_BINS)] += part["tokens"] * values
        tokens, confidence, accuracy = sums[sums[:, 0] > 0].T
        if len(tokens):
            axis.plot(confidence / tokens, accuracy / tokens, "o-", ms=4, color=colour, label=model)
    axis.set(xlabel="confidence", ylabel="accuracy", title="Calibration", xlim=(0, 1), ylim=(0, 1))
    axis.legend(frameon=False)
    return figure


def _plot_layers(cka: list[list[float]]) -> Figure:
    """How like each of the student's layers is to each of the teacher's."""
    values = np.array(cka)
    figure, (axis,) = _figure(1, width=5.4, height=max(2.2, 1.2 + 4.2 * min(1.0, len(values) / len(values[0]))))
    students, teachers = (np.arange(size + 1) + 0.5 for size in values.shape)
    picture = axis.pcolormesh(teachers, students, values, cmap="Oranges", vmin=0, vmax=1)
    axis.invert_yaxis()
    axis.set(xlabel="teacher's layer", ylabel="student's layer", title="Which layers are alike (linear CKA)")
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_locator(MaxNLocator(integer=True))
    bar: Any = figure.colorbar(picture, ax=axis)
    bar.solids.set_rasterized(False)  # a page that holds no picture files
    return figure


def _plot_resources(models: dict[str, Any]) -> Figure:
    """Each figure as a multiple of the teacher's; of several batch sizes the largest."""
    figure, (axis,) = _figure(1, height=1.2 + 0.4 * len(RATIOS))
    others = [name for name, model in models.items() if name != "teacher" and model.get("ratio_to_teacher")]
    for name, colour in zip(others, itertools.cycle(OF_DOMAINS), strict=False):
        ratios = [models[name]["ratio_to_teacher"].get(key) for key in RATIOS]
        values = [list(ratio.values())[-1] if isinstance(ratio, dict) else ratio for ratio in ratios]
        axis.plot(values, range(len(RATIOS)), "o", color=colour, label=name)
    axis.axvline(1, color="black", linewidth=1)
    axis.set(xscale="log", xlabel="× teacher", title="Resources")
    _label_rows(axis, [LABELS[key][0].partition(",")[0] for key in RATIOS])
    return figure


def _as_text(name: str) -> str:
    """In which matplotlib sees no formula."""
    return name.replace("$", r"\$")


def _label_rows(axis: Axes, labels: Sequence[str]) -> None:
    """The first on top."""
    axis.set(yticks=range(len(labels)), yticklabels=labels, ylim=(len(labels) - 0.5, -0.5))
    axis.legend(frameon=False)


def _figure(columns: int, width: float = 7.5, height: float = 3.4) -> tuple[Figure, Sequence[Axes]]:
    """Not of pyplot's own list, so that nothing has to be closed and a notebook does not show it twice."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _with_errors(figures: Sequence[Interval]) -> tuple[list[float], tuple[list[float], list[float]]]:
    below = [figure["value"] - figure["low"] for figure in figures]
    above = [figure["high"] - figure["value"] for figure in figures]
    return [figure["value"] for figure in figures], (below, above)
