"""Attention over kept keys with stock kernels: far entries and a dense band, in strips of queries. Knows tensors only.

All heads of a class see equally many entries, so a strip is one call: its keys are the entries of far blocks, one
behind the other, and behind them the band of tokens that are seen whole. A strip of several blocks holds some blocks
twice, chosen and whole, and a mask that is the same for all heads gives each query one of the two: a mask of each
head's own is needed only where a tail is longer than a block. The query heads of a KV head are rows of one matrix.

Symbols: b rows, H KV heads of the class, g query heads of each, d head width, T tokens of the region, and Q queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_variator.engine.blocks import Region
from llm_variator.engine.cache.selected import Entries, HeadClass
from llm_variator.engine.devices import places

_ROWS = {"cpu": 128}
"""Rows of a strip (its queries times the query heads of a KV head) by device: more of them see more of a band that
is not theirs, fewer of them use the processor worse."""
_OTHER_ROWS = 512


class View(NamedTuple):
    """What a class of heads sees of a region, and before it."""

    heads: HeadClass
    order: Tensor
    """(b, H, blocks, B) of the region's whole blocks."""
    before: Entries | None
    """What it holds of all before the region."""

    def row(self, row: int, blocks: int) -> View:
        """Of one row, whose region has so many whole blocks."""
        own, before = slice(row, row + 1), self.before
        if before is not None:
            valid = before.valid if before.valid is None or len(before.valid) == 1 else before.valid[own]
            before = Entries(before.keys[own], before.values[own], valid)
        return self._replace(order=self.order[own, :, :blocks], before=before)


class _Strip(NamedTuple):
    """Queries `start` to `end` of a region see the chosen tokens of `far` blocks, and tokens from `band` on."""

    start: int
    end: int
    far: int
    band: int
    copies: int = 0
    """The last far blocks that lie in the band as well: whole for the first queries, far for the last."""
    by_head: bool = False
    """The band holds far tokens, of which each head sees its own choice."""


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
    query: Tensor, keys: Tensor, values: Tensor, views: list[View], region: Region, scale: float
) -> Tensor:
    """(b, KV heads, g, Q, d): of the last Q tokens of a region; here H are all KV heads.

    Args:
        query: (b, H, g, Q, d).
        keys: (b, H, T, d), like `values`.
        values: of the region.
        views: of all classes.
        region: of rows that are the same, or one whose tails are near.
        scale: of the scores.
    """
    queries, groups = query.shape[3], query.shape[2]
    blocks = max(1, _ROWS.get(keys.device.type, _OTHER_ROWS) // (groups * region.block))
    strips, begin = list(_strips(region, queries, blocks)), region.tokens - queries
    readers = [_Reader(query, keys, values, view, region, strips, scale) for view in views]
    heads = [places(view.heads.heads, keys.device) for view in views]
    out = query
    for strip in strips:
        rows = slice(strip.start - begin, strip.end - begin)
        for own, reader in zip(heads, readers, strict=True):
            part = reader.attend(strip, rows).permute(0, 3, 1, 2, 4)
            if out is query:  # as the model's code lays them out behind its attention, in autocast's dtype
                out = part.new_empty(len(query), queries, *query.shape[1:3], query.shape[4])
            out[:, rows].index_copy_(2, own, part)
    return out.permute(0, 2, 3, 1, 4)


def _strips(region: Region, queries: int, blocks: int) -> Iterator[_Strip]:
    """Cut the last `queries` tokens of a region."""
    block, lead = region.block, region.lead
    start, tokens = region.tokens - queries, region.tokens
    if start < min(tokens, lead + 2 * block):  # the first two blocks are dense
        end = min(tokens, lead + 2 * block)
        yield _Strip(start, end, 0, lead)
        start = end
    while start < tokens:
        own = (start - lead) // block
        end = min(tokens, lead + (own + blocks) * block)
        last, tail = (end - 1 - lead) // block, (region.tail - lead) // block
        if end > region.tail and tail < last - 1:  # queries of the tail see all of it
            far = min(own - 1, tail)
            yield _Strip(start, end, far, lead + far * block, by_head=True)
        else:
            yield _Strip(start, end, last - 1, lead + (own - 1) * block, copies=last - own)
        start = end


def _band(region: Region, strip: _Strip, flags: Tensor) -> Tensor:
    """(b, H, queries, band) bool: what the queries of a strip see of its band."""
    token = torch.arange(strip.band, strip.end, device=flags.device)
    query = torch.arange(strip.start, strip.end, device=flags.device)[:, None]
    near = (token - region.lead) // region.block >= (query - region.lead) // region.block - 1
    whole = near | (token >= region.tail)
    return (whole | flags[:, :, None, strip.band : strip.end]) & (token <= query)


class _Reader:
    """The attention of one class, strip after strip."""

    def __init__(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        view: View,
        region: Region,
        strips: list[_Strip],
        scale: float,
    ) -> None:
        """`query`, `keys` and `values` of all heads."""
        self.query, self.heads, self.before, self.k = query, view.heads, view.before, view.heads.k
        self.region, self.scale = region, scale
        self._whole: Tensor | None = None
        if (
            self.k == 1 and view.before is None and query.shape[3] == region.tokens
        ):  # sees all that came before
            own, key, value = map(self.heads.of, (query, keys, values))
            grouped = query.shape[2] > 1
            out = F.scaled_dot_product_attention(
                own.flatten(1, 2), key, value, is_causal=True, scale=scale, enable_gqa=grouped
            )
            self._whole = out.unflatten(1, own.shape[1:3])
            return
        chosen = region.far(view.order, self.k)
        width = max(strip.end - strip.band for strip in strips)
        held = None if view.before is None else view.before[:2]
        # one that is written again is lost to the gradients of all three
        anew = torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values))
        self._keys, self._values = (
            _Growing(
                None if held is None else held[side], x, view.heads, region.lead, chosen, width, anew=anew
            )
            for side, x in enumerate((keys, values))
        )
        self.flags = region.flags(view.order, self.k) if any(strip.by_head for strip in strips) else None

    def attend(self, strip: _Strip, rows: slice) -> Tensor:
        """(b, H, g, queries, d): of the queries in `rows`, which are the strip's."""
        if self._whole is not None:
            return self._whole[:, :, :, rows]
        query, each = self.heads.of(self.query[:, :, :, rows]), self.region.block // self.k
        keys, values = (
            x.with_band(strip.far * each, strip.band, strip.end) for x in (self._keys, self._values)
        )
        held, valid = keys.shape[2], None
        if self.before is not None and self.before.valid is not None:
            valid = F.pad(self.before.valid, (0, held - self.before.valid.shape[1]), value=True)
            valid = valid[:, None, None]
        if strip.by_head:
            assert self.flags is not None
            band = _band(self.region, strip, self.flags)
            mask = F.pad(band, (held - band.shape[-1], 0), value=True)
            mask = mask if valid is None else mask & valid
            return attend_masked(query, Entries(keys, values, None), mask, self.scale)
        shape, dtype = (query.shape[2], strip.end - strip.start), query.dtype
        if strip.copies:
            bias: Tensor | None = self.region.near_and_far(
                *shape, held, strip.start, strip.copies, self.k, dtype
            )
        else:
            bias = self.region.causal(*shape, held, dtype)
        if valid is not None:
            bias = valid.new_zeros(1, dtype=dtype) if bias is None else bias
            bias = bias.masked_fill(~valid, float("-inf"))
        return _fold(query, keys, values, bias, self.scale)


class _Growing:
    """Keys or values of the strips of a region, one after the other: far entries, and behind them a band.

    All strips use one buffer, where a band is overwritten by the far entries of the next.
    """

    def __init__(
        self,
        before: Tensor | None,
        x: Tensor,
        heads: HeadClass,
        lead: int,
        chosen: Tensor,
        width: int,
        *,
        anew: bool,
    ) -> None:
        """Of all heads' `x` (b, H, T, d) those of a class, whose far entries are at `chosen` (b, heads, m).

        `anew`: each strip gets tensors of its own, as gradients need them.
        """
        self._x, self._heads = x, heads
        first = heads.of(x[:, :, :lead])
        self._base = first if before is None else torch.cat((before.expand(len(x), -1, -1, -1), first), dim=2)
        row = torch.arange(len(x), device=x.device)[:, None, None]
        head = places(heads.heads, x.device)[:, None]
        self._all_far = x[row, head, chosen]
        self._filled = 0
        self._buffer: Tensor | None = None
        if not anew:
            base = self._base.shape[2]
            size = base + chosen.shape[2] + width
            self._buffer = x.new_empty(*self._base.shape[:2], size, x.shape[3])
            self._buffer[:, :, :base] = self._base

    def with_band(self, far: int, start: int, end: int) -> Tensor:
        """(b, heads, base + far + band, d): `far`, which never falls, and tokens from `start` to `end`."""
        band = self._heads.of(self._x[:, :, start:end])
        if self._buffer is None:
            return torch.cat((self._base, self._all_far[:, :, :far], band), dim=2)
        base = self._base.shape[2]
        self._buffer[:, :, base + self._filled : base + far] = self._all_far[:, :, self._filled : far]
        self._buffer[:, :, base + far : base + far + band.shape[2]] = band
        self._filled = far
        return self._buffer[:, :, : base + far + band.shape[2]]
