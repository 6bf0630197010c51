"""Distil large language models into small ones, on top of Hugging Face transformers and TRL.

Names are imported when they are first used, so that `import llm_distill` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llm_distill.cache import TeacherCache
    from llm_distill.config import DistillationConfig
    from llm_distill.heads import LMHead
    from llm_distill.teachers import (
        AdaptersOffTeacher,
        CachedTeacher,
        EMATeacher,
        EnsembleTeacher,
        LiveTeacher,
        ServedTeacher,
        Teacher,
    )
    from llm_distill.trainer import DistillationTrainer

__version__ = "0.1.0"
__all__ = [
    "AdaptersOffTeacher",
    "CachedTeacher",
    "DistillationConfig",
    "DistillationTrainer",
    "EMATeacher",
    "EnsembleTeacher",
    "LMHead",
    "LiveTeacher",
    "ServedTeacher",
    "Teacher",
    "TeacherCache",
]

_HOMES = {
    "DistillationConfig": "config",
    "DistillationTrainer": "trainer",
    "LMHead": "heads",
    "TeacherCache": "cache",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'teachers')}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
