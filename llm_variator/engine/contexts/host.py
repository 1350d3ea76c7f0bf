"""What contexts need of the model they belong to; `VariatorModel` has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from llm_variator.config import BaseSignature, VariatorConfig
from llm_variator.engine.plugin import CompressionPlugin


class Host(Protocol):
    """A base model with hooks and its plugins by name."""

    base: Any
    signature: BaseSignature

    @property
    def plugins(self) -> Mapping[str, VariatorConfig]:
        """The loaded plugins' configurations."""

    def plugin(self, name: str | None = None) -> CompressionPlugin:
        """One of them."""
