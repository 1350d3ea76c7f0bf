"""Base models, tokenizers and shipped plugins by name; what these functions do is in `sources.models`."""

from llm_variator.sources.models import byte_tokenizer, load_model, load_tokenizer, shipped_plugins

__all__ = ["byte_tokenizer", "load_model", "load_tokenizer", "shipped_plugins"]
