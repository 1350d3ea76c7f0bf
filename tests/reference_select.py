"""The plain form of the compressor "select": one boolean mask per KV head, filled in by loops, as its rules read.

Independent of the code under test, like `reference`: no hooks, caches or shared maths; one unpadded row, read in one
pass in the model's own dtype (tests use fp64). A mask says which keys a query sees; nothing is ever taken away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from reference import entries, merge, restore, rotate
from torch import Tensor


class Select(NamedTuple):
    """What a plugin does: which tokens it would keep, and whose FFN sites it merges."""

    ratios: Sequence[Sequence[int]]
    """Layers x KV heads."""
    block: int
    tail: int
    weights: Sequence[Tensor | None]
    """Per layer (F, KV heads, d); None where no head of the layer chooses."""
    biases: Sequence[Tensor | None]
    """Per layer (F, KV heads)."""
    merging: Any = None
    """A plugin with the site "ffn"."""


class Segment(NamedTuple):
    """Tokens that follow each other: a prompt that is reduced once it is read, or, with None, dense ones."""

    tokens: int
    select: Select | None = None
    head: int = 0


class Read(NamedTuple):
    """One pass over all segments."""

    logits: Tensor
    """(n, vocab)."""
    kept: list[list[list[int]]]
    """Of each layer and KV head the positions in memory after the last token, ascending."""
    hidden: list[Tensor]
    """What each layer reads, (n, d), and the last layer's output after the norm."""

    def entries(self, layer: int) -> list[int]:
        """Entries of each KV head of a layer."""
        return [len(positions) for positions in self.kept[layer]]


def stays_dense(n: int, head: int, tail: int, block: int) -> bool:
    """Whether a prompt is too short to lose anything."""
    return n - head < 2 * block or n - head - tail <= 0


def score(x: Tensor, weight: Tensor, bias: Tensor) -> float:
    """x (d,), weight (F, d), bias (F,)."""
    return math.log(sum(math.exp(2 * float(x @ w + b)) for w, b in zip(weight, bias, strict=True)))


def best(scores: Sequence[float], among: Sequence[int], count: int) -> set[int]:
    """The `count` of the positions `among` with the highest scores; of equals the earlier one."""
    left, chosen = list(among), set()
    for _ in range(count):
        top = left[0]
        for i in left:
            if scores[i] > scores[top]:
                top = i
        left.remove(top)
        chosen.add(top)
    return chosen


def blocks(n: int, head: int, block: int) -> list[list[int]]:
    """Positions of each block of `n` tokens, counted from the end of the head; the last may be short."""
    return [list(range(start, min(start + block, n))) for start in range(head, n, block)]


def seen_while_reading(
    scores: Sequence[float], ratio: int, n: int, head: int, tail: int, block: int
) -> list[list[bool]]:
    """Of a prompt: [query][key]."""
    if stays_dense(n, head, tail, block):
        return [[key <= query for key in range(n)] for query in range(n)]
    number, chosen = {}, set()
    for b, positions in enumerate(blocks(n, head, block)):
        number |= dict.fromkeys(positions, b)
        if len(positions) == block:
            chosen |= best(scores, positions, block // ratio)

    def sees(query: int, key: int) -> bool:
        if key > query:
            return False
        if key < head or key >= n - tail:
            return True
        return number[key] >= number[query] - 1 or key in chosen

    return [[sees(query, key) for key in range(n)] for query in range(n)]


def kept_after(scores: Sequence[float], ratio: int, n: int, head: int, tail: int, block: int) -> list[int]:
    """Positions of a prompt that are left of it."""
    if stays_dense(n, head, tail, block):
        return list(range(n))
    kept = set(range(head)) | set(range(n - tail, n))
    for positions in blocks(n - tail, head, block):
        kept |= best(scores, positions, math.ceil(len(positions) / ratio))
    return sorted(kept)


def head_mask(
    h: Tensor, index: int, g: int, segments: Sequence[Segment], *, slides: bool
) -> tuple[Tensor, list[int]]:
    """Of one KV head of layer `index`, which reads h (n, d): (n, n) what each query sees, and what is left."""
    mask = torch.zeros(len(h), len(h), dtype=torch.bool)
    memory: list[int] = []  # what earlier segments have left
    start = 0
    for segment in segments:
        length, select = segment.tokens, segment.select
        own = [[key <= query for key in range(length)] for query in range(length)]
        left = list(range(length))
        if select is not None and not slides and max(select.ratios[index]) > 1:
            weight, bias = select.weights[index], select.biases[index]
            rows = h[start : start + length].detach()
            scores = [score(row, weight[:, g], bias[:, g]) for row in rows]
            rule = (scores, select.ratios[index][g], length, segment.head, select.tail, select.block)
            own, left = seen_while_reading(*rule), kept_after(*rule)
        for query in range(length):
            for key in memory:
                mask[start + query, key] = True
            for key in range(length):
                mask[start + query, start + key] = own[query][key]
        memory += [start + key for key in left]
        start += length
    return mask, memory


def read(
    base,
    ids: Tensor | None,
    segments: Sequence[Segment],
    *,
    embedded: Tensor | None = None,
    head_mask: Callable[..., tuple[Tensor, list[int]]] = head_mask,
) -> Read:
    """(1, n) tokens, or their vectors `embedded` (1, n, d), in `segments` -> what comes of them."""
    x = (base.model.embed_tokens(ids) if embedded is None else embedded)[0]
    n, gemma = len(x), base.config.model_type == "gemma3_text"
    assert n == sum(segment.tokens for segment in segments)
    starts = [sum(segment.tokens for segment in segments[:i]) for i in range(len(segments))]
    kinds = getattr(base.config, "layer_types", None) or ["full_attention"] * len(base.model.layers)
    hidden, kept = [], []
    for index, layer in enumerate(base.model.layers):
        hidden.append(x)
        slides, attention = kinds[index] == "sliding_attention", layer.self_attn
        h = layer.input_layernorm(x)

        # a mask for each KV head
        groups = attention.k_proj(h).shape[-1] // attention.head_dim
        masks, left = zip(
            *(head_mask(h, index, g, segments, slides=slides) for g in range(groups)), strict=True
        )
        mask = torch.stack(masks)
        kept.append(list(left))
        if slides:
            for query in range(n):
                for key in range(n):
                    mask[:, query, key] &= query - key < base.config.sliding_window

        # attention under it
        extra = (kinds[index],) if gemma else ()
        cos, sin = (t[0] for t in base.model.rotary_emb(x[None], torch.arange(n)[None], *extra))

        def heads(kind: str, h=h, attention=attention, cos=cos, sin=sin) -> Tensor:
            out = getattr(attention, f"{kind}_proj")(h).view(len(h), -1, attention.head_dim)
            if hasattr(attention, f"{kind}_norm"):
                out = getattr(attention, f"{kind}_norm")(out)
            out = out.transpose(0, 1)  # (heads, n, head_dim)
            return out if kind == "v" else rotate(out, cos, sin)

        q, k, v = (heads(kind) for kind in "qkv")
        share, outputs = len(q) // groups, []
        for head in range(len(q)):
            logits = (q[head] @ k[head // share].T) * attention.scaling
            weights = logits.masked_fill(~mask[head // share], -torch.inf).softmax(-1)
            outputs.append(weights @ v[head // share])
        a = attention.o_proj(torch.cat(outputs, -1))
        x = x + (layer.post_attention_layernorm(a) if gemma else a)

        h = (layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm)(x)
        f = torch.cat(
            [
                feed_forward(layer.mlp, index, segment, h[start : start + segment.tokens])
                for segment, start in zip(segments, starts, strict=True)
            ]
        )
        x = x + (layer.post_feedforward_layernorm(f) if gemma else f)
    x = base.model.norm(x)
    return Read(base.lm_head(x), kept, [*hidden, x])


def feed_forward(mlp, index: int, segment: Segment, h: Tensor) -> Tensor:
    """The FFN of one segment (n, d), with neighbours merged where its plugin does."""
    plugin = segment.select.merging if segment.select is not None else None
    k = plugin.config.ratio("ffn", index) if plugin is not None else None
    if k is None:
        return mlp(h)
    state, name, n = plugin.state_dict(), f"ffn.{index}", len(h)
    tokens: list[Any] = [None] * n
    for positions, merged in entries(n, n, k, segment.head, segment.select.tail):
        out = mlp(merge(state, name, [h[i] for i in positions]) if merged else h[positions[0]])
        for i in positions:
            tokens[i] = restore(state, name, out, h[i], plugin.config.activation) if merged else out
    return torch.stack(tokens)


def greedy(base, ids: Tensor, segments: Sequence[Segment], steps: int) -> tuple[Tensor, Tensor]:
    """The `steps` likeliest tokens after `segments`, (steps,), and the logits of each, (steps, vocab)."""
    found = []
    for step in range(steps):
        more = [Segment(step)] if step else []
        found.append(read(base, ids, [*segments, *more]).logits[-1])
        ids = torch.cat((ids, found[-1].argmax().view(1, 1)), dim=1)
    return ids[0, -steps:], torch.stack(found)


def of_plugin(plugin, layers: int, groups: int) -> Select:
    """What a plugin of the library says it does: from its config, and its weights by name."""
    config, state = plugin.config, plugin.state_dict()
    k = config.k if isinstance(config.k, int) else config.k["kv"]
    ratios = [list(row) for row in config.k_per_head or [[k] * groups] * layers]
    if config.layers is not None:
        ratios = [row if i in config.layers else [1] * groups for i, row in enumerate(ratios)]
    return Select(
        ratios,
        config.block,
        config.dense_tail,
        [state.get(f"kv.{i}.score.weight") for i in range(layers)],
        [state.get(f"kv.{i}.score.bias") for i in range(layers)],
        plugin if "ffn" in config.sites else None,
    )
