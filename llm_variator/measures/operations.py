"""Operations by arithmetic alone, for any shape and length: what reading a prompt costs, dense and compressed.

Counts floating-point operations of matrix products (a multiply-add is two), as torch's `FlopCounterMode` does:
norms, softmax, activations and sums are left out. One prompt, batch 1; nothing is loaded or run.
Decoders (`Stack`, `prefill`) read a prompt up to the logits of its last token. Encoders (`EncoderShape`,
`encoding`) read it whole; a T5's decoder then reads it and the tokens of an answer.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from llm_variator.baselines.ltp import kept_tokens
from llm_variator.config import VariatorConfig
from llm_variator.engine import blocks
from llm_variator.engine.groups import Split, split
from llm_variator.errors import VariatorError


@dataclasses.dataclass(frozen=True)
class Stack:
    """The shape of a decoder's layers; the numbers of weights are per layer and count matrices only."""

    layers: int
    dim: int
    ffn_weights: int
    query_weights: int
    """Of the query and output projections, which every token passes."""
    key_value_weights: int
    attention_width: int
    """Query heads times their width."""
    key_value_width: int
    vocabulary: int
    windows: tuple[int | None, ...]
    """Sliding window of each layer; None: full attention."""
    kv_heads: int = 1

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Stack:
        """Read a shape from a LLaMA-like configuration; raises VariatorError for another kind."""
        try:
            dim, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
            kv_heads, inner = config.num_key_value_heads, config.intermediate_size
        except AttributeError as error:
            raise VariatorError(
                f"cannot count the operations of model type {config.model_type!r}: {error}; decoders built like "
                "LLaMA, T5 and BERT can be counted"
            ) from None
        width = getattr(config, "head_dim", None) or dim // heads
        window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        if kinds is None:
            kinds = ["full_attention" if window is None else "sliding_attention"] * layers
        return cls(
            layers=layers,
            dim=dim,
            ffn_weights=3 * dim * inner,
            query_weights=2 * dim * heads * width,
            key_value_weights=2 * dim * kv_heads * width,
            attention_width=heads * width,
            key_value_width=kv_heads * width,
            vocabulary=config.vocab_size,
            windows=tuple(None if kind == "full_attention" else window for kind in kinds),
            kv_heads=kv_heads,
        )


@dataclasses.dataclass(frozen=True)
class Cost:
    """Floating-point operations of one prefill, and what it leaves in the cache."""

    ffn: int = 0
    projections: int = 0
    scores: int = 0
    """Query-key and weight-value products."""
    plugin: int = 0
    head: int = 0
    """Next-token logits: of the prompt's last token, or of every token of an encoder's answer."""
    answer: int = 0
    """T5's decoder without its logits: the keys and values of its cross-attention, and the tokens of the answer."""
    cache_entries: float = 0
    """Sum over the layers of a decoder; of a layer whose heads hold different numbers, their mean."""

    @property
    def total(self) -> int:
        """All operations."""
        return self.encoder + self.head + self.answer

    @property
    def encoder(self) -> int:
        """All operations before a T5's decoder, and before logits."""
        return self.ffn + self.projections + self.scores + self.plugin

    def __add__(self, other: Cost) -> Cost:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Cost(*(ours + theirs for ours, theirs in pairs))


def prefill(
    stack: Stack,
    n: int,
    plugin: VariatorConfig | None = None,
    *,
    causal: bool = True,
    reads: int | None = None,
) -> Cost:
    """Cost of reading a prompt of `n` tokens.

    Args:
        stack: the model's shape.
        n: prompt tokens.
        plugin: with `dense_head` and `dense_tail` set; None: the base model.
        causal: count the scores that causality leaves; False: the whole rectangle of queries and entries, as
            the eager attention of transformers computes (and `FlopCounterMode` counts) it.
        reads: the logits of the last so many tokens are read and the rest of the last layer is left out
            (`engine.hooks.last_layer`), where they are dense tokens; None: the whole layer.
    """
    total = Cost(head=2 * stack.dim * stack.vocabulary * (reads or 1))
    for layer in range(stack.layers):
        slides = stack.windows[layer] is not None
        ffn = _split(plugin, "ffn", layer, n)
        kv = None if slides else _split(plugin, "kv", layer, n)
        whole = None if slides else _split(plugin, "attention", layer, n)
        entries = whole or kv or (1, Split(0, 0, n))
        queries = whole[1].entries if whole else n
        heads = plugin.head_ratios(layer, stack.kv_heads) if plugin and not slides else None
        if plugin is not None and heads is not None:
            narrow = reads if layer == stack.layers - 1 else None
            if narrow and ffn and ffn[1].tail < narrow:
                narrow = None
            total += _selecting(stack, plugin, n, heads, ffn, narrow)
            continue
        if layer == stack.layers - 1 and reads and all(p[1].tail >= reads for p in (ffn, kv, whole) if p):
            site = "attention" if whole else "kv"
            total += _last(stack, plugin, n, entries, reads, layer, site, causal=causal)
            continue
        seen = _seen(entries, queries, stack.windows[layer]) if causal else queries * entries[1].entries
        total += Cost(
            ffn=2 * stack.ffn_weights * (ffn[1].entries if ffn else n),
            projections=2 * stack.query_weights * queries + 2 * stack.key_value_weights * entries[1].entries,
            scores=2 * 2 * stack.attention_width * seen,
            plugin=sum(
                _plugin_cost(plugin, site, stack.dim, *part, restores=site != "kv")
                for site, part in (("ffn", ffn), ("kv", kv), ("attention", whole))
                if plugin and part
            ),
            cache_entries=entries[1].entries if not slides else min(n, stack.windows[layer] or n),
        )
    return total


def _selecting(
    stack: Stack,
    plugin: VariatorConfig,
    n: int,
    heads: tuple[int, ...],
    ffn: tuple[int, Split] | None,
    reads: int | None,
) -> Cost:
    """Cost of a layer whose KV `heads` keep keys of their own choice; `reads` as for the last layer, None elsewhere."""
    head, tail = plugin.ends
    place = blocks.Place(head, tail, 0, n)
    pairs = sum(blocks.seen(n, k, head, tail, plugin.block) for k in heads)
    if reads:
        before = max(0, tail - reads)  # of the tail, what others read
        pairs -= sum(blocks.seen(n - reads, k, head, before, plugin.block) for k in heads)
    held = sum(blocks.entries(place, k, plugin.block, n) for k in heads)
    queries = reads or n
    restored = _plugin_cost(plugin, "ffn", stack.dim, *ffn, restores=True) if ffn and not reads else 0
    return Cost(
        ffn=2 * stack.ffn_weights * (reads or (ffn[1].entries if ffn else n)),
        projections=2 * stack.query_weights * queries + 2 * stack.key_value_weights * n,
        scores=2 * 2 * stack.attention_width * pairs // len(heads),
        plugin=restored + 2 * stack.dim * plugin.score_fits * len(heads) * n,
        cache_entries=held / len(heads),
    )


def _last(
    stack: Stack,
    plugin: VariatorConfig | None,
    n: int,
    entries: tuple[int, Split],
    reads: int,
    layer: int,
    site: str,
    *,
    causal: bool,
) -> Cost:
    """Cost of a last layer whose last `reads` columns alone are read: keys and values of all `entries`, and they.

    `site`: which made the entries.
    """
    k, part = entries
    held = part.entries
    window = stack.windows[layer] or n
    seen = sum(min(held - i, window) for i in range(reads)) if causal else reads * held
    return Cost(
        ffn=2 * stack.ffn_weights * reads,
        projections=2 * stack.query_weights * reads + 2 * stack.key_value_weights * held,
        scores=2 * 2 * stack.attention_width * seen,
        plugin=_plugin_cost(plugin, site, stack.dim, k, part, restores=False)
        if plugin and part.groups
        else 0,
        cache_entries=min(held, window),
    )


def _split(
    plugin: VariatorConfig | None, site: str, layer: int, n: int, *, ragged: bool = False
) -> tuple[int, Split] | None:
    """Ratio and split of a site; None where it is dense."""
    k = plugin.ratio(site, layer) if plugin else None
    if plugin is None or k is None:
        return None
    return k, split(n, k, *plugin.ends, ragged=ragged)


def _seen(entries: tuple[int, Split], queries: int, window: int | None) -> int:
    """Number of (query, entry) pairs that causality leaves."""
    k, (head, groups, tail) = entries
    if queries == head + groups + tail:  # each query is an entry
        if window is None or window >= queries:
            return queries * (queries + 1) // 2
        return window * (window + 1) // 2 + (queries - window) * window
    in_groups = k * (groups * head + groups * (groups + 1) // 2)
    in_tail = tail * (head + groups) + tail * (tail + 1) // 2
    return head * (head + 1) // 2 + in_groups + in_tail


def _plugin_cost(plugin: VariatorConfig, site: str, dim: int, k: int, part: Split, *, restores: bool) -> int:
    """Merge and restore of one site: the fused form of `layers`, cheaper than the paper's count."""
    tokens, cost = part.groups * k, 0
    if k > 1 and plugin.compressor_of(site) == "weighted":
        cost += 2 * dim * k * tokens + 2 * dim * tokens  # scores; weighted sum
    if restores and plugin.decompressor == "adapter":
        cost += 2 * dim * plugin.r * (part.groups + 2 * tokens)  # down from g; down from h and up
    return cost


@dataclasses.dataclass(frozen=True)
class EncoderShape:
    """The shape of a T5 or BERT; the numbers of weights are per layer and count matrices only."""

    layers: int
    dim: int
    ffn_weights: int
    projection_weights: int
    """Of one of the projections Q, K, V and O."""
    attention_width: int
    """Heads times their width."""
    decoder_layers: int = 0
    vocabulary: int = 0
    """Of a decoder's logits; BERT's heads are left out."""

    @classmethod
    def of(cls, config: PreTrainedConfig) -> EncoderShape:
        """Read a shape from a T5, mT5 or BERT configuration; raises VariatorError for another kind."""
        shape: Any = config
        if config.model_type == "bert":
            dim = shape.hidden_size
            return cls(shape.num_hidden_layers, dim, 2 * dim * shape.intermediate_size, dim * dim, dim)
        if config.model_type not in ("t5", "mt5"):
            raise VariatorError(f"cannot count the operations of an encoder of type {config.model_type!r}")
        width = shape.num_heads * shape.d_kv
        return cls(
            layers=shape.num_layers,
            dim=shape.d_model,
            ffn_weights=(3 if shape.is_gated_act else 2) * shape.d_model * shape.d_ff,
            projection_weights=shape.d_model * width,
            attention_width=width,
            decoder_layers=shape.num_decoder_layers if shape.is_encoder_decoder else 0,
            vocabulary=shape.vocab_size if shape.is_encoder_decoder else 0,
        )


def encoding(
    shape: EncoderShape,
    n: int,
    *,
    answer: int = 0,
    plugin: VariatorConfig | None = None,
    keep: float | None = None,
    causal: bool = True,
) -> Cost:
    """Cost of reading `n` tokens without padding and, with a T5, of answering.

    Args:
        shape: the model's; a student's is that of its own configuration.
        n: tokens that the encoder reads.
        answer: tokens that a T5's decoder reads, its start token included: so many logits. 0: the encoder alone.
        plugin: with `dense_head` and `dense_tail` set; None: no plugin.
        keep: share of the tokens that token pruning sends through each FFN; None: no pruning.
        causal: count what decoding step by step computes of the answer's own scores; False: the whole square,
            as the eager attention of transformers computes (and `FlopCounterMode` counts) a given answer.
    """
    total = Cost()
    dense = 1, Split(0, 0, n)
    for layer in range(shape.layers):
        ffn = _split(plugin, "ffn", layer, n, ragged=True)
        kv = _split(plugin, "kv", layer, n, ragged=True)
        whole = _split(plugin, "attention", layer, n, ragged=True)
        entries = (whole or kv or dense)[1].entries
        queries = whole[1].entries if whole else n
        passing = ffn[1].entries if ffn else n if keep is None else kept_tokens(n, keep)
        total += Cost(
            ffn=2 * shape.ffn_weights * passing,
            projections=2 * 2 * shape.projection_weights * (queries + entries),
            scores=2 * 2 * shape.attention_width * queries * entries,
            plugin=sum(
                _plugin_cost(plugin, site, shape.dim, *part, restores=site != "kv")
                for site, part in (("ffn", ffn), ("kv", kv), ("attention", whole))
                if plugin and part
            ),
        )
    if not answer:
        return total
    cross = _split(plugin, "cross", 0, n, ragged=True)
    states = (cross or dense)[1].entries
    pairs = answer * (answer + 1) // 2 if causal else answer * answer
    own = (
        2 * answer * (6 * shape.projection_weights + shape.ffn_weights)
    )  # Q and O of the cross-attention too
    read = 2 * 2 * shape.projection_weights * states
    scores = 2 * 2 * shape.attention_width * (pairs + answer * states)
    logits = 2 * shape.dim * shape.vocabulary * answer if shape.decoder_layers else 0
    merged = _plugin_cost(plugin, "cross", shape.dim, *cross, restores=False) if plugin and cross else 0
    return total + Cost(answer=shape.decoder_layers * (own + read + scores), head=logits, plugin=merged)


def ffn_share_left(k: int, r: int, dim: int) -> float:
    """Share of an FFN's operations that a plugin leaves, counted as the paper does (section 3.4).

    The paper takes an FFN four times as wide inside as outside, and the decompressor applied to the concatenation;
    `encoding` and `prefill` count what this library computes, which is less.
    """
    return 1 / k + (4 + k + 3 * r) / (8 * dim)


def ffn_parameters(k: int, r: int, dim: int) -> int:
    """Parameters of the plugin of one FFN (paper section 3.4): k²d + k to compress, 3rd + r + d to restore."""
    return k * k * dim + k + 3 * r * dim + r + dim


def parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones once; works on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())
