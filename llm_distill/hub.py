"""What goes to the Hub beside the weights."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

TAGS = ["llm-distill", "knowledge-distillation"]
LIBRARIES = ("llm-distill", "torch", "transformers", "trl", "peft", "accelerate", "datasets")
FIGURES = {
    "loss": "loss",
    "ce": "cross-entropy (nats a token)",
    "perplexity": "perplexity",
    "teacher_ce": "the teacher's cross-entropy",
    "kl": "KL(teacher‖student)",
    "top1_agreement": "top-1 agreement",
    "acceptance": "Σ min(p, q)",
}
"""Of the evaluation, those that the card shows."""


def write_model_card(
    folder: str | Path,
    *,
    model: Any,
    name: str,
    dataset_name: str | None,
    tags: list[str],
    record: dict[str, Any],
    log_history: list[dict[str, float]],
) -> None:
    """Writes `folder/README.md`: what was distilled from what, how, and how well. Nothing local, nothing secret."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    student = model.config._name_or_path
    base_models = [] if not student or os.path.isdir(student) else [student]
    data = ModelCardData(
        library_name="peft" if hasattr(model, "peft_config") else "transformers",
        tags=sorted(set(tags)),
        base_model=base_models or None,
        datasets=[dataset_name] if dataset_name and not os.path.exists(dataset_name) else None,
        pipeline_tag="text-generation",
        model_name=name,
    )
    figures = _latest_figures(log_history)
    sections = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# {name}\n",
        f"{_origin(record)}\n",
        "## How\n",
        _table(("setting", "value"), [(key, value) for key, value in record.items() if value is not None]),
    ]
    if figures:
        sections += [
            "## How well, on held-out text\n",
            _table(("figure", "value"), [(k, f"{v:.4g}") for k, v in figures]),
        ]
    sections += ["## Versions\n", _table(("library", "version"), [(lib, version(lib)) for lib in LIBRARIES])]
    ModelCard("\n".join(sections)).save(Path(folder) / "README.md")


def _latest_figures(log_history: list[dict[str, float]]) -> list[tuple[str, float]]:
    """(what, value) of the last evaluation, on each dataset if there are several: `eval_ce` or `eval_NAME_ce`."""
    latest: dict[str, float] = {}
    for entry in log_history:
        latest |= {key: value for key, value in entry.items() if key.startswith("eval_")}
    found = []
    for key, value in latest.items():
        figure = max((name for name in FIGURES if key.endswith(f"_{name}")), key=len, default=None)
        if figure:
            dataset = key.removeprefix("eval_").removesuffix(figure).rstrip("_")
            found.append((f"{FIGURES[figure]} on {dataset}" if dataset else FIGURES[figure], value))
    return found


def _origin(record: dict[str, Any]) -> str:
    if not record["objective.kd_weight"]:
        return "Trained with llm-distill on text alone."
    if "teacher.ensemble" in record:
        return f"Distilled with llm-distill from an ensemble of {len(record['teacher.ensemble'])} teachers."
    name = record.get("teacher.model") or record.get("teacher.architecture")
    parameters = record.get("teacher.parameters")
    size = f" ({parameters / 1e6:,.1f} M parameters)" if parameters else ""
    return f"Distilled with llm-distill from `{name}`{size}." if name else "Distilled with llm-distill."


def _table(header: tuple[str, str], rows: list[tuple[str, Any]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)]
    return "\n".join(lines) + "\n"
