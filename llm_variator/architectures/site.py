"""Where a plugin attaches: hooks on the modules that an `Architecture` names. No forward is copied.

FFN: a pre-hook merges the groups, the frozen FFN runs on the entries, a hook restores the tokens.
KV: the key and value projections run on the entries; their outputs are put back at the entries' columns, so
that the model's own code applies its norms and the position of each group's last token; then only the
entries' columns go to the cache and to attention.
Attention: the whole self-attention runs on the entries, then a hook restores the tokens.
Cross (T5): the decoder gets one merged encoder state per group, so that all of its layers read n/k of them.
Where a model adds the residual inside the module that ends a site (BERT), the tokens are restored before it.
Last layer of a decoder: what nobody reads is left out, see `unread`.
"""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_variator.architectures.ageing import age, remember
from llm_variator.architectures.unread import at_the_end, hook_last_layer
from llm_variator.attention import group_causal_attention, pooled_bias, visible
from llm_variator.cache import CompressedLayer
from llm_variator.config import VariatorConfig
from llm_variator.errors import VariatorError
from llm_variator.groups import FILLER, Grouping, Slices
from llm_variator.plugin import SiteLayers
from llm_variator.session import Session, begin_answer, begin_encoding, begin_pass, current

ATTENTION_FUNCTION = "variator"  # the name under which transformers finds `attention_forward`
_WORTH_FILLING = 256  # entries from which rows of zeros behind them cost less than they bring


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family of models as paths of real modules; a path that does not resolve fails when attaching."""

    model_types: tuple[str, ...]
    layers: str
    """From the reader to its list of layers; the rest are paths from one layer."""
    ffn: str
    attention: str
    key: str
    """From the attention, like `value`."""
    value: str
    query: str = ""
    """From the attention, like `output`. Of decoders, for their last layer."""
    output: str = ""
    norm: str = ""
    """From a layer: what its attention reads goes through this first."""
    neurons: str = ""
    """From a layer: the projection of its FFN that reads the neurons' activations."""
    ffn_end: str = ""
    """Where the FFN's output appears, if not in `ffn`."""
    attention_end: str = ""
    """Where the attention's output appears, if not in `attention`."""
    reader: str = ""
    """From the model (an encoder's without its head) to the module that reads the tokens to compress."""
    answers: str = ""
    """From an encoder (without its head) to the decoder that reads it, where a model has one."""
    decoder: bool = True

    def stack(self, base: PreTrainedModel) -> nn.Module:
        """The module of `base` that reads the tokens to compress."""
        return (base if self.decoder else base.base_model).get_submodule(self.reader)

    def blocks(self, base: PreTrainedModel) -> nn.ModuleList:
        """The layers of `base`."""
        return self.stack(base).get_submodule(self.layers)  # type: ignore[return-value]

    def answering(self, base: PreTrainedModel) -> nn.Module | None:
        """The decoder of `base` that reads what its encoder read; None where there is none."""
        return getattr(base.base_model, self.answers, None) if self.answers else None

    def check(self, base: PreTrainedModel) -> None:
        """Raise naming the module that `base` lacks, or the setting that does not suit."""
        kind = type(base).__name__
        try:
            blocks = self.blocks(base)
        except AttributeError:
            head = " with its language-model head (AutoModelForCausalLM)" if self.decoder else " whole"
            raise VariatorError(f"{kind} has no {self.layers!r}: load it{head}") from None
        paths = [self.ffn, self.neurons, self.ffn_end, self.attention, self.attention_end]
        inner = filter(None, (self.key, self.value, self.query, self.output))
        paths += [self.norm, *(f"{self.attention}.{projection}" for projection in inner)]
        for path in filter(None, paths):
            for index, block in enumerate(blocks):
                try:
                    block.get_submodule(path)
                except AttributeError:
                    raise VariatorError(f"{kind}: layer {index} has no {path!r}") from None
        if not self.decoder and getattr(base.config, "is_decoder", False):
            raise VariatorError(f"{kind} with is_decoder=True is not supported: load it as an encoder")
        if getattr(base.config, "chunk_size_feed_forward", 0):
            raise VariatorError(
                "chunk_size_feed_forward cuts the sequence inside the FFN: set it to 0 in the model's config"
            )

    def slides(self, base: PreTrainedModel, layer: int) -> bool:
        """Whether `layer` attends through a sliding window: its cache is short already and stays dense."""
        kinds = getattr(base.config, "layer_types", None)
        if kinds is not None:
            return kinds[layer] != "full_attention"
        return getattr(base.config, "sliding_window", None) is not None

    def attach(self, base: PreTrainedModel) -> list[Any]:
        """Put the hooks on every layer of `base`; calling `remove()` on each of the handles undoes it."""
        begin: Any = begin_pass if self.decoder else begin_encoding
        handles: list[Any] = [self.stack(base).register_forward_pre_hook(begin, with_kwargs=True)]
        if (reader := self.answering(base)) is not None:
            handles.append(reader.register_forward_pre_hook(begin_answer, with_kwargs=True))
        for index, block in enumerate(self.blocks(base)):
            ffn, attention = block.get_submodule(self.ffn), block.get_submodule(self.attention)
            handles += _hook_ffn(ffn, block.get_submodule(self.ffn_end or self.ffn), index)
            if not self.slides(base, index):
                projections = [attention.get_submodule(path) for path in (self.key, self.value)]
                end = block.get_submodule(self.attention_end or self.attention)
                handles += _hook_attention(attention, projections, end, index, causal=self.decoder)
            last = self.decoder and index == len(self.blocks(base)) - 1
            if last or not self.slides(base, index):
                handles.append(OwnAttentionFunction(attention, ATTENTION_FUNCTION, attention_forward))
            if last:
                query, output = (attention.get_submodule(path) for path in (self.query, self.output))
                norm = block.get_submodule(self.norm)
                handles += hook_last_layer(block, norm, query, output, attention, index)
        return handles


def execution_device(block: nn.Module) -> torch.device:
    """Where a layer computes: with `device_map` its weights may lie elsewhere between passes."""
    for module in block.modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return next(block.parameters()).device


def _hook_ffn(ffn: nn.Module, end: nn.Module, layer: int) -> list[RemovableHandle]:
    def before(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        session = current()
        if session is None or session.segment is None or session.plugin is None:
            return None
        if session.narrow is not None:
            return None  # the columns read are dense
        if (site := session.plugin.at("ffn", layer)) is None:
            return None
        grouping = session.segment.grouping(site.k)
        if not grouping.has_groups:
            return None
        entries = grouping.compress(args[0], site.compressor)
        session.stash["ffn", layer] = site, grouping, args[0], entries.shape[1]
        session.merged += 1
        return (_in_eights(entries),)

    def after(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        session = current()
        if session is None or (kept := session.stash.pop(("ffn", layer), None)) is None:
            return None
        site, grouping, x, count = kept
        return grouping.restore(output[:, :count], x, site.decompressor)

    return [ffn.register_forward_pre_hook(before), end.register_forward_hook(after)]


def _in_eights(entries: Tensor) -> Tensor:
    """(b, m, d) with rows of zeros behind: half-precision products on a CPU are up to 6 % slower for an odd m."""
    if entries.device.type != "cpu" or entries.dtype.itemsize != 2 or entries.shape[1] < _WORTH_FILLING:
        return entries
    return F.pad(entries, (0, 0, 0, -entries.shape[1] % 8))


@dataclasses.dataclass
class _AttentionCall:
    """What one attention layer does with its keys and queries in this pass.

    Stands in for the cache inside the layer: `update` keeps the entries' columns, stores them where there is a
    cache, and returns all keys and values to attend to.
    """

    grouping: Grouping | None
    """None: one dense token per row."""
    held: CompressedLayer | None
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
    read: tuple[VariatorConfig, Tensor, tuple[Tensor, ...]] | None = None
    """What is kept of the pass where decoding compresses: the plugin's settings, inputs, positions of tokens."""

    def __post_init__(self) -> None:
        self.past = self.held.tokens if self.held is not None else 0

    def get_seq_length(self, layer: int) -> int:
        return self.past

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
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

    def _remember(self) -> None:
        if self.read is not None:
            assert self.held is not None
            config, hidden, position = self.read
            remember(self.held, config, self.grouping, hidden, position)

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
        if self.grouping is None or not self.causal or rows == 1:
            return (kept.columns != FILLER)[:, None, None] if kept.has_fillers else None
        reach = self.grouping.columns if self.whole else self.grouping.reach
        reach = reach if rows is None else reach[:, -rows:]
        return visible(torch.where(reach == FILLER, FILLER, reach + self.past), kept.columns)

    def bias(self, full: Tensor, stash: dict[Any, Any]) -> Tensor:
        """The position bias between queries and entries from the one between tokens, which all layers share."""
        assert self.grouping is not None
        key = "bias", self.grouping, self.whole
        if key not in stash:
            stash[key] = pooled_bias(full, self.grouping, queries=self.whole)
        return stash[key]


def _compressed_layer(cache: Any, layer: int) -> CompressedLayer | None:
    held = cache.layers[layer] if cache is not None and layer < len(cache.layers) else None
    return held if isinstance(held, CompressedLayer) else None


def _hook_attention(
    attention: Any, projections: list[nn.Module], end: nn.Module, layer: int, *, causal: bool
) -> list[RemovableHandle]:
    def before(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        session = current()
        if session is None:
            return None
        cache = kwargs.get("past_key_values")
        held = _compressed_layer(cache, layer)
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
        width = hidden.shape[1]
        if held is not None:
            age(module, held, site, plugin.config if plugin else None, grouping)
        call = _AttentionCall(grouping, held, cache, width, site, causal, whole is not None, hidden)
        if "position_bias" in kwargs and kwargs["position_bias"] is None:
            # T5's first layer makes the bias for all layers: of tokens, before they are merged
            kwargs["position_bias"] = module.compute_bias(width, width, device=hidden.device)
        if held is not None and site is not None and plugin is not None and plugin.config.decode_block:
            call.read = plugin.config, hidden, kwargs["position_embeddings"]
        if site is not None and grouping is not None and grouping.has_groups:
            entries = grouping.compress(hidden, site.compressor)
            session.merged += 1
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
        session.stash["attention", layer] = call
        return args, {**kwargs, "past_key_values": call}

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        session = current()
        call = session.stash.pop(("attention", layer), None) if session else None
        if session is None or call is None or not call.whole or session.narrow is not None:
            return None
        states, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        states = call.grouping.restore(states, call.hidden, call.site.decompressor)
        return states if rest is None else (states, *rest)

    def before_projection(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        session = current()
        call = session.stash.get(("attention", layer)) if session else None
        return None if call is None or call.entries is None else (_in_eights(call.entries),)

    def after_projection(module: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor | None:
        session = current()
        call = session.stash.get(("attention", layer)) if session else None
        if call is None or call.entries is None:
            return None
        assert call.grouping is not None
        return call.grouping.place(output[:, : call.entries.shape[1]])

    handles = [
        attention.register_forward_pre_hook(before, with_kwargs=True),
        end.register_forward_hook(after),
    ]
    for projection in projections:
        handles += [
            projection.register_forward_pre_hook(before_projection),
            projection.register_forward_hook(after_projection),
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
        attention.config = own

    def remove(self) -> None:
        """Give the module its own config back."""
        self.attention.config = self.stock


def attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention function of the hooked layers: the model's own where nothing is compressed.

    query (b, H, queries, d), key and value (b, H_kv, entries, d) -> (b, queries, H, d) and weights or None.
    `attention_mask` is the model's, for tokens: entries have their own.
    """
    session = current()
    call = session.stash.get(("attention", module.layer_idx)) if session else None
    if session is None or session.narrow is None:
        return _attend(module, query, key, value, attention_mask, call, session, **kwargs)
    rows, width = session.narrow, query.shape[2]
    if call is None:
        attention_mask = _last_rows(attention_mask, rows, width, key)
    out, weights = _attend(
        module, query[:, :, -rows:], key, value, attention_mask, call, session, rows=rows, **kwargs
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
    call: _AttentionCall | None,
    session: Session | None,
    rows: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """`attention_forward` of all queries, or of the last `rows`."""
    implementation = module.config.variator_stock._attn_implementation
    eager = sys.modules[type(module).__module__].eager_attention_forward
    stock = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    if session is None or call is None:
        return stock(module, query, key, value, attention_mask, **kwargs)
    if (
        implementation == "flex_attention"
    ):  # its masks have a form of their own, and none means that all is seen
        stock = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if (bias := kwargs.get("position_bias")) is not None:
        kwargs["position_bias"] = call.bias(bias, session.stash)
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
