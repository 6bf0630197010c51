"""What the scores of a dataset say: each figure with its 95 % bootstrap interval over texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm_distill.evaluation.compare import BESIDE_THE_TEACHER, TEACHER, Scores
from llm_distill.evaluation.statistics import Interval, bootstrap, interval

CALIBRATION_BINS = 15
Edges = list[tuple[int, int | None]]


def loss_figures(scores: Scores) -> dict[str, Interval]:
    """`loss` in nats a token, `perplexity`, and `bits_per_byte`, which is comparable across tokenizers."""
    nats = scores.per_text(scores.columns["ce"])
    loss = interval(nats, scores.per_text())
    bits_per_byte = interval(nats / math.log(2), scores.num_bytes)
    return {
        "loss": loss,
        "perplexity": _mapped(lambda nats: math.exp(min(nats, 700)), loss),
        "bits_per_byte": bits_per_byte,
    }


def likeness_figures(scores: Scores) -> dict[str, Interval]:
    """Means over tokens of how the student is beside its teacher."""
    return {name: interval(scores.per_text(scores.columns[name]), scores.per_text()) for name in BESIDE_THE_TEACHER}


def calibration_figures(scores: Scores) -> dict[str, Any]:
    """`ece`, the expected calibration error: the mean distance between confidence and accuracy over CALIBRATION_BINS
    bins of equal width, weighted by their tokens (Guo et al., 2017, arXiv:1706.04599, equation 3); `accuracy` of the
    likeliest token; `bins` for a reliability diagram.
    """
    confidence, correct = scores.columns["confidence"], scores.columns["correct"]
    of_bin = _confidence_bin(scores)
    bins = []
    for b in range(CALIBRATION_BINS):
        inside = of_bin == b
        if inside.any():
            means = {"confidence": float(confidence[inside].mean()), "accuracy": float(correct[inside].mean())}
            bins.append({"tokens": int(inside.sum()), **means})
    return {
        "ece": _calibration_error(scores, np.ones_like(of_bin)),
        "accuracy": interval(scores.per_text(correct), scores.per_text()),
        "bins": bins,
    }


def _confidence_bin(scores: Scores) -> NDArray[np.int64]:
    return np.minimum((scores.columns["confidence"] * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)


def _calibration_error(scores: Scores, inside: NDArray[Any]) -> Interval:
    """Over the tokens for which `inside` is 1."""
    of_bin = _confidence_bin(scores)
    gaps = (scores.columns["correct"] - scores.columns["confidence"]) * inside
    columns = [scores.per_text(gaps * (of_bin == b)) for b in range(CALIBRATION_BINS)]
    return bootstrap(np.stack([*columns, scores.per_text(inside)]), lambda sums: np.abs(sums[:-1]).sum(0) / sums[-1])


def behind(student: Scores, teacher: Scores) -> Interval:
    """Bits a byte that the student takes more than its teacher, both on the same drawn texts."""
    columns = [part for each in (student, teacher) for part in (each.per_text(each.columns["ce"]), each.num_bytes)]
    return bootstrap(np.stack(columns), lambda sums: (sums[0] / sums[1] - sums[2] / sums[3]) / math.log(2))


def gap_closed(student: Scores, teacher: Scores, baseline: Scores) -> Interval | None:
    """(baseline − student) / (baseline − teacher) in bits per byte: 1 where the student is as good as its teacher. None
    where the teacher is not better than the baseline, so that there is no gap.
    """
    columns = [
        part for each in (baseline, student, teacher) for part in (each.per_text(each.columns["ce"]), each.num_bytes)
    ]

    def share(sums: NDArray[np.float64]) -> NDArray[np.float64]:
        of_baseline, of_student, of_teacher = sums[0] / sums[1], sums[2] / sums[3], sums[4] / sums[5]
        return (of_baseline - of_student) / (of_baseline - of_teacher)

    sums = np.array([column.sum() for column in columns])
    return bootstrap(np.stack(columns), share) if sums[0] / sums[1] > sums[4] / sums[5] else None


def by_position(student: Scores, teacher: Scores) -> list[dict[str, Any]]:
    """Likeness, losses and calibration errors at positions 0–7, 8–15, 16–31, … of a text."""
    edges: Edges = [(0, 7)]
    while edges[-1][1] is not None and edges[-1][1] < student.position.max():
        edges.append((edges[-1][1] + 1, 2 * edges[-1][1] + 1))
    return list(_binned(student, teacher, student.position, edges))


def by_frequency(student: Scores, teacher: Scores) -> list[dict[str, Any]]:
    """The same by how often a token occurs in these texts: once, 2–3, 4–7, …, more than 1,000 times."""
    times = np.bincount(student.token)[student.token]
    edges: Edges = [(2**i, 2 ** (i + 1) - 1) for i in range(10)]
    return list(_binned(student, teacher, times, [*edges, (1024, None)]))


def furthest_tokens(student: Scores, teacher: Scores, most: int = 12, at_least: int = 5) -> list[dict[str, Any]]:
    """The token ids with the largest mean KL, of those that occur `at_least` so often."""
    count = np.bincount(student.token)
    means = {
        key: np.bincount(student.token, values) / np.maximum(count, 1)
        for key, values in (
            ("kl", student.columns["kl"]),
            ("student_loss", student.columns["ce"]),
            ("teacher_loss", teacher.columns["ce"]),
        )
    }
    ranked = np.argsort(-np.where(count >= at_least, means["kl"], -1))[:most]
    return [
        {"id": int(i), "count": int(count[i]), **{key: float(mean[i]) for key, mean in means.items()}}
        for i in ranked
        if count[i] >= at_least
    ]


def domain_figures(scores: Mapping[str, Scores], comparable: bool) -> dict[str, Any]:
    """All of the above for one dataset: a domain of the gap report.

    Args:
        scores: of the teacher, the student and, if there is one, the baseline.
        comparable: whether student and teacher have the same tokens; if not, only what needs no common ones is given.
    """
    student, teacher, baseline = (scores.get(name) for name in ("student", TEACHER, "baseline"))
    assert student is not None
    assert teacher is not None
    found: dict[str, Any] = {
        "texts": len(student.num_bytes),
        "tokens": len(student.token),
        "bytes": int(student.num_bytes.sum()),
        "models": {name: loss_figures(each) for name, each in scores.items()},
        "calibration": {name: calibration_figures(each) for name, each in scores.items()},
        "behind": behind(student, teacher),
        "gap_closed": None if baseline is None else gap_closed(student, teacher, baseline),
        "likeness": None,
    }
    if comparable:
        found["likeness"] = likeness_figures(student)
        if baseline is not None and "kl" in baseline.columns:
            found["baseline_likeness"] = likeness_figures(baseline)
        found["by_position"] = by_position(student, teacher)
        found["by_frequency"] = by_frequency(student, teacher)
        found["furthest_tokens"] = furthest_tokens(student, teacher)
    return found


def _binned(student: Scores, teacher: Scores, of: NDArray[Any], edges: Edges) -> Iterator[dict[str, Any]]:
    for low, high in edges:
        inside = (of >= low) & ((of <= high) if high is not None else True)
        if not inside.any():
            continue
        tokens = student.per_text(inside)
        figures = {
            name: interval(scores.per_text(scores.columns[column] * inside), tokens)
            for name, scores, column in (
                *((column, student, column) for column in BESIDE_THE_TEACHER),
                ("student_loss", student, "ce"),
                ("teacher_loss", teacher, "ce"),
            )
        }
        figures |= {
            f"{who}_ece": _calibration_error(each, inside) for who, each in (("student", student), (TEACHER, teacher))
        }
        yield {"from": low, "to": high, "tokens": int(inside.sum()), **figures}


def _mapped(function: Callable[[float], float], of: Interval) -> Interval:
    """Of a monotone function, the interval's ends are those of its argument."""
    return Interval(value=function(of["value"]), low=function(of["low"]), high=function(of["high"]))
