"""What a student is taught from a cache, beside what the teacher itself would teach it.

Forward KL pulls the student's distribution q towards a target: the gradient on its logits is q − p for the teacher's
own p, and q·Σp̂ − p̂ for what a cache makes of it. For top-k with tail p̂ has the tail's mass where q has it, for samples
it is their weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from llm_distill.cache.codec import SparseRows, decode, decode_hidden
from llm_distill.cache.methods import Hidden, Hybrid, Method, TopK
from llm_distill.cache.select import encode_examples, log_probabilities, packed_size, select
from llm_distill.rows import Example
from llm_distill.signals import HiddenSignal, MixtureSignal
from llm_distill.tables import Table

ALTERNATIVES: tuple[Method, ...] = (
    *(TopK(32), Hybrid(0.02), Hidden("int8")),
    *(TopK(128), Hybrid(0.005), TopK(8), Hybrid(0.1)),
    *(TopK(512, threshold=0.001), Hidden("bfloat16"), TopK(512, threshold=0.01)),
    *(TopK(64), Hybrid(0.05), TopK(16), Hybrid(0.01), TopK(4), Hybrid(0.2)),
)
"""What the plot compares a cache with: first some of each kind, as the time may not suffice for all."""


class Sample(NamedTuple):
    """Some rows: what the teacher says, and where the student stands."""

    examples: Sequence[Example]
    teacher: HiddenSignal | MixtureSignal
    student: HiddenSignal


class Fidelity(NamedTuple):
    """Means over the rows of a sample."""

    bytes_per_token: float
    kl: float
    """KL(p‖p̂), in nats; infinite for samples."""
    gradient_error: float
    """‖ĝ − g‖ / ‖g‖ over all rows and logits."""
    gradient_cosine: float
    """Of ĝ and g, over all rows and logits."""
    bias: float
    """‖Σ (ĝ − g)‖ / ‖Σ g‖, the sums over rows: what does not cancel out."""
    coverage: float
    """The teacher's mass of the tokens that are stored."""

    @property
    def is_drawn(self) -> bool:
        """Whether tokens are drawn at random: those that were not have no weight, which no KL forgives."""
        return math.isinf(self.kl)


@torch.no_grad()
def fidelity(method: Method, sample: Iterable[Sample], temperature: float, seed: int) -> Fidelity:
    """How true what `method` stores of the rows of a sample is; they are packed and read as in a cache."""
    totals: dict[str, Any] = dict.fromkeys(("rows", "kl", "error", "exact", "seen", "dot", "coverage"), 0.0)
    bias: Tensor | float = 0.0
    gradient: Tensor | float = 0.0
    columns: list[dict[str, bytes]] = []
    for part in sample:
        selected = select(method, part.teacher, part.examples, temperature, seed)
        packed = [columns for _, columns in encode_examples(method, selected, part.examples)]
        columns += packed
        for p, q, target, covered in _targets(method, packed, part, temperature):
            exact, seen = q - p, q * target.sum(-1, keepdim=True) - target
            known = p > 0
            totals["rows"] += len(p)
            totals["kl"] += float((p[known] * (p[known] / target[known]).log()).sum())
            totals["error"] += float((seen - exact).square().sum())
            totals["exact"] += float(exact.square().sum())
            totals["seen"] += float(seen.square().sum())
            totals["dot"] += float((seen * exact).sum())
            totals["coverage"] += float(p[covered].sum())
            bias, gradient = bias + (seen - exact).sum(0), gradient + exact.sum(0)
    assert isinstance(bias, Tensor), "a sample has rows"
    assert isinstance(gradient, Tensor), "a sample has rows"
    return Fidelity(
        bytes_per_token=packed_size(columns) / totals["rows"],
        kl=max(0.0, totals["kl"] / totals["rows"]),
        gradient_error=math.sqrt(_ratio(totals["error"], totals["exact"])),
        gradient_cosine=_ratio(totals["dot"], math.sqrt(totals["exact"] * totals["seen"])),
        bias=_ratio(float(bias.norm()), float(gradient.norm())),
        coverage=totals["coverage"] / totals["rows"],
    )


def _ratio(part: float, whole: float) -> float:
    """Infinite beside nothing, as where the student says just what the teacher says."""
    return part / whole if whole else math.inf if part else 0.0


def effective_target(rows: SparseRows, q: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
    """p̂: what the gradient of forward KL pulls q towards."""
    target = torch.zeros_like(q).scatter_add_(1, rows.ids, rows.log_weights.exp().to(q))
    if rows.log_tail is None:
        return target
    outside = q * (target == 0)
    share = rows.log_tail.exp().to(q) / outside.sum(-1).clamp(min=1e-30)
    return target + outside * share[:, None]


def _targets(
    method: Method, packed: list[dict[str, bytes]], sample: Sample, temperature: float
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """p, q, p̂ and which tokens are stored, a chunk of rows at a time: each [chunk, vocab]."""
    teachers, students = (log_probabilities(s, temperature) for s in (sample.teacher, sample.student))
    if isinstance(method, Hidden):
        assert isinstance(sample.teacher, HiddenSignal)
        like = sample.teacher.hidden
        hidden = decode_hidden(method, packed, like.shape[1]).to(like)
        stored = log_probabilities(HiddenSignal(hidden, sample.teacher.head), temperature)
        for (_, log_p), (_, log_q), (_, log_target) in zip(teachers, students, stored, strict=True):
            yield log_p.exp(), log_q.exp(), log_target.exp(), torch.ones_like(log_p, dtype=torch.bool)
        return
    rows = decode(method, packed)
    for (start, log_p), (_, log_q) in zip(teachers, students, strict=True):
        parts: Any = (x if x is None else x[start : start + len(log_p)].to(log_p.device) for x in rows)
        chunk = SparseRows(*parts)
        target = effective_target(chunk, log_q.exp())
        is_stored = torch.zeros_like(target).scatter_add_(1, chunk.ids, chunk.log_weights.exp()) > 0
        yield log_p.exp(), log_q.exp(), target, is_stored


def as_table(measured: dict[str, Fidelity]) -> Table:
    """A line per method."""
    rows = [
        [
            name,
            f"{fidelity.bytes_per_token:.1f}",
            "" if fidelity.is_drawn else f"{fidelity.kl:.4f}",
            *(f"{value:.4f}" for value in (fidelity.gradient_error, fidelity.gradient_cosine)),
            "none" if fidelity.is_drawn else f"{fidelity.bias:.4f}",
            f"{fidelity.coverage:.1%}",
        ]
        for name, fidelity in measured.items()
    ]
    return Table(["", "bytes a token", "KL(p‖p̂)", "gradient error", "cosine", "bias", "coverage"], rows)


def explain(fidelity: Fidelity) -> str:
    """What a line of the table says, in words."""
    gradient = (
        "Gradient error and cosine: how far what the cache teaches about a token is from what the teacher itself would "
        "teach (0 and 1 are exact)."
    )
    if not fidelity.is_drawn:
        return f"{gradient} Bias: what of the error does not average out over tokens. KL: of the stored distribution."
    return (
        f"{gradient} Tokens are drawn at random here, so the error is noise, which averages out over tokens and steps: "
        f"summed over this sample it is still {fidelity.bias:.0%} of the gradient, and there is no bias. What was not "
        "drawn has no weight, so there is no KL."
    )


def plot(path: Path, measured: dict[str, Fidelity], chosen: str | None = None) -> None:
    """Gradient error against bytes, a line per method, into a PNG.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.2), constrained_layout=True)
    colours = iter(("#c2410c", "#1d4ed8", "#7a7a7a", "#15803d", "#a21caf", "#0e7490"))
    points = {name: (measure.bytes_per_token, measure.gradient_error) for name, measure in measured.items()}
    for family in dict.fromkeys(name.split("(")[0] for name in measured):
        line = sorted(point for name, point in points.items() if name.split("(")[0] == family)
        axes.plot(*zip(*line, strict=True), "o-", color=next(colours, "black"), label=family, markersize=4)
    if chosen is not None:
        axes.plot(*points[chosen], "*", color="black", markersize=14, label=chosen)
    axes.set(
        xlabel="bytes a token",
        ylabel="gradient error ‖ĝ − g‖ / ‖g‖",
        xscale="log",
        yscale="log",
        title="Fidelity and size",
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
