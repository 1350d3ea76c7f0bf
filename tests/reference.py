"""The plain form: a compressed decoder written out token by token, as the paper and the docs of `VariatorConfig` read.

Independent of the code under test: no hooks, caches, slices or shared maths, but loops over one unpadded row
in the model's own dtype (tests use fp64). It takes only weights from the plugin, by name.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Entry(NamedTuple):
    """Positions that share one vector; `merged` unless it is a dense token."""

    positions: list[int]
    merged: bool


def entries(n: int, prompt: int, k: int | None, head: int, tail: int, *, ragged: bool = False) -> list[Entry]:
    """`n` tokens, of which the first `prompt` are compressed at ratio `k` (None: dense)."""
    if ragged:
        inner = list(range(head, prompt - tail)) if k else []
        merged = [Entry(inner[i : i + k], True) for i in range(0, len(inner), k or 1)]
        dense = [Entry([i], False) for i in range(n) if i not in inner]
        return sorted(dense + merged)
    groups = max(0, (prompt - head - tail) // k) if k else 0
    start = head if groups else 0
    out = [Entry([i], False) for i in range(start)]
    out += [Entry(list(range(start + g * k, start + (g + 1) * k)), True) for g in range(groups)]
    return out + [Entry([i], False) for i in range(start + groups * (k or 0), n)]


def held_while_decoding(
    n: int, prompt: int, k: int | None, head: int, tail: int, block: int
) -> dict[int, list[Entry]]:
    """Position of each generated token -> the entries it sees, itself the last: old tokens are merged in blocks."""
    old = entries(prompt, prompt, k, head, tail)
    recent: list[int] = []
    while k and old and not old[-1].merged and old[-1].positions[0] >= head:
        recent.insert(0, old.pop().positions[0])
    held = {}
    for token in range(prompt, n):
        if k and len(recent) - tail >= block:
            while len(recent) - tail >= k:
                old.append(Entry(recent[:k], True))
                recent = recent[k:]
        recent.append(token)
        held[token] = old + [Entry([i], False) for i in recent]
    return held


def merge(state: dict[str, Tensor], name: str, vectors: list[Tensor]) -> Tensor:
    """g = sum_j a_j h_j, a = softmax(W_c concat(h) + b_c); of a short group zeros fill the concatenation."""
    if f"{name}.compressor.weight" not in state:
        return sum(vectors) / len(vectors)
    weight, bias = (state[f"{name}.compressor.{part}"] for part in ("weight", "bias"))
    missing = [torch.zeros_like(vectors[0])] * (len(bias) - len(vectors))
    scores = (weight @ torch.cat([*vectors, *missing]) + bias)[: len(vectors)]
    weights = torch.exp(scores - scores.max())
    return sum(w * h for w, h in zip(weights / weights.sum(), vectors, strict=True))


def restore(state: dict[str, Tensor], name: str, g: Tensor, h: Tensor, activation: str) -> Tensor:
    """o = g + W_2 act(W_1 concat(g, h) + b_1) + b_2."""
    if f"{name}.decompressor.up.weight" not in state:
        return g
    down, up = (f"{name}.decompressor.{half}" for half in ("down", "up"))
    inner = state[f"{down}.weight"] @ torch.cat((g, h)) + state[f"{down}.bias"]
    inner = torch.tanh(inner) if activation == "tanh" else inner
    return g + state[f"{up}.weight"] @ inner + state[f"{up}.bias"]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE at one position: x (heads, d), cos and sin (d,)."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def logits(base, plugin, ids: Tensor, prompt: int) -> Tensor:
    """(1, n) tokens, the first `prompt` of them compressed -> (n, vocab); the rest is generated, one by one."""
    config, state, n = plugin.config, plugin.state_dict(), ids.shape[1]
    kinds = getattr(base.config, "layer_types", None) or ["full_attention"] * len(base.model.layers)
    gemma = base.config.model_type == "gemma3_text"
    whole = "attention" in config.sites

    def at(site: str, index: int) -> list[Entry]:
        slides = site != "ffn" and kinds[index] == "sliding_attention"
        k = None if slides else config.ratio(site, index)
        return entries(n, prompt, k, config.dense_head, config.dense_tail)

    def vector(entry: Entry, name: str, h: Tensor) -> Tensor:
        return merge(state, name, [h[i] for i in entry.positions]) if entry.merged else h[entry.positions[0]]

    def spread(outputs: list[tuple[Entry, Tensor]], name: str, h: Tensor) -> Tensor:
        tokens = {}
        for entry, out in outputs:
            for i in entry.positions:
                tokens[i] = restore(state, name, out, h[i], config.activation) if entry.merged else out
        return torch.stack([tokens[i] for i in range(n)])

    x = base.model.embed_tokens(ids)[0]
    for index, layer in enumerate(base.model.layers):
        extra = (kinds[index],) if gemma else ()
        cos, sin = (t[0] for t in base.model.rotary_emb(x[None], torch.arange(n)[None], *extra))
        attention, site = layer.self_attn, "attention" if whole else "kv"
        window = base.config.sliding_window if kinds[index] == "sliding_attention" else n

        def heads(v: Tensor, kind: str, position: int, attention=attention, cos=cos, sin=sin) -> Tensor:
            out = getattr(attention, f"{kind}_proj")(v).view(-1, attention.head_dim)
            if hasattr(attention, f"{kind}_norm"):
                out = getattr(attention, f"{kind}_norm")(out)
            return out if kind == "v" else rotate(out, cos[position], sin[position])

        h = layer.input_layernorm(x)
        kept = at(site, index)
        last = {
            i: entry.positions[-1] for entry in kept for i in entry.positions
        }  # end of each token's group
        later = {}
        if config.decode_block and kinds[index] != "sliding_attention":
            k = config.ratio(site, index)
            later = held_while_decoding(
                n, prompt, k, config.dense_head, config.dense_tail, config.decode_block
            )
        known: dict[tuple, tuple[Tensor, Tensor]] = {}

        def stored(entry: Entry, kind: int, site=site, index=index, h=h, heads=heads, known=known) -> Tensor:
            key = tuple(entry.positions)
            if key not in known:
                x = vector(entry, f"{site}.{index}", h)
                known[key] = tuple(heads(x, name, entry.positions[-1]) for name in "kv")
            return known[key][kind]

        outputs = []
        for entry in kept if whole else [Entry([i], False) for i in range(n)]:
            position = entry.positions[-1]
            query = heads(vector(entry, f"{site}.{index}", h), "q", position)
            seen = later.get(position) or [
                e for e in kept if last[position] - window < e.positions[-1] <= last[position]
            ]
            share, out = query.shape[0] // stored(seen[0], 0).shape[0], []
            for head in range(query.shape[0]):
                scores = torch.stack([stored(e, 0)[head // share] @ query[head] for e in seen])
                scores = scores * attention.scaling
                weights = torch.exp(scores - scores.max())
                weights = weights / weights.sum()
                out.append(sum(w * stored(e, 1)[head // share] for w, e in zip(weights, seen, strict=True)))
            outputs.append((entry, attention.o_proj(torch.cat(out))))
        a = spread(outputs, f"{site}.{index}", h)
        x = x + (layer.post_attention_layernorm(a) if gemma else a)

        h = (layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm)(x)
        outputs = [(e, layer.mlp(vector(e, f"ffn.{index}", h))) for e in at("ffn", index)]
        f = spread(outputs, f"ffn.{index}", h)
        x = x + (layer.post_feedforward_layernorm(f) if gemma else f)
    return base.lm_head(base.model.norm(x))
