"""A gap report as it is saved, of models in nobody's memory."""

from __future__ import annotations

from typing import Any

FIGURE = {"value": 0.5, "low": 0.25, "high": 0.75}


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": 0.9 * value, "high": 1.1 * value}


def quality(loss: float) -> dict[str, Any]:
    return {"loss": figure(loss), "perplexity": figure(2.7**loss), "bits_per_byte": figure(loss / 3)}


def domain(models: dict[str, float] | None = None, **figures: Any) -> dict[str, Any]:
    """One that knows nothing of likeness, by the loss of each model."""
    models = models or {"student": 4.8, "teacher": 4.4}
    calibration = {"ece": FIGURE, "accuracy": FIGURE, "bins": [{"tokens": 9, "confidence": 1.0, "accuracy": 0.5}]}
    sizes = {"texts": 3, "tokens": 1234, "bytes": 5000}
    gaps = {"behind": FIGURE, "gap_closed": None, "likeness": None}
    of_models = {name: quality(loss) for name, loss in models.items()}
    return sizes | gaps | {"models": of_models, "calibration": dict.fromkeys(models, calibration)} | figures


def gap_report(domains: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    """Of a student that has not its teacher's tokens, unless `comparable` says so."""
    return {
        "format": 1,
        "date": "2026-11-25",
        "command": "llm-distill evaluate",
        "machine": {"device": "a processor", "cores": 2, "threads": 2},
        "versions": {},
        "student": {"model": "small"},
        "teacher": {"model": "large"},
        "comparable": "other *ids*",
        "domains": {"code": domain()} if domains is None else domains,
    } | parts
