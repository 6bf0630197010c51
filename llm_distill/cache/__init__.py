"""A teacher's signals on disk: what is kept of them, how it is packed, and how it is found again."""

from llm_distill.cache.methods import Hidden, Hybrid, Sampled, TopK
from llm_distill.cache.store import DamagedShardError, TeacherCache

__all__ = ["DamagedShardError", "Hidden", "Hybrid", "Sampled", "TeacherCache", "TopK"]
