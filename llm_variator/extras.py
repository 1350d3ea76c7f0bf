"""Packages that only some of the library needs."""

from __future__ import annotations

import importlib
from typing import Any

from llm_variator.errors import VariatorError


def needed(module: str, purpose: str, extra: str) -> Any:
    """A module of an optional package.

    Args:
        module: its name, as in an import.
        purpose: what wants it; begins the message.
        extra: the extra of this package that brings it.

    Raises:
        VariatorError: it, or a package that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = error.name or module
        raise VariatorError(
            f"{purpose} needs the package {missing.partition('.')[0]}: pip install 'llm-variator[{extra}]'"
        ) from None
