"""A teacher that writes, and what it goes on from."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from llm_distill.generation import Prompt, prompts_of
from llm_distill.models import LanguageModel


@pytest.fixture(scope="module")
def teacher(saved: Path) -> LanguageModel:
    return LanguageModel.load(str(saved / "teacher"))


@pytest.fixture(scope="module")
def prompts(texts: Dataset) -> list[Prompt]:
    return list(prompts_of({"prompt": text[: 5 + 3 * n], "line": n} for n, text in enumerate(texts["text"][:9])))
