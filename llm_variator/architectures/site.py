"""Where a plugin attaches: hooks on the modules that an `Architecture` names. No forward is copied.

FFN: a pre-hook merges the groups, the frozen FFN runs on the entries, a hook restores the tokens.
KV: the key and value projections run on the entries; their outputs are put back at the entries' columns, so
that the model's own code applies its norms and the position of each group's last token; then only the
entries' columns go to the cache and to attention.
Attention: the whole self-attention runs on the entries, then a hook restores the tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_variator.attention import group_causal_attention, visible
from llm_variator.cache import CompressedLayer
from llm_variator.errors import VariatorError
from llm_variator.groups import FILLER, Grouping, Slices
from llm_variator.plugin import SiteLayers
from llm_variator.session import current

ATTENTION_FUNCTION = "variator"  # the name under which transformers finds `attention_forward`


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family of models as paths of real modules; a path that does not resolve fails when attaching."""

    model_types: tuple[str, ...]
    layers: str
    """From the model to its list of layers; the rest are paths from one layer."""
    ffn: str
    attention: str
    key: str
    value: str
    decoder: bool = True

    def blocks(self, base: PreTrainedModel) -> nn.ModuleList:
        """The layers of `base`."""
        return base.get_submodule(self.layers)  # type: ignore[return-value]

    def check(self, base: PreTrainedModel) -> None:
        """Raise naming the module that `base` lacks."""
        kind = type(base).__name__
        try:
            blocks = self.blocks(base)
        except AttributeError:
            raise VariatorError(
                f"{kind} has no {self.layers!r}: load it with its language-model head (AutoModelForCausalLM)"
            ) from None
        for path in (
            self.ffn,
            self.attention,
            f"{self.attention}.{self.key}",
            f"{self.attention}.{self.value}",
        ):
            for index, block in enumerate(blocks):
                try:
                    block.get_submodule(path)
                except AttributeError:
                    raise VariatorError(f"{kind}: layer {index} has no {path!r}") from None

    def slides(self, base: PreTrainedModel, layer: int) -> bool:
        """Whether `layer` attends through a sliding window: its cache is short already and stays dense."""
        kinds = getattr(base.config, "layer_types", None)
        if kinds is not None:
            return kinds[layer] != "full_attention"
        return getattr(base.config, "sliding_window", None) is not None

    def attach(self, base: PreTrainedModel) -> list[Any]:
        """Put the hooks on every layer of `base`; calling `remove()` on each of the handles undoes it."""
        handles: list[Any] = []
        for index, block in enumerate(self.blocks(base)):
            handles += _hook_ffn(block.get_submodule(self.ffn), index)
            if not self.slides(base, index):
                attention = block.get_submodule(self.attention)
                projections = [attention.get_submodule(path) for path in (self.key, self.value)]
                handles += _hook_attention(attention, projections, index)
                handles.append(_OwnAttentionFunction(attention))
        return handles


def _hook_ffn(ffn: nn.Module, layer: int) -> list[RemovableHandle]:
    def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        session = current()
        if session is None or session.segment is None or session.plugin is None:
            return None
        if (site := session.plugin.at("ffn", layer)) is None:
            return None
        grouping = session.segment.grouping(site.k)
        if not grouping.has_groups:
            return None
        session.stash["ffn", layer] = site, grouping, args[0]
        return (grouping.compress(args[0], site.compressor),)

    def after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        session = current()
        if session is None or (kept := session.stash.pop(("ffn", layer), None)) is None:
            return None
        site, grouping, x = kept
        return grouping.restore(output, x, site.decompressor)

    return [ffn.register_forward_pre_hook(before), ffn.register_forward_hook(after)]


@dataclasses.dataclass
class _AttentionCall:
    """What one attention layer does with its keys and queries in this pass.

    Stands in for the cache inside the layer: `update` keeps the entries' columns, stores them where there is a
    cache, and returns all keys and values to attend to.
    """

    grouping: Grouping | None
    """None: one dense token per row."""
    held: CompressedLayer | None
    width: int
    site: SiteLayers | None = None
    whole: bool = False
    """Site "attention": queries are entries too."""
    hidden: Tensor | None = None
    entries: Tensor | None = None
    """Site "kv": input of the key and value projections."""

    def __post_init__(self) -> None:
        self.past = self.held.tokens if self.held is not None else 0

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self.grouping is None:
            assert self.held is not None
            return self.held.update(key, value)
        if not self.whole:
            key, value = self.grouping.take(key, 2), self.grouping.take(value, 2)
        if self.held is None:
            return key, value
        return self.held.append(key, value, self.grouping, self.width)

    @property
    def plain_causal(self) -> bool:
        """Whether queries and keys are the same uniform entries."""
        return (
            isinstance(self.grouping, Slices)
            and not self.past
            and (self.whole or not self.grouping.has_groups)
        )

    def mask(self) -> Tensor | None:
        """(b or 1, 1, queries, entries) bool; None where a single query sees everything."""
        if self.grouping is None:
            assert self.held is not None
            return (self.held.columns != FILLER)[:, None, None] if self.held.has_fillers else None
        columns = self.grouping.columns if self.held is None else self.held.columns
        reach = self.grouping.columns if self.whole else self.grouping.reach
        return visible(torch.where(reach == FILLER, FILLER, reach + self.past), columns)


def _compressed_layer(cache: Any, layer: int) -> CompressedLayer | None:
    held = cache.layers[layer] if cache is not None and layer < len(cache.layers) else None
    return held if isinstance(held, CompressedLayer) else None


def _hook_attention(attention: nn.Module, projections: list[nn.Module], layer: int) -> list[RemovableHandle]:
    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        session = current()
        if session is None:
            return None
        held = _compressed_layer(kwargs.get("past_key_values"), layer)
        plugin = session.plugin
        whole = plugin.at("attention", layer) if plugin else None
        site = whole or (plugin.at("kv", layer) if plugin else None)
        if site is None and held is None:
            return None
        if session.segment is None and held is None:
            return None  # one token without a cache: plainly dense
        if "hidden_states" not in kwargs:
            args, kwargs = args[1:], {**kwargs, "hidden_states": args[0]}
        hidden = kwargs["hidden_states"]
        grouping = session.segment.grouping(site.k if site else 1) if session.segment else None
        call = _AttentionCall(grouping, held, hidden.shape[1], site, whole is not None, hidden)
        if site is not None and grouping is not None and grouping.has_groups:
            entries = grouping.compress(hidden, site.compressor)
            if whole:
                kwargs["hidden_states"] = entries
                kwargs["position_embeddings"] = tuple(
                    grouping.take(t, 1) for t in kwargs["position_embeddings"]
                )
            else:
                call.entries = entries
        else:
            call.whole = False
        session.stash["attention", layer] = call
        return args, {**kwargs, "past_key_values": call, "attention_mask": None}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        session = current()
        call = session.stash.pop(("attention", layer), None) if session else None
        if call is None or not call.whole:
            return None
        return (call.grouping.restore(output[0], call.hidden, call.site.decompressor), *output[1:])

    def before_projection(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        session = current()
        call = session.stash.get(("attention", layer)) if session else None
        return None if call is None or call.entries is None else (call.entries,)

    def after_projection(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        session = current()
        call = session.stash.get(("attention", layer)) if session else None
        if call is None or call.entries is None:
            return None
        assert call.grouping is not None
        return call.grouping.place(output)

    handles = [
        attention.register_forward_pre_hook(before, with_kwargs=True),
        attention.register_forward_hook(after),
    ]
    for projection in projections:
        handles += [
            projection.register_forward_pre_hook(before_projection),
            projection.register_forward_hook(after_projection),
        ]
    return handles


class _OwnAttentionFunction:
    """Give one attention module a config that names our function; the model's own config stays as it is."""

    def __init__(self, attention: nn.Module) -> None:
        AttentionInterface.register(ATTENTION_FUNCTION, attention_forward)
        self.attention, self.stock = attention, attention.config
        own: Any = copy.copy(self.stock)
        own._attn_implementation_internal = ATTENTION_FUNCTION
        own.variator_stock = self.stock
        attention.config = own

    def remove(self) -> None:
        """Give the module its own config back."""
        self.attention.config = self.stock


def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention function of the hooked layers: the model's own where nothing is compressed.

    query (b, H, queries, d), key and value (b, H_kv, entries, d) -> (b, queries, H, d) and weights or None.
    """
    session = current()
    call = session.stash.get(("attention", module.layer_idx)) if session else None
    implementation = module.config.variator_stock._attn_implementation
    eager = sys.modules[type(module).__module__].eager_attention_forward
    stock = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    if call is None:
        return stock(module, query, key, value, attention_mask, **kwargs)
    if implementation != "eager":
        if call.plain_causal:
            return stock(module, query, key, value, None, **kwargs)
        if isinstance(call.grouping, Slices) and not call.past and not kwargs.get("dropout"):
            scale = kwargs["scaling"]
            return group_causal_attention(query, key, value, call.grouping, scale).contiguous(), None
    mask = call.mask()
    if mask is None:
        return stock(module, query, key, value, None, **kwargs)
    if implementation == "eager":
        additive = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
        return eager(module, query, key, value, additive, **kwargs)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)
