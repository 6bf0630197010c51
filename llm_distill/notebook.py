"""How a run shows itself in Jupyter: one line of its table an evaluation, or a log if there is none."""

from __future__ import annotations

from typing import Any

from IPython.display import HTML, display
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils.notebook import NotebookProgressCallback, text_to_html_table

from llm_distill.tables import Table


def show_table(trainer: Trainer) -> None:
    """Gives the metrics columns in a trainer's table, unless progress is not to be shown."""
    if trainer.pop_callback(NotebookProgressCallback) is not None:
        trainer.add_callback(NotebookTable())


FIGURES = {
    "ce": "Cross-entropy",
    "perplexity": "Perplexity",
    "kl": "KL to teacher",
    "top1_agreement": "Top-1 agreement",
    "acceptance": "Σ min(p, q)",
}
"""The metrics that have a column, beside the losses."""


class NotebookTable(NotebookProgressCallback):
    """Transformers' progress bar and table, with what says how alike student and teacher are."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A line of training, if no evaluation writes one."""
        if args.eval_strategy == IntervalStrategy.NO and logs and "loss" in logs:
            row = {"Step": state.global_step, "Training Loss": _shown(logs["loss"])}
            row |= {title: _shown(logs[key]) for key, title in FIGURES.items() if key in logs}
            self.training_tracker.write_line(row)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A line of evaluation; with several datasets, columns for each of them."""
        metrics = metrics or {}
        prefix = next((key.removesuffix("runtime") for key in metrics if key.endswith("_runtime")), "eval_")
        dataset = prefix.removeprefix("eval").strip("_")
        row = {
            "Epoch" if args.eval_strategy == IntervalStrategy.EPOCH else "Step": state.global_step,
            "Training Loss": next(
                (_shown(log["loss"]) for log in reversed(state.log_history) if "loss" in log), "No log"
            ),
            "Validation Loss": "No log",
        }
        for key, title in {"loss": "Validation Loss", **FIGURES}.items():
            if prefix + key in metrics:
                row[f"{dataset} {title}".strip()] = _shown(metrics[prefix + key])
        if args.eval_strategy == IntervalStrategy.EPOCH and state.epoch is not None:
            row["Epoch"] = int(state.epoch)
        if self.training_tracker is None:
            display(HTML(text_to_html_table([list(row), list(row.values())])))
        else:
            self.training_tracker.write_line(row)
            self.training_tracker.remove_child()
            self._force_next_update = True  # an evaluation takes long
        self.prediction_bar = None


def show_completions(step: int, table: Table) -> None:
    """What the student wrote, with its own line breaks."""
    display(HTML(f'<div style="white-space: pre-wrap">Step {step}{table.html()}</div>'))


def _shown(value: float) -> str:
    return f"{value:.4f}"
