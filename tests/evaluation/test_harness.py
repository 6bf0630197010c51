"""Tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_distill.evaluation.harness import run_tasks, tasks_parts
from llm_distill.models import LanguageModel
from llm_distill.tables import Table


def tasks_markdown(results: dict[str, Any]) -> str:
    parts = (part.markdown() if isinstance(part, Table) else part for part in tasks_parts(results))
    return "\n\n".join(filter(None, parts))


def test_local_task_of_the_harness_gives_what_the_logits_say(models: dict[str, LanguageModel], task_folder: Path):
    before = models["student"].tokenizer.pad_token
    results = run_tasks(models, ["colours"], include_path=task_folder, limit=10)
    assert results["skipped"] == {}
    assert results["tasks"]["colours"]["n"] == 10
    figures = results["tasks"]["colours"]["metrics"]["acc"]
    assert figures["higher_is_better"] is True
    for name, model in models.items():
        right = []
        for n in range(10):
            scores = []
            for choice in (" a", " for", " import"):
                prompt, whole = (model.tokenizer(text)["input_ids"] for text in (f"{n} +", f"{n} +{choice}"))
                ids = torch.tensor(whole)
                with torch.no_grad():
                    log_p = model.model(ids[None]).logits[0].double().log_softmax(-1)
                at = torch.arange(len(prompt), len(whole))
                scores.append(float(log_p[at - 1, ids[at]].sum()))
            right.append(int(np.argmax(scores)) == n % 3)
        assert figures["models"][name]["value"] == pytest.approx(np.mean(right))
        assert figures["models"][name]["stderr"] == pytest.approx(np.std(right, ddof=1) / 10**0.5)
    assert models["student"].tokenizer.pad_token == before
    assert "| colours | 10 | acc ↑ |" in tasks_markdown(results)
    json.dumps(results, allow_nan=False)


def test_task_that_cannot_run_is_skipped_and_the_others_have_figures(
    models: dict[str, LanguageModel], task_folder: Path, tmp_path: Path
):
    text = (task_folder / "colours.yaml").read_text()
    (task_folder / "gone.yaml").write_text(text.replace("colours", "gone").replace("rows.jsonl", "gone.jsonl"))
    (task_folder / "code.yaml").write_text(text.replace("colours", "code") + "unsafe_code: true\n")
    results = run_tasks(models, ["gone", "colours", "code"], include_path=task_folder, limit=2)
    assert list(results["tasks"]) == ["colours"]
    assert "its data could not be had" in results["skipped"]["gone"]
    assert "confirm_run_unsafe_code" in results["skipped"]["code"]
    assert str(tmp_path) not in json.dumps(results)
    assert "Skipped: gone (its data" in tasks_markdown(results)


def test_harness_that_is_not_installed_is_skipped_with_the_command(
    models: dict[str, LanguageModel], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    results = run_tasks(models, ["arc_easy, hellaswag"])
    assert results["tasks"] == {}
    assert set(results["skipped"]) == {"arc_easy", "hellaswag"}
    assert tasks_markdown(results).startswith("Skipped: arc_easy, hellaswag (lm_eval is not installed: pip install")


def test_harness_refuses_tasks_that_are_not_there(models: dict[str, LanguageModel], task_folder: Path):
    with pytest.raises(ValueError, match=r"no task 'coulours'.*Did you mean colours"):
        run_tasks(models, ["coulours"], include_path=task_folder)
    with pytest.raises(ValueError, match="no tasks"):
        run_tasks(models, [" ,"])
    with pytest.raises(ValueError, match="is no folder"):
        run_tasks(models, ["colours"], include_path="nowhere")
