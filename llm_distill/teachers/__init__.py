"""Where the soft targets come from."""

from llm_distill.teachers.base import Batch, Teacher
from llm_distill.teachers.cached import CachedTeacher
from llm_distill.teachers.choose import make_teacher
from llm_distill.teachers.ensemble import EnsembleTeacher
from llm_distill.teachers.live import AdaptersOffTeacher, LiveTeacher

__all__ = ["AdaptersOffTeacher", "Batch", "CachedTeacher", "EnsembleTeacher", "LiveTeacher", "Teacher", "make_teacher"]
