"""The plain form of a compressed encoder, T5 or BERT, written out token by token (see `reference.py`)."""

from __future__ import annotations

import math

import torch
from reference import Entry, entries, merge, restore
from torch import Tensor


def bucket(distance: int, buckets: int, most: int) -> int:
    """T5's bucket of key position minus query position: exact when near, logarithmic up to `most`."""
    half = buckets // 2
    exact, near = half // 2, abs(distance)
    start = half if distance > 0 else 0
    if near < exact:
        return start + near
    far = exact + int(math.log(near / exact) / math.log(most / exact) * (half - exact))
    return start + min(far, half - 1)


def states(base, plugin, ids: Tensor) -> Tensor:
    """(1, n) tokens without padding -> (n, d), the last hidden states of the encoder."""
    config, weights, n = plugin.config, plugin.state_dict(), ids.shape[1]
    t5 = base.config.model_type != "bert"
    whole = "attention" in config.sites
    heads = base.config.num_attention_heads

    def at(site: str, index: int) -> list[Entry]:
        return entries(n, n, config.ratio(site, index), config.dense_head, config.dense_tail, ragged=True)

    def vector(entry: Entry, name: str, h: Tensor) -> Tensor:
        return (
            merge(weights, name, [h[i] for i in entry.positions]) if entry.merged else h[entry.positions[0]]
        )

    def spread(outputs: list[tuple[Entry, Tensor]], name: str, h: Tensor) -> Tensor:
        tokens = {}
        for entry, out in outputs:
            for i in entry.positions:
                tokens[i] = restore(weights, name, out, h[i], config.activation) if entry.merged else out
        return torch.stack([tokens[i] for i in range(n)])

    def attend(h: Tensor, index: int, query, key, value, scale: float, bias) -> list[tuple[Entry, Tensor]]:
        """Each query entry with the joined outputs of its heads; `bias(head, i, j)` between two tokens."""
        site = "attention" if whole else "kv"
        name, kept = f"{site}.{index}", at(site, index)
        keys = [key(vector(e, name, h)).view(heads, -1) for e in kept]
        values = [value(vector(e, name, h)).view(heads, -1) for e in kept]
        outputs = []
        for entry in kept if whole else [Entry([i], False) for i in range(n)]:
            q, out = query(vector(entry, name, h)).view(heads, -1), []
            for head in range(heads):
                scores = torch.stack([k[head] @ q[head] * scale for k in keys])
                for m, e in enumerate(kept):
                    pairs = [bias(head, i, j) for i in entry.positions for j in e.positions]
                    scores[m] = scores[m] + sum(pairs) / len(pairs)
                shares = torch.exp(scores - scores.max())
                shares = shares / shares.sum()
                out.append(sum(a * v[head] for a, v in zip(shares, values, strict=True)))
            outputs.append((entry, torch.cat(out)))
        return outputs

    if t5:
        stack = base.encoder
        x = stack.embed_tokens(ids)[0]
        table = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        shape = base.config.relative_attention_num_buckets, base.config.relative_attention_max_distance
        for index, block in enumerate(stack.block):
            first, last = block.layer
            own, h = first.SelfAttention, first.layer_norm(x)
            outputs = attend(
                h, index, own.q, own.k, own.v, 1.0, lambda head, i, j: table[bucket(j - i, *shape)][head]
            )
            name = f"attention.{index}"
            x = x + spread([(e, own.o(out)) for e, out in outputs], name, h)
            h, name = last.layer_norm(x), f"ffn.{index}"
            outputs = [(e, last.DenseReluDense(vector(e, name, h))) for e in at("ffn", index)]
            x = x + spread(outputs, name, h)
        return stack.final_layer_norm(x)

    x = base.base_model.embeddings(ids)[0]
    for index, layer in enumerate(base.base_model.encoder.layer):
        own, end = layer.attention.self, layer.attention.output
        scale = (x.shape[-1] // heads) ** -0.5
        outputs = attend(x, index, own.query, own.key, own.value, scale, lambda head, i, j: 0.0)
        a = spread([(e, end.dense(out)) for e, out in outputs], f"attention.{index}", x)
        x = end.LayerNorm(a + x)
        name = f"ffn.{index}"
        outputs = [(e, layer.output.dense(layer.intermediate(vector(e, name, x)))) for e in at("ffn", index)]
        x = layer.output.LayerNorm(spread(outputs, name, x) + x)
    return x
