"""What the scores of a dataset say: each figure with its 95 % bootstrap interval over texts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from llm_distill.evaluation.compare import BESIDE_THE_TEACHER, TEACHER, Scores
from llm_distill.evaluation.statistics import Interval, bootstrap, interval

LOSSES = ("loss", "perplexity", "bits_per_byte")
LIKENESS = tuple(BESIDE_THE_TEACHER)
CALIBRATION_BINS = 15
FURTHEST_TOKENS, LEAST_OCCURRENCES = 12, 5
"""How many tokens are listed by their mean KL, and how often one must occur for its mean to be more than noise."""

Edges = list[tuple[int, int | None]]
Figures = dict[str, Interval]


class DomainFigures(TypedDict, total=False):
    """One dataset of the gap report. Without common tokens there is no `likeness`, and nothing that follows it."""

    texts: int
    tokens: int
    bytes: int
    lost: str
    """How many texts could not be used, in words; nothing if all could."""
    models: dict[str, Figures]
    """`loss_figures` of each model."""
    calibration: dict[str, dict[str, Any]]
    """`calibration_figures` of each model."""
    behind: Interval
    """Bits a byte that the student takes more than its teacher."""
    gap_closed: Interval | None
    likeness: Figures | None
    baseline_likeness: Figures
    by_position: list[dict[str, Any]]
    by_frequency: list[dict[str, Any]]
    furthest_tokens: list[dict[str, Any]]
    passages: list[dict[str, Any]]


def domain_figures(scores: Mapping[str, Scores], comparable: bool) -> DomainFigures:
    """All figures of one dataset, but for its `passages`.

    Args:
        scores: of the teacher, the student and, if there is one, the baseline.
        comparable: whether student and teacher have the same tokens; if not, only what needs no common ones is given.
    """
    student, teacher, baseline = scores["student"], scores[TEACHER], scores.get("baseline")
    domain = DomainFigures(
        texts=len(student.num_bytes),
        tokens=len(student.token),
        bytes=int(student.num_bytes.sum()),
        models={name: loss_figures(of_model) for name, of_model in scores.items()},
        calibration={name: calibration_figures(of_model) for name, of_model in scores.items()},
        behind=excess_bits_per_byte(student, teacher),
        gap_closed=None if baseline is None else gap_closed(student, teacher, baseline),
        likeness=likeness_figures(student) if comparable else None,
    )
    if comparable:
        if baseline is not None and "kl" in baseline.columns:
            domain["baseline_likeness"] = likeness_figures(baseline)
        domain["by_position"] = by_position(student, teacher)
        domain["by_frequency"] = by_frequency(student, teacher)
        domain["furthest_tokens"] = furthest_tokens(student, teacher)
    return domain


def loss_figures(scores: Scores) -> Figures:
    """`loss` in nats a token, `perplexity`, and `bits_per_byte`, which is comparable across tokenizers."""
    nats = scores.per_text(scores.columns["ce"])
    loss = interval(nats, scores.per_text())
    low, value, high = (math.exp(min(nats, 700)) for nats in (loss["low"], loss["value"], loss["high"]))
    return {
        "loss": loss,
        "perplexity": Interval(value=value, low=low, high=high),
        "bits_per_byte": interval(nats / math.log(2), scores.num_bytes),
    }


def likeness_figures(scores: Scores) -> Figures:
    """Means over tokens of how the student is beside its teacher."""
    return {name: interval(scores.per_text(scores.columns[name]), scores.per_text()) for name in LIKENESS}


def calibration_figures(scores: Scores) -> dict[str, Any]:
    """`ece`, the expected calibration error: the mean distance between confidence and accuracy over CALIBRATION_BINS
    bins of equal width, weighted by their tokens (Guo et al., 2017, arXiv:1706.04599, equation 3); `accuracy` of the
    likeliest token; `bins` for a reliability diagram.
    """
    confidence, correct = scores.columns["confidence"], scores.columns["correct"]
    bin_of_token = _confidence_bin(scores)
    bins = []
    for b in np.unique(bin_of_token):
        inside = bin_of_token == b
        means = {"confidence": float(confidence[inside].mean()), "accuracy": float(correct[inside].mean())}
        bins.append({"tokens": int(inside.sum()), **means})
    return {
        "ece": _calibration_error(scores, np.ones_like(bin_of_token)),
        "accuracy": interval(scores.per_text(correct), scores.per_text()),
        "bins": bins,
    }


def _confidence_bin(scores: Scores) -> NDArray[np.int64]:
    return np.minimum((scores.columns["confidence"] * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)


def _calibration_error(scores: Scores, inside: NDArray[Any]) -> Interval:
    """Over the tokens for which `inside` is 1."""
    bin_of_token = _confidence_bin(scores)
    gaps = (scores.columns["correct"] - scores.columns["confidence"]) * inside
    columns = [scores.per_text(gaps * (bin_of_token == b)) for b in range(CALIBRATION_BINS)]
    return bootstrap(np.stack([*columns, scores.per_text(inside)]), lambda sums: np.abs(sums[:-1]).sum(0) / sums[-1])


def excess_bits_per_byte(student: Scores, teacher: Scores) -> Interval:
    """Bits a byte that the student takes more than its teacher, both on the same drawn texts."""

    def excess(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        return (sums[0] / sums[1] - sums[2] / sums[3]) / math.log(2)

    return bootstrap(_nats_and_bytes(student, teacher), excess)


def gap_closed(student: Scores, teacher: Scores, baseline: Scores) -> Interval | None:
    """(baseline − student) / (baseline − teacher) in bits per byte: 1 where the student is as good as its teacher. None
    where the teacher is not better than the baseline, so that there is no gap.
    """

    def share(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        of_baseline, of_student, of_teacher = sums[0] / sums[1], sums[2] / sums[3], sums[4] / sums[5]
        return (of_baseline - of_student) / (of_baseline - of_teacher)

    per_text = _nats_and_bytes(baseline, student, teacher)
    sums = per_text.sum(1)
    return bootstrap(per_text, share) if sums[0] / sums[1] > sums[4] / sums[5] else None


def _nats_and_bytes(*scores: Scores) -> NDArray[np.float64]:
    """Nats and bytes of each text, two columns a model."""
    return np.stack([column for of_model in scores
                     for column in (of_model.per_text(of_model.columns["ce"]), of_model.num_bytes)])  # fmt: skip


def by_position(student: Scores, teacher: Scores) -> list[dict[str, Any]]:
    """Likeness, losses and calibration errors at positions 0–7, 8–15, 16–31, … of a text."""
    ends = [7]
    while ends[-1] < student.position.max():
        ends.append(2 * ends[-1] + 1)
    edges: Edges = list(zip([0, *(end + 1 for end in ends)], ends, strict=False))
    return list(_binned(student, teacher, student.position, edges))


def by_frequency(student: Scores, teacher: Scores) -> list[dict[str, Any]]:
    """The same by how often a token occurs in these texts: once, 2–3, 4–7, …, more than 1,000 times."""
    occurrences = np.bincount(student.token)[student.token]
    edges: Edges = [(2**i, 2 ** (i + 1) - 1) for i in range(10)]
    return list(_binned(student, teacher, occurrences, [*edges, (1024, None)]))


def _binned(student: Scores, teacher: Scores, values: NDArray[Any], edges: Edges) -> Iterator[dict[str, Any]]:
    for low, high in edges:
        inside = (values >= low) & ((values <= high) if high is not None else True)
        if not inside.any():
            continue
        tokens = student.per_text(inside)
        columns = [(name, student, name) for name in LIKENESS]
        columns += [("student_loss", student, "ce"), ("teacher_loss", teacher, "ce")]
        figures = {
            name: interval(scores.per_text(scores.columns[column] * inside), tokens) for name, scores, column in columns
        }
        figures["student_ece"] = _calibration_error(student, inside)
        figures["teacher_ece"] = _calibration_error(teacher, inside)
        yield {"from": low, "to": high, "tokens": int(inside.sum()), **figures}


def furthest_tokens(student: Scores, teacher: Scores) -> list[dict[str, Any]]:
    """The token ids with the largest mean KL, of those that occur often enough."""
    count = np.bincount(student.token)
    columns = {
        "kl": student.columns["kl"],
        "student_loss": student.columns["ce"],
        "teacher_loss": teacher.columns["ce"],
    }
    means = {name: np.bincount(student.token, values) / np.maximum(count, 1) for name, values in columns.items()}
    ranked = np.argsort(-np.where(count >= LEAST_OCCURRENCES, means["kl"], -1))[:FURTHEST_TOKENS]
    return [
        {"id": int(i), "count": int(count[i]), **{name: float(mean[i]) for name, mean in means.items()}}
        for i in ranked
        if count[i] >= LEAST_OCCURRENCES
    ]
