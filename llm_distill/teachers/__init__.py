"""Where the soft targets come from."""

from llm_distill.rows import Batch
from llm_distill.teachers.adapters_off import AdaptersOffTeacher
from llm_distill.teachers.base import Teacher
from llm_distill.teachers.cached import CachedTeacher
from llm_distill.teachers.choose import make_teacher
from llm_distill.teachers.ema import EMATeacher
from llm_distill.teachers.ensemble import EnsembleTeacher
from llm_distill.teachers.live import LiveTeacher
from llm_distill.teachers.served import ServedTeacher

__all__ = [
    "AdaptersOffTeacher",
    "Batch",
    "CachedTeacher",
    "EMATeacher",
    "EnsembleTeacher",
    "LiveTeacher",
    "ServedTeacher",
    "Teacher",
    "make_teacher",
]
