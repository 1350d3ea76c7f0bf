"""Supported models: one table entry per family. To add one, write its entry and list it in `FAMILIES`."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from llm_variator.engine.hooks.architecture import Architecture
from llm_variator.engine.hooks.bert import BERT
from llm_variator.engine.hooks.llama import LLAMA
from llm_variator.engine.hooks.t5 import T5
from llm_variator.errors import VariatorError

FAMILIES: tuple[Architecture, ...] = (LLAMA, T5, BERT)


def host_of(base: Any) -> Any:
    """The Hugging Face model in `base`, which may be a PEFT model around it."""
    return base.get_base_model() if hasattr(base, "get_base_model") else base


def architecture_of(base: PreTrainedModel) -> Architecture:
    """The table entry for `base`; raises with the supported model types, or names the module it misses."""
    model_type = base.config.model_type
    for family in FAMILIES:
        if model_type in family.model_types:
            family.check(base)
            return family
    supported = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise VariatorError(
        f"model type {model_type!r} is not supported; supported are {supported}. To add it, describe where its "
        "modules are in llm_variator/engine/hooks (one table entry, see CONTRIBUTING.md)"
    )


__all__ = ["FAMILIES", "Architecture", "architecture_of", "host_of"]
