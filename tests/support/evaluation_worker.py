"""Compares two saved models on texts, generations, a task and pairs: what the test of ranks launches.

Usage: evaluation_worker.py MODELS TASKS OUT. MODELS has the folders `teacher` and `student`, TASKS what `write_task`
wrote. Writes OUT/comparison-RANK.json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from worker import make_rows

from llm_distill import LiveTeacher
from llm_distill.evaluation.bias import compare_bias
from llm_distill.evaluation.compare import HeldOutTexts
from llm_distill.evaluation.domains import measure_domain
from llm_distill.evaluation.generations import compare_generations
from llm_distill.evaluation.harness import run_tasks
from llm_distill.models import LanguageModel
from llm_distill.ranks import ranks

TASK = """
task: colours
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""

PROMPTS = [{"prompt": f"def f{n}(", "completion": f"{n}):\n    return {n}"} for n in range(7)]


def write_task(folder: Path) -> Path:
    """A multiple-choice task `colours` of twelve rows; gives the folder with its YAML."""
    rows = [{"question": f"{n} +", "choices": [" a", " for", " import"], "answer": n % 3} for n in range(12)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "colours.yaml").write_text(TASK.format(data=folder / "rows.jsonl"))
    return tasks


def compare(models: Path, tasks: Path) -> dict[str, Any]:
    state = ranks()
    loaded = {name: LanguageModel.load(str(models / name)) for name in ("teacher", "student")}
    for model in loaded.values():
        model.model.to(state.device)
    texts = HeldOutTexts(make_rows([2]), DataCollatorForLanguageModeling(pad_token_id=0), loaded["student"].tokenizer)
    domain = measure_domain({"student": loaded["student"].model}, LiveTeacher(loaded["teacher"]), texts)
    domain.pop("passages", None)  # looked at by one rank alone
    return {
        "domain": domain,
        "generations": compare_generations(loaded, PROMPTS, max_new_tokens=8),
        "tasks": run_tasks(loaded, ["colours"], include_path=tasks),
        "bias": compare_bias(loaded),
    }


if __name__ == "__main__":
    models, tasks, out = map(Path, sys.argv[1:])
    comparison = compare(models, tasks)
    (out / f"comparison-{ranks().process_index}.json").write_text(json.dumps(comparison))
