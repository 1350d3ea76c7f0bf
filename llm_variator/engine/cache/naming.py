"""What the running transformers calls a cache: `cache` since 5.24, `past_key_values` before."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Cache

from llm_variator.errors import VariatorError

NAMES = ("cache", "past_key_values")


def cache_argument(module: nn.Module) -> str:
    """The name under which a module's `forward` takes its cache, read off its signature.

    Raises:
        VariatorError: it takes none that is known.
    """
    return _read(type(module).forward)


@functools.cache
def _read(forward: Callable[..., Any]) -> str:
    taken = inspect.signature(forward).parameters
    for name in NAMES:
        if name in taken:
            return name
    raise VariatorError(
        f"{forward.__qualname__} takes its KV cache under none of the names {', '.join(NAMES)}: this release of "
        "transformers is not supported, install one of the range in llm_variator's requirements"
    )


def take_cache(kwargs: dict[str, Any]) -> Any:
    """Remove the cache from a caller's keyword arguments, under whichever name it stands; None where there is none.

    Raises:
        VariatorError: two different caches under both names, or one that is no cache of transformers.
    """
    given = [kwargs.pop(name) for name in NAMES if name in kwargs]
    found = [cache for cache in given if cache is not None]
    if len(found) == 2 and found[0] is not found[1]:
        raise VariatorError(f"give the KV cache under one name: {' or '.join(NAMES)}")
    if found and not isinstance(found[0], Cache):
        raise VariatorError(
            f"past_key_values must be one of transformers' caches, got {type(found[0]).__name__}: put keys and values "
            "into a DynamicCache"
        )
    return found[0] if found else None


def cache_of(output: Any) -> Any:
    """The cache that a model returned; None where it returned none."""
    return next((getattr(output, name) for name in NAMES if hasattr(output, name)), None)
