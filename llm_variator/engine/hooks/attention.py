"""Sites "kv" and "attention": hooks around a layer's self-attention, and the function it attends with.

KV: the key and value projections run on the entries; their outputs are put back at the entries' columns, so
that the model's own code applies its norms and the position of each group's last token; then only the
entries' columns go to the cache and to attention.
Attention: the whole self-attention runs on the entries, then a hook restores the tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_variator.engine.cache import CompressedLayer, SelectedLayer
from llm_variator.engine.cache.naming import cache_argument
from llm_variator.engine.cache.selected import Entries
from llm_variator.engine.groups import FILLER, Grouping, Slices
from llm_variator.engine.hooks.ageing import age, remember
from llm_variator.engine.hooks.ffn import in_eights
from llm_variator.engine.hooks.hook import Hook, own_implementation
from llm_variator.engine.hooks.kernels import group_causal_attention, pooled_bias, visible
from llm_variator.engine.hooks.last_layer import at_the_end
from llm_variator.engine.hooks.selection import SelectCall, by_class
from llm_variator.engine.hooks.strips import attend, attend_masked
from llm_variator.engine.plan import Plan
from llm_variator.engine.plugin import SiteLayers
from llm_variator.engine.session import Pass, broken, current_pass

ATTENTION_FUNCTION = "variator"  # the name under which transformers finds `attention_forward`


@dataclasses.dataclass
class _AttentionCall:
    """What one attention layer does with its keys and queries in this pass.

    Stands in for the cache inside the layer: `update` keeps the entries' columns, stores them where there is a
    cache, and returns all keys and values to attend to.
    """

    grouping: Grouping | None
    """None: one dense token per row."""
    held: CompressedLayer | SelectedLayer | None
    cache: Any
    """The whole cache that `held` is a layer of: it moves offloaded layers when they are updated."""
    width: int
    site: SiteLayers | None = None
    causal: bool = True
    whole: bool = False
    """Site "attention": queries are entries too."""
    hidden: Tensor | None = None
    entries: Tensor | None = None
    """Site "kv": input of the key and value projections."""
    projected: int = 0
    """Projections that began with `entries`, and those that ended with them."""
    updated: bool = False
    """Whether keys and values passed `update`."""
    attended: bool = False
    """Whether attention ran with them."""
    read: tuple[Plan, Tensor, tuple[Tensor, ...]] | None = None
    """What is kept of the pass where decoding compresses: the plugin's plan, inputs, positions of tokens."""
    by_class: Sequence[Entries | None] = ()
    """Of a cache whose heads keep keys of their own choice: all of them, after `update`."""

    def __post_init__(self) -> None:
        self.past = self.held.tokens if self.held is not None else 0

    def get_seq_length(self, layer: int) -> int:
        return self.past

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.updated = True
        if isinstance(self.held, SelectedLayer):
            self.cache.update(key, value, layer, take=self._take)
            return key, value
        if self.grouping is None:
            out = self.cache.update(key, value, layer)
            self._remember()
            return out
        if not self.whole:
            key, value = self.grouping.take(key, 2), self.grouping.take(value, 2)
        if self.held is None:
            return key, value
        out = self.cache.update(key, value, layer, grouping=self.grouping, width=self.width)
        self._remember()
        return out

    def _take(self, key: Tensor, value: Tensor) -> None:
        assert isinstance(self.held, SelectedLayer)
        self.held.remember(None, None)  # tokens come that nobody scores
        if self.grouping is None:
            self.held.add(key, value)
        else:
            if not self.whole:
                key, value = self.grouping.take(key, 2), self.grouping.take(value, 2)
            self.held.add(key, value, self.grouping.columns, self.width)
        self.by_class = self.held.all_held()

    def _remember(self) -> None:
        if self.read is not None:
            assert isinstance(self.held, CompressedLayer)
            plan, hidden, position = self.read
            remember(self.held, plan, self.grouping, hidden, position)

    @property
    def plain_causal(self) -> bool:
        """Whether queries and keys are the same uniform entries."""
        return (
            isinstance(self.grouping, Slices)
            and not self.past
            and (self.whole or not self.grouping.has_groups)
        )

    def mask(self, rows: int | None = None) -> Tensor | None:
        """(b or 1, 1, queries, entries) bool; None where every query sees everything.

        `rows`: of the last so many queries alone, which are dense tokens.
        """
        kept = self.grouping if self.held is None else self.held
        assert kept is not None
        assert not isinstance(kept, SelectedLayer)
        if self.grouping is None or not self.causal or rows == 1:
            return (kept.columns != FILLER)[:, None, None] if kept.has_fillers else None
        reach = self.grouping.columns if self.whole else self.grouping.reach
        reach = reach if rows is None else reach[:, -rows:]
        return visible(torch.where(reach == FILLER, FILLER, reach + self.past), kept.columns)

    def bias(self, full: Tensor, pooled: dict[Any, Tensor]) -> Tensor:
        """The position bias between queries and entries from the one between tokens, which all layers share."""
        assert self.grouping is not None
        key = self.grouping, self.whole
        if key not in pooled:
            pooled[key] = pooled_bias(full, self.grouping, queries=self.whole)
        return pooled[key]

    def prove(self, layer: int, projections: int) -> None:
        """When the layer's attention has ended: raise unless the model's code used what this stands for."""
        if self.entries is not None and self.projected != 2 * projections:
            raise broken(f"the key and value projections of layer {layer} did not run on merged vectors")
        if not self.updated:
            raise broken(f"the attention of layer {layer} did not hand its keys and values to its cache")
        if not self.attended:
            raise broken(f"layer {layer} attended without the library's attention function")

    def attend_by_class(self, query: Tensor, scale: float) -> Tensor:
        """Queries (b, heads, n, d) or the last of them, after a cache whose heads keep keys of their own choice."""
        held, rows = self.held, query.shape[2]
        assert isinstance(held, SelectedLayer)
        new = None
        if self.grouping is not None:
            reach = self.grouping.columns if self.whole else self.grouping.reach
            new = visible(reach[:, -rows:], self.grouping.columns)[:, 0]  # (b or 1, rows, new entries)

        def attend_one(number: int, own: Tensor) -> Tensor:
            entries = self.by_class[number]
            assert entries is not None
            if new is None:
                return attend(own, entries, scale)
            mask = F.pad(new, (entries.keys.shape[2] - new.shape[2], 0), value=True)
            if entries.valid is not None:
                mask = mask & entries.valid[:, None]
            return attend_masked(own, entries, mask[:, None], scale)

        return by_class(query, held, attend_one)


def _compressed_layer(cache: Any, layer: int) -> CompressedLayer | SelectedLayer | None:
    held = cache.layers[layer] if cache is not None and layer < len(cache.layers) else None
    return held if isinstance(held, (CompressedLayer, SelectedLayer)) else None


def hook_attention(
    attention: Any, projections: list[nn.Module], end: nn.Module, layer: int, *, causal: bool
) -> list[RemovableHandle]:
    """Hooks of one layer with its key and value `projections`; its output appears in `end`."""
    name = cache_argument(attention)

    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        now = current_pass()
        if now is None:
            return None
        cache = kwargs.get(name)
        held = _compressed_layer(cache, layer)
        plugin, segment = now.plugin, now.segment
        whole = plugin.at("attention", layer) if plugin else None
        site = whole or (plugin.at("kv", layer) if plugin else None)
        chooser = plugin.selects.get(layer) if plugin else None
        if site is None and held is None and (chooser is None or segment is None):
            return None
        if segment is None and held is None:
            return None  # one token without a cache: plainly dense
        if "hidden_states" not in kwargs:
            args, kwargs = args[1:], {**kwargs, "hidden_states": args[0]}
        hidden = kwargs["hidden_states"]
        if chooser is not None:
            assert held is None or isinstance(held, SelectedLayer)
            now.attention[layer] = SelectCall(chooser, now, held, cache, hidden)
            return args, {**kwargs, name: now.attention[layer]}
        grouping = segment.grouping(site.k if site else 1) if segment else None
        width = hidden.shape[1]
        if isinstance(held, CompressedLayer):
            age(module, held, site, plugin.plan if plugin else None, grouping)
        call = _AttentionCall(grouping, held, cache, width, site, causal, whole is not None, hidden)
        if "position_bias" in kwargs and kwargs["position_bias"] is None:
            # T5's first layer makes the bias for all layers: of tokens, before they are merged
            kwargs["position_bias"] = module.compute_bias(width, width, device=hidden.device)
        if held is not None and site is not None and plugin is not None and plugin.config.decode_block:
            call.read = plugin.plan, hidden, kwargs["position_embeddings"]
        if site is not None and grouping is not None and grouping.has_groups:
            entries = grouping.compress(hidden, site.compressor)
            if whole:
                kwargs["hidden_states"] = entries
                if "position_embeddings" in kwargs:
                    kwargs["position_embeddings"] = tuple(
                        grouping.take(t, 1) for t in kwargs["position_embeddings"]
                    )
            else:
                call.entries = entries
        else:
            call.whole = False
        now.attention[layer] = call
        return args, {**kwargs, name: call}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now = current_pass()
        if now is None or (call := now.attention.pop(layer, None)) is None:
            return None
        now.attended += 1
        if isinstance(call, SelectCall):
            call.prove(layer)
            if call.scores is not None:
                now.merged.append(("kv", layer))
            return None
        call.prove(layer, len(projections))
        if call.whole or call.entries is not None:
            now.merged.append(("attention" if call.whole else "kv", layer))
        if not call.whole or now.narrow is not None:
            return None
        states, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        states = call.grouping.restore(states, call.hidden, call.site.decompressor)
        return states if rest is None else (states, *rest)

    def before_projection(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        now = current_pass()
        call = now.attention.get(layer) if now else None
        if not isinstance(call, _AttentionCall) or call.entries is None:
            return None
        call.projected += 1
        return (in_eights(call.entries),)

    def after_projection(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        now = current_pass()
        call = now.attention.get(layer) if now else None
        if not isinstance(call, _AttentionCall) or call.entries is None:
            return None
        assert call.grouping is not None
        call.projected += 1
        return call.grouping.place(output[:, : call.entries.shape[1]])

    handles = [
        attention.register_forward_pre_hook(Hook(before), with_kwargs=True),
        end.register_forward_hook(Hook(after)),
    ]
    for projection in projections:
        handles += [
            projection.register_forward_pre_hook(Hook(before_projection)),
            projection.register_forward_hook(Hook(after_projection)),
        ]
    return handles


class OwnAttentionFunction:
    """Give one attention module a config that names `function`; the model's own config stays as it is."""

    def __init__(self, attention: nn.Module, name: str, function: Callable[..., Any]) -> None:
        AttentionInterface.register(name, function)
        self.attention, self.stock = attention, attention.config
        own: Any = copy.copy(self.stock)
        own._attn_implementation_internal = name
        own.variator_stock = self.stock
        self.own = attention.config = own

    def put(self) -> None:
        """Give the module the config that names the function, below those that were put since."""
        above, config = self._find(self.own)
        if config is not self.own:
            self._place(above, self.own)

    def remove(self) -> None:
        """Take it out again."""
        above, config = self._find(self.own)
        if config is self.own:
            self._place(above, self.own.variator_stock)
        elif above is None:
            self.attention.config = self.stock

    def _find(self, wanted: Any) -> tuple[Any, Any]:
        """That config or the model's own, whichever comes first from the module down, and the one above it."""
        above, config = None, self.attention.config
        while config is not wanted and hasattr(config, "variator_stock"):
            above, config = config, config.variator_stock
        return above, config

    def _place(self, above: Any, config: Any) -> None:
        if above is None:
            self.attention.config = config
        else:
            above.variator_stock = config


def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention function of the hooked layers: the model's own where nothing is compressed.

    query (b, H, queries, d), key and value (b, H_kv, entries, d) -> (b, queries, H, d) and weights or None.
    `attention_mask` is the model's, for tokens: entries have their own.
    """
    now = current_pass()
    call = now.attention.get(module.layer_idx) if now else None
    if now is None or now.narrow is None:
        return _attend(module, query, key, value, attention_mask, call, now, **kwargs)
    rows, width = now.narrow, query.shape[2]
    if call is None:
        attention_mask = _last_rows(attention_mask, rows, width, key)
    out, weights = _attend(
        module, query[:, :, -rows:], key, value, attention_mask, call, now, rows=rows, **kwargs
    )
    return at_the_end(out, width), weights


def _last_rows(mask: Tensor | None, rows: int, width: int, key: Tensor) -> Tensor | None:
    """The model's mask for the last `rows` of `width` queries; it has none where attention is plainly causal."""
    if mask is not None:
        return mask[:, :, mask.shape[2] - rows :]
    if rows == 1:
        return None
    seen = torch.ones(rows, key.shape[2], dtype=torch.bool, device=key.device)
    return seen.tril(key.shape[2] - rows)[None, None]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    call: _AttentionCall | SelectCall | None,
    now: Pass | None,
    rows: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attention_forward` of all queries, or of the last `rows`."""
    implementation = own_implementation(module)
    eager = getattr(
        sys.modules[type(module).__module__], "eager_attention_forward", ALL_ATTENTION_FUNCTIONS["sdpa"]
    )
    stock = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    if now is None or call is None:
        return stock(module, query, key, value, attention_mask, **kwargs)
    call.attended = True
    if isinstance(call, SelectCall):
        return call.attend(query, kwargs["scaling"]).transpose(1, 2).contiguous(), None
    if isinstance(call.held, SelectedLayer):
        return call.attend_by_class(query, kwargs["scaling"]).transpose(1, 2).contiguous(), None
    if (
        implementation == "flex_attention"
    ):  # its masks have a form of their own, and none means that all is seen
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if (bias := kwargs.get("position_bias")) is not None:
        kwargs["position_bias"] = call.bias(bias, now.biases)
    if implementation != "eager" and call.causal and rows is None:
        if call.plain_causal:
            return stock(module, query, key, value, None, **kwargs)
        if isinstance(call.grouping, Slices) and not call.past and not kwargs.get("dropout"):
            scale = kwargs["scaling"]
            return group_causal_attention(query, key, value, call.grouping, scale).contiguous(), None
    mask = call.mask(rows)
    if mask is None:
        return stock(module, query, key, value, None, **kwargs)
    if implementation == "eager":
        additive = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
        return eager(module, query, key, value, additive, **kwargs)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)
