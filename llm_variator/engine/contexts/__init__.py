"""Contexts that live on: prompts compressed once, then shared, extended, saved and loaded."""

from llm_variator.engine.contexts.context import CompressedContext

__all__ = ["CompressedContext"]
