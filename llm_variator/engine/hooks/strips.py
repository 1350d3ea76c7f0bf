"""Attention over kept keys with stock kernels: far entries and a dense band, in strips of queries. Knows tensors only.

All heads of a class see equally many entries, so a strip is one call: its keys are the entries of all far blocks, one
behind the other, and behind them the band of tokens that are seen whole. The query heads of a KV head are rows of one
matrix. Symbols: b rows, H KV heads of the class, g query heads of each, d head width, T tokens of the region, and Q
queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_variator.engine.blocks import Region
from llm_variator.engine.cache.selected import Entries

STRIP = {"cpu": 1}
"""Blocks of queries in one call, by device; where it is 1 no head needs a mask of its own."""
_OTHER_STRIP = 8


class _Strip(NamedTuple):
    """Queries `start` to `end` of a region see `far` far blocks, and tokens from `band` on."""

    start: int
    end: int
    far: int
    band: int
    plain: bool
    """The whole band is seen, as far as causality lets."""


def attend(query: Tensor, entries: Entries, scale: float, seen: Tensor | None = None) -> Tensor:
    """(b, H, g, Q, d): of queries that are those of the last Q entries, and see all entries before them.

    `seen` (b, H, entries) bool: less than that.
    """
    valid, queries, held = entries.valid, query.shape[3], entries.keys.shape[2]
    mask = None
    if queries > 1:
        mask = torch.ones(queries, held, dtype=torch.bool, device=query.device).tril(held - queries)
    if valid is not None:
        own = valid[:, None, None]
        mask = own if mask is None else own & mask
    if seen is not None:
        mask = seen[:, :, None] if mask is None else seen[:, :, None] & mask
    return attend_masked(query, entries, mask, scale)


def attend_masked(query: Tensor, entries: Entries, mask: Tensor | None, scale: float) -> Tensor:
    """(b, H, g, Q, d), where `mask` (b or 1, H or 1, Q or 1, m), or (Q, m), is True."""
    groups = query.shape[2]
    if mask is not None and groups > 1 and mask.shape[-2] > 1:
        mask = mask.repeat(*[1] * (mask.dim() - 2), groups, 1)
    return _fold(query, entries.keys, entries.values, mask, scale)


def _fold(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The same of a `mask` for the rows of all query heads, (g * Q, m) in its last dimensions."""
    out = F.scaled_dot_product_attention(query.flatten(2, 3), keys, values, attn_mask=mask, scale=scale)
    return out.unflatten(2, query.shape[2:4])


def attend_region(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    before: Entries | None,
    order: Tensor,
    region: Region,
    k: int,
    scale: float,
) -> Tensor:
    """(b, H, g, Q, d): of the last Q tokens of a region, one class of heads of ratio `k`.

    Args:
        query: (b, H, g, Q, d).
        keys: (b, H, T, d), like `values`.
        values: of the region.
        before: what the class holds of all before the region.
        order: (b, H, blocks, B) of the region's whole blocks.
        region: of rows that are the same, or one whose tails are near.
        k: the ratio.
        scale: of the scores.
    """
    chosen = region.far(order, k).unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
    lead = region.lead
    first = [(keys[:, :, :lead], values[:, :, :lead])]
    if before is not None:
        first.insert(
            0, (before.keys.expand(len(keys), -1, -1, -1), before.values.expand(len(keys), -1, -1, -1))
        )
    strips = list(_strips(region, query.shape[3], STRIP.get(keys.device.type, _OTHER_STRIP)))
    width = max(strip.end - strip.band for strip in strips)
    growing = [
        _Growing(torch.cat(parts, dim=2), side.gather(2, chosen), width)
        for parts, side in zip(zip(*first, strict=True), (keys, values), strict=True)
    ]
    base, each = growing[0].base, region.block // k
    flags = None if all(strip.plain for strip in strips) else region.flags(order, k)
    begin = region.tokens - query.shape[3]
    outputs = []
    for strip in strips:
        far = strip.far * each
        pair = [
            one.with_band(far, side[:, :, strip.band : strip.end])
            for one, side in zip(growing, (keys, values), strict=True)
        ]
        rows = query[:, :, :, strip.start - begin : strip.end - begin]
        valid = None
        if before is not None and before.valid is not None:
            valid = F.pad(before.valid, (0, pair[0].shape[2] - before.valid.shape[1]), value=True)
        if strip.plain and valid is None:
            mask = region.causal(query.shape[2], strip.end - strip.start, pair[0].shape[2], query.dtype)
            outputs.append(_fold(rows, pair[0], pair[1], mask, scale))
            continue
        if strip.plain:
            outputs.append(attend(rows, Entries(pair[0], pair[1], valid), scale))
            continue
        assert flags is not None
        mask = F.pad(_band(region, strip, flags), (base + far, 0), value=True)
        mask = mask if valid is None else mask & valid[:, None, None]
        outputs.append(attend_masked(rows, Entries(pair[0], pair[1], None), mask, scale))
    return torch.cat(outputs, dim=3)


def _strips(region: Region, queries: int, blocks: int) -> Iterator[_Strip]:
    """Cut the last `queries` tokens of a region."""
    block, lead = region.block, region.lead
    start, tokens = region.tokens - queries, region.tokens
    if start < min(tokens, lead + 2 * block):  # the first two blocks are dense
        end = min(tokens, lead + 2 * block)
        yield _Strip(start, end, 0, lead, plain=True)
        start = end
    while start < tokens:
        own = (start - lead) // block
        end = min(tokens, lead + (own + blocks) * block)
        far = own - 1
        if end > region.tail:  # queries of the tail see all of it
            far = min(far, (region.tail - lead) // block)
        last = (end - 1 - lead) // block
        yield _Strip(start, end, far, lead + far * block, plain=far == last - 1)
        start = end


def _band(region: Region, strip: _Strip, flags: Tensor) -> Tensor:
    """(b, H, queries, band) bool: what the queries of a strip see of its band."""
    token = torch.arange(strip.band, strip.end, device=flags.device)
    query = torch.arange(strip.start, strip.end, device=flags.device)[:, None]
    near = (token - region.lead) // region.block >= (query - region.lead) // region.block - 1
    whole = near | (token >= region.tail)
    return (whole | flags[:, :, None, strip.band : strip.end]) & (token <= query)


class _Growing:
    """Keys or values of the strips of a region, one after the other: far entries, and behind them a band.

    Without gradients all strips use one buffer, where a band is overwritten by the far entries of the next.
    """

    def __init__(self, base: Tensor, far: Tensor, width: int) -> None:
        self.base = base.shape[2]
        self._parts = base, far
        self._filled = 0
        self._buffer: Tensor | None = None
        if not (torch.is_grad_enabled() and (base.requires_grad or far.requires_grad)):
            size = self.base + far.shape[2] + width
            self._buffer = base.new_empty(*base.shape[:2], size, base.shape[3])
            self._buffer[:, :, : self.base] = base

    def with_band(self, far: int, band: Tensor) -> Tensor:
        """(b, H, base + far + band, d); `far` never falls."""
        base, all_far = self._parts
        if self._buffer is None:
            return torch.cat((base, all_far[:, :, :far], band), dim=2)
        end = self.base + far
        self._buffer[:, :, self.base + self._filled : end] = all_far[:, :, self._filled : far]
        self._buffer[:, :, end : end + band.shape[2]] = band
        self._filled = far
        return self._buffer[:, :, : end + band.shape[2]]
