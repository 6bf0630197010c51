"""A student on the Hub: what goes there, with which card, and what must not."""

from llm_distill.hub.card import TAGS, write_model_card

__all__ = ["TAGS", "write_model_card"]
