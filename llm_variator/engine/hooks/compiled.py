"""A decoder whose layers torch.compile has compiled, with its plugins: `VariatorModel.compile`.

The hooks are traced with the layers. Before each pass eager code splits the prompt and prepares the cache
(`session.begin_pass`); the compiled code gets the session as an argument, so torch guards plugin, ratios and sizes.
Every plugin has compiled code of its own, one for prompts and one for single tokens. Lengths are variables: from the
start in decoding, where each step has another, and from the second length of a prompt.
"""

from __future__ import annotations

import logging
import types
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from llm_variator.engine.cache import CompressedLayer, SelectedLayer
from llm_variator.engine.cache.naming import NAMES
from llm_variator.engine.groups import Slices
from llm_variator.engine.rotary import fixed_up_to
from llm_variator.engine.session import Session, current, traced

logger = logging.getLogger(__name__)

PREFILL, DECODE = "variator_prefill", "variator_decode"  # names under which torch reports the two


class CompiledStack:
    """Stands in for the call of a decoder's stack of layers."""

    def __init__(self, stack: nn.Module, options: Mapping[str, Any]) -> None:
        """`options` of torch.compile; by default a graph break is an error."""
        self.stack = stack
        self.options = {"fullgraph": True, **options}
        self._said: set[str] = set()
        self.forget()

    def forget(self) -> None:
        """Compile everything anew: the stack has other modules."""
        # plugin, or the stack itself where there is none -> kind of pass -> compiled code
        self._calls: weakref.WeakKeyDictionary[nn.Module, dict[str, Callable[..., Any]]] = (
            weakref.WeakKeyDictionary()
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One pass, compiled where that is possible, else as it was before and with one warning that says why."""
        if torch.compiler.is_compiling():
            return self.stack._call_impl(*args, **kwargs)  # part of somebody else's graph
        session = current()
        reason = _obstacle(session, kwargs)
        if fixed_up_to(self.stack.config) is not None:
            reason = "the frequencies of the rotary positions depend on the sequence's length"
        if reason is not None:
            return self._uncompiled(reason, args, kwargs)
        _prepare(session)
        kind = DECODE if session is None or session.now is None or session.now.segment is None else PREFILL
        if session is None and _width(kwargs) > 1:
            kind = PREFILL
        try:
            output = self._call(session, kind)(session, self.stack._call_impl, args, kwargs)
        except torch._dynamo.exc.FailOnRecompileLimitHit:
            return self._uncompiled(
                "torch has compiled this kind of pass as often as torch._dynamo.config.recompile_limit allows",
                args,
                kwargs,
            )
        if kind == PREFILL:
            _lay_out(_cache(kwargs))
        return output

    def _call(self, session: Session | None, kind: str) -> Callable[..., Any]:
        owner = self.stack if session is None or session.plugin is None else session.plugin
        calls = self._calls.setdefault(owner, {})
        if kind not in calls:
            # torch keeps compiled code, and counts recompilations, per code object
            code = traced.__code__.replace(co_name=kind)
            options = {"dynamic": True if kind == DECODE else None, **self.options}
            calls[kind] = torch.compile(types.FunctionType(code, traced.__globals__), **options)
        return calls[kind]

    def _uncompiled(self, reason: str, args: Any, kwargs: Any) -> Any:
        if reason not in self._said:
            self._said.add(reason)
            logger.warning("not compiled, the same computation runs uncompiled: %s", reason)
        return self.stack._call_impl(*args, **kwargs)


def _cache(kwargs: Mapping[str, Any]) -> Any:
    return next((kwargs[name] for name in NAMES if kwargs.get(name) is not None), None)


def _width(kwargs: Mapping[str, Any]) -> int:
    ids = kwargs.get("input_ids")
    ids = kwargs.get("inputs_embeds") if ids is None else ids
    return 1 if ids is None else ids.shape[1]


def _prepare(session: Session | None) -> None:
    """Split the prompt at all ratios now: torch cannot trace how that is done."""
    if session is None or session.now is None or (segment := session.now.segment) is None:
        return
    for k in {1} | ({site.k for site in session.plugin.sites.values()} if session.plugin else set()):
        grouping = segment.grouping(k)
        if isinstance(grouping, Slices):
            _ = grouping.columns, grouping.reach, grouping.members  # made on first use, under a lock


def _lay_out(cache: Any) -> None:
    """Lay entries out after a prompt as the first step will, or the second step would be compiled anew."""
    for layer in cache.layers if isinstance(cache, Cache) else ():
        held: Any = layer.store if isinstance(layer, CompressedLayer) else layer
        if isinstance(held, DynamicLayer) and held.keys is not None and held.values is not None:
            held.keys, held.values = held.keys.contiguous(), held.values.contiguous()


def _obstacle(session: Session | None, kwargs: Mapping[str, Any]) -> str | None:
    """Why a pass cannot be compiled; None where it can."""
    if torch.is_grad_enabled():
        return "gradients are on; generate switches them off, a forward pass needs torch.inference_mode()"
    for name in ("output_hidden_states", "output_attentions"):
        if kwargs.get(name):
            return f"{name} is asked for"
    cache = _cache(kwargs)
    plugin = session.plugin if session else None
    layers = cache.layers if isinstance(cache, Cache) else ()
    if (plugin is not None and plugin.selects) or any(isinstance(layer, SelectedLayer) for layer in layers):
        return 'compressor "select" keeps keys of each head'
    for layer in layers:
        held = layer.store if isinstance(layer, CompressedLayer) else layer
        if type(held) not in (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer):
            return f"the KV cache has a {type(held).__name__}"
    if cache is not None and getattr(cache, "offloading", False):
        return "the KV cache is offloaded"
    if plugin is not None and plugin.config.decode_block is not None:
        return "decode_block merges generated tokens"
    return None
