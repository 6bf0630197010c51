"""What the tests of evaluation share: models with their scores on a few texts, and a task of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from evaluation_worker import write_task
from tiny import tiny_llama
from transformers import PreTrainedTokenizerBase
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from llm_distill import LiveTeacher
from llm_distill.evaluation.compare import HeldOutTexts, Scores, compare
from llm_distill.models import LanguageModel
from llm_distill.rows import IGNORED


@pytest.fixture(scope="package")
def models(saved: Path) -> dict[str, LanguageModel]:
    return {name: LanguageModel.load(str(saved / name)) for name in ("teacher", "student")}


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    return write_task(tmp_path)


@pytest.fixture
def rows(texts: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Eleven texts of unequal length, of which one has its first half masked."""
    ids = [tokenizer(text)["input_ids"][: 10 + 7 * i] for i, text in enumerate(texts["text"][:11])]
    labels = [list(row) for row in ids]
    labels[3][: len(ids[3]) // 2] = [IGNORED] * (len(ids[3]) // 2)
    return Dataset.from_dict({"input_ids": ids, "labels": labels})


@pytest.fixture
def measure_scores(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Callable[..., dict[str, Scores]]:
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    models = {"student": tiny_llama(1, hidden=16), "baseline": tiny_llama(3, hidden=16)}

    def measure(models: dict[str, Any] = models, teacher: Any = None, **options: Any) -> dict[str, Scores]:
        teacher = teacher or LiveTeacher(tiny_llama(2), tokenizer)
        return compare(models, teacher, HeldOutTexts(rows, collate, tokenizer, **options))

    return measure
