"""The gap report's pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = {"teacher": "black", "student": "#c2410c", "baseline": "#7a7a7a"}
RATIOS = {
    "parameters": "parameters",
    "bytes_on_disk": "on disk",
    "peak_memory_bytes": "peak memory",
    "time_to_first_token_seconds": "time to first token",
    "prefill_tokens_per_second": "prefill, tokens a second",
    "decode_tokens_per_second": "decode, tokens a second",
    "joules_per_token": "energy a token",
}
OF_DOMAINS = ("#c2410c", "#1d4ed8", "#15803d", "#a21caf", "#0e7490", "#7a7a7a")


def plots(content: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of each that the report has the figures for. The caller need not close them."""
    domains = content["domains"]
    yield "quality", _quality(domains)
    if all(domain["likeness"] for domain in domains.values()):
        yield "furthest", _furthest(domains)
    yield "calibration", _calibration(domains)
    if content.get("resources", {}).get("models"):
        yield "resources", _resources(content["resources"]["models"])


def _quality(domains: dict[str, Any]) -> Figure:
    """Bits a byte of every model on every domain."""
    names = list(domains)
    figure, axes = _figure(1, height=1.4 + 0.45 * len(names))
    for model, colour in COLOURS.items():
        found = [(i, domains[name]["models"][model]["bits_per_byte"]) for i, name in enumerate(names)
                 if model in domains[name]["models"]]  # fmt: skip
        if found:
            places, figures = zip(*found, strict=True)
            values, errors = _errors(figures)
            axes[0].errorbar(values, places, xerr=errors, fmt="o", color=colour, capsize=3, label=model)
    axes[0].set(yticks=range(len(names)), yticklabels=names, xlabel="bits a byte (less is better)", title="Quality")
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    axes[0].legend(frameon=False, loc="best")
    return figure


def _furthest(domains: dict[str, Any]) -> Figure:
    """Mean KL over positions, and over how often a token occurs."""
    figure, axes = _figure(2)
    for (name, domain), colour in zip(domains.items(), _repeated(OF_DOMAINS, len(domains)), strict=True):
        for axis, key in zip(axes, ("by_position", "by_frequency"), strict=True):
            values, errors = _errors([each["kl"] for each in domain[key]])
            places = [each["from"] for each in domain[key]]
            axis.errorbar(
                [max(place, 1) for place in places],
                values,
                yerr=errors,
                fmt="o-",
                ms=4,
                capsize=2,
                color=colour,
                label=name,
            )
    axes[0].set(xscale="log", xlabel="position in the text", ylabel="KL(teacher‖student), nats", title="By position")
    axes[1].set(xscale="log", xlabel="how often the token occurs in these texts", title="By frequency")
    for axis in axes:
        axis.set_ylim(bottom=0)
    axes[1].legend(frameon=False)
    return figure


def _calibration(domains: dict[str, Any]) -> Figure:
    """Accuracy against confidence, all domains together."""
    figure, axes = _figure(1, width=4.6, height=4.2)
    axes[0].plot([0, 1], [0, 1], color="#d4d4d4", linewidth=1)
    for model, colour in COLOURS.items():
        of_bin: dict[int, list[float]] = {}
        for domain in domains.values():
            for each in domain["calibration"].get(model, {}).get("bins", []):
                sums = of_bin.setdefault(int(each["confidence"] * 15), [0.0, 0.0, 0.0])
                for i, value in enumerate((1.0, each["confidence"], each["accuracy"])):
                    sums[i] += each["tokens"] * value
        points = [(c / n, a / n) for n, c, a in (of_bin[key] for key in sorted(of_bin))]
        if points:
            axes[0].plot(*zip(*points, strict=True), "o-", ms=4, color=colour, label=model)
    axes[0].set(xlabel="confidence", ylabel="accuracy", title="Calibration", xlim=(0, 1), ylim=(0, 1))
    axes[0].legend(frameon=False)
    return figure


def _resources(models: dict[str, Any]) -> Figure:
    """Each figure as a multiple of the teacher's; of several batch sizes the largest."""
    figure, axes = _figure(1, height=1.2 + 0.4 * len(RATIOS))
    others = [name for name, each in models.items() if name != "teacher" and each.get("ratio_to_teacher")]
    for name, colour in zip(others, _repeated(OF_DOMAINS, len(others)), strict=True):
        points = []
        for place, key in enumerate(RATIOS):
            ratio = models[name]["ratio_to_teacher"].get(key)
            ratio = list(ratio.values())[-1] if isinstance(ratio, dict) and ratio else ratio
            if ratio:
                points.append((ratio, place))
        axes[0].plot(*zip(*points, strict=True), "o", color=colour, label=name)
    axes[0].axvline(1, color="black", linewidth=1)
    axes[0].set(
        xscale="log", yticks=range(len(RATIOS)), yticklabels=RATIOS.values(), xlabel="× teacher", title="Resources"
    )
    axes[0].set_ylim(len(RATIOS) - 0.5, -0.5)
    axes[0].legend(frameon=False)
    return figure


def _figure(columns: int, width: float = 7.5, height: float = 3.4) -> tuple[Figure, Sequence[Axes]]:
    """Not of pyplot's own list, so that nothing has to be closed and a notebook does not show it twice."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _errors(figures: Sequence[dict[str, float]]) -> tuple[list[float], tuple[list[float], list[float]]]:
    values = [each["value"] for each in figures]
    below = [each["value"] - each["low"] for each in figures]
    above = [each["high"] - each["value"] for each in figures]
    return values, (below, above)


def _repeated(colours: Sequence[str], times: int) -> list[str]:
    return [colours[i % len(colours)] for i in range(times)]
