"""A hook that belongs to one module: copies and pickles of the module carry one that does nothing.

A hook is a closure over its own base, and torch hands it on to copies as it is: a copied model would run the
original's. A copy of a `VariatorModel` hangs hooks of its own; a copy of its base is a plain model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from llm_variator.errors import VariatorError


class Hook:
    """What `register_forward_hook` and its siblings get."""

    def __init__(self, call: Callable[..., Any] | None = None) -> None:
        self.call = call

    def __call__(self, *args: Any) -> Any:
        """Like the hook inside."""
        return None if self.call is None else self.call(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()


class Mark:
    """Says on a base that something is attached to it; on a copy it says no."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, ()


ATTACHED = "_variator_attached"  # attribute of a base: its mark


def refuse_attached(base: nn.Module) -> None:
    """Raise a `VariatorError` if something is attached already, to `base` or to another model with modules of it."""
    shared = (hook for module in base.modules() for hooks in _hooks(module) for hook in hooks.values())
    if getattr(base, ATTACHED, False) or any(isinstance(hook, Hook) and hook.call for hook in shared):
        raise VariatorError(
            "this base already has a VariatorModel or token pruning: use it, or unload() or remove() it first"
        )


def strip(base: nn.Module) -> None:
    """Remove what `base` took over when it was copied from a model with hooks."""
    if not hasattr(base, ATTACHED):
        return
    delattr(base, ATTACHED)
    for module in base.modules():
        for hooks in _hooks(module):
            for key in [key for key, hook in hooks.items() if isinstance(hook, Hook) and hook.call is None]:
                del hooks[key]
        while (stock := getattr(module.__dict__.get("config"), "variator_stock", None)) is not None:
            module.config = stock


def own_implementation(module: Any) -> str:
    """The model's own attention implementation, beneath every `OwnAttentionFunction`."""
    config = module.config
    while hasattr(config, "variator_stock"):
        config = config.variator_stock
    return str(config._attn_implementation)


def _hooks(module: Any) -> Iterator[dict[int, Any]]:
    yield module._forward_pre_hooks
    yield module._forward_hooks
