"""Rotary positions whose frequencies depend on the longest sequence: `rope_type` "dynamic" and "longrope".

transformers keeps the frequencies of the longest sequence that a module with dynamic scaling has ever seen, so that a
result would depend on whatever was read before. Here every pass of a session starts from the model's own ones, in a
copy of the module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from llm_variator.engine.session import current_pass


def fixed_up_to(config: Any) -> int | None:
    """Positions from which on the frequencies of a model depend on the sequence's length; None: they never do."""
    given = getattr(config, "rope_parameters", None) or {}
    kinds = [one for one in given.values() if isinstance(one, Mapping)] or [given]
    limits = [
        one.get("original_max_position_embeddings") or config.max_position_embeddings
        for one in kinds
        if "dynamic" in str(one.get("rope_type")) or one.get("rope_type") == "longrope"
    ]
    return min(limits, default=None)


def hook_rotary(stack: nn.Module, wrap: Callable[[Any], Any]) -> list[RemovableHandle]:
    """Have every dynamic rotary module of `stack` forget earlier passes; `wrap` makes the hooks to register."""
    return [_forgetful(module, wrap) for module in stack.modules() if _kinds(module)]


def _kinds(module: Any) -> list[str]:
    """Prefixes of what a rotary module keeps for each kind of layer that has dynamic scaling."""
    kinds = getattr(module, "rope_type", None)
    if not hasattr(module, "original_max_seq_len"):
        return []
    each = kinds.items() if isinstance(kinds, Mapping) else [("", kinds)]
    return [f"{name}_" if name else "" for name, kind in each if "dynamic" in str(kind)]


def _forgetful(module: Any, wrap: Callable[[Any], Any]) -> RemovableHandle:
    def after(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        if current_pass() is None:
            return None
        fresh = copy.copy(module)  # what the module itself keeps is the base's affair, and other threads'
        fresh._buffers = dict(module._buffers)
        for prefix in _kinds(module):
            used, original = f"{prefix}inv_freq", getattr(module, f"{prefix}original_inv_freq")
            setattr(fresh, used, original.to(getattr(module, used).device))
            setattr(fresh, f"{prefix}max_seq_len_cached", module.original_max_seq_len)
        return type(module).forward(fresh, *args, **kwargs)

    return module.register_forward_hook(wrap(after), with_kwargs=True)
