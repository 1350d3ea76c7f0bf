"""Attention of per-token queries over compressed and dense keys. Knows tensors, no model.

One rule covers every decoder: a query sees the entries whose column is not after the end of its own group.
In an encoder every query sees every entry.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_variator.engine.groups import FILLER, Grouping, Slices
from llm_variator.engine.layers import group_mean

_BLOCK = 192  # queries; more or fewer were slower on the CPUs tried


def visible(reach: Tensor, columns: Tensor) -> Tensor:
    """Boolean mask (b, 1, queries, entries) from the last column each query may see and the entries' columns."""
    reach, columns = reach[:, None, :, None], columns[:, None, None, :]
    return (columns <= reach) & (columns != FILLER)


def pooled_bias(bias: Tensor, grouping: Grouping, *, queries: bool) -> Tensor:
    """A position bias for entries: a merged key has the mean over its group's tokens, as have merged `queries`.

    bias (1, H, n, n) -> (b or 1, H, n or m, m).
    """
    for dim in (3, 2) if queries else (3,):
        lines = bias.movedim(dim, 1)
        pooled = grouping.compress(lines.flatten(2).expand(len(grouping.columns), -1, -1), group_mean)
        bias = pooled.unflatten(2, lines.shape[2:]).movedim(1, dim)
    return bias


def group_causal_attention(
    query: Tensor, key: Tensor, value: Tensor, grouping: Slices, scale: float
) -> Tensor:
    """Attention of a whole uniform prompt without a mask over its groups.

    The k queries of a group see the same entries, so they act as k times more heads at the group's own
    position, and plain causal attention over (head + groups) entries is exact. A dense head token is a
    group whose other slots are not read. The tail is a second, small call.

    query (b, H, n, d), key and value (b, H_kv, m, d) -> (b, n, H, d).
    """
    k, (head, groups, tail) = grouping.k, grouping.split
    heads, start, front = query.shape[1], head + groups * k, head + groups
    inner = query[:, :, head:start].unflatten(2, (groups, k)).transpose(2, 3)  # (b, H, k, groups, d)
    if head:
        first = query[:, :, None, :head].expand(-1, -1, k, -1, -1)
        inner = torch.cat((first, inner), dim=3)
    out = _causal(inner.flatten(1, 2), key[:, :, :front], value[:, :, :front], scale)
    out = out.unflatten(1, (heads, k))  # (b, H, k, head + groups, d)
    parts = [out[:, :, 0, :head], out[:, :, :, head:].transpose(2, 3).flatten(2, 3)]
    if tail:
        parts.append(_causal_end(query[:, :, start:], key, value, scale))
    return torch.cat(parts, dim=2).transpose(1, 2)


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of every query to the keys up to its own: (b, H, n, d) from as many keys.

    Torch's CPU kernel computes what lies behind a query in blocks of 512 keys, half of it in vain for a thousand
    keys: in smaller blocks it is up to a third faster. On a GPU the kernels skip what is not seen.
    """
    n = query.shape[2]
    # a loop would compile every length of a prompt anew
    if query.device.type != "cpu" or torch.compiler.is_compiling() or n < 2 * _BLOCK:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
    blocks = [
        _causal_end(query[:, :, start:end], key[:, :, :end], value[:, :, :end], scale)
        for start, end in ((start, min(start + _BLOCK, n)) for start in range(0, n, _BLOCK))
    ]
    return torch.cat(blocks, dim=2)


def _causal_end(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """The same where the queries are those of the last keys alone.

    Torch's kernels for GPUs that take a mask take no grouped heads, and without them it writes all scores down: there
    the query heads of a KV head are rows of one matrix.
    """
    rows, seen = query.shape[2], key.shape[2]
    mask = None
    if rows > 1:
        mask = torch.ones(rows, seen, dtype=torch.bool, device=query.device).tril(seen - rows)
        if query.device.type != "cpu":
            return _folded(query, key, value, mask, scale)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def _folded(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Grouped-query attention under a `mask` (queries, keys), the query heads of a KV head as rows."""
    own = query.unflatten(1, (key.shape[1], -1))  # (b, H_kv, g, queries, d)
    mask = mask.repeat(own.shape[2], 1)
    out = F.scaled_dot_product_attention(own.flatten(2, 3), key, value, attn_mask=mask, scale=scale)
    return out.unflatten(2, own.shape[2:4]).flatten(1, 2)
