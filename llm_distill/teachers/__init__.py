"""Where the soft targets come from."""

from llm_distill.teachers.base import Batch, Teacher
from llm_distill.teachers.ensemble import EnsembleTeacher
from llm_distill.teachers.live import AdaptersOffTeacher, LiveTeacher

__all__ = ["AdaptersOffTeacher", "Batch", "EnsembleTeacher", "LiveTeacher", "Teacher"]
