"""The teacher runs once: its signals are stored, and held against what it would say itself."""

from llm_distill.capture.run import capture

__all__ = ["capture"]
