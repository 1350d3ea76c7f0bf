"""The gradient of scores ("select"): which kept keys would rather have been dropped, and the other way round.

A choice has no gradient, so this is a straight-through one. The forward pass is the ordinary one, bit by bit: what is
trained is what is judged. Only the backward pass differs, and it asks two questions of every key that a query either
sees or not by the choice of its head (of far blocks while the prompt is read, of all reduced blocks after it; head,
tail, near band and later tokens are never asked about):

1. What would the loss be if this key were let in, or less of it? A query that sees a set of keys S, of weights exp(a_i)
   with the sum Z, puts out o. With gates m, o(m) = sum m_i exp(a_i) v_i / sum m_i exp(a_i), and do/dm_i at the choice
   itself is exp(a_i)/Z (v_i - o): not zero for dropped keys, as it would be for a bias of log m_i, which is -inf there.
   A key that is let in whole brings its own weight into the sum: it moves o by exp(a_i)/(Z + exp(a_i)) (v_i - o),
   which is what is used for dropped keys, as it is exact and bounded. The product with the loss's gradient at o, summed
   over queries and the query heads of a KV head, is the key's effect G_i.
2. How does a score move a gate? As soft gates do whose sum in each block is fixed: m_i = sigmoid((s_i - t) / T), where
   T is the spread of the block's scores and t is taken at the threshold, midway between the last kept and the first
   dropped score, and moves with the scores such that the sum of m stays. So the gradient of s_i is
   m'_i (G_i - mean of G weighted by m'), m'_i = m_i (1 - m_i) / T.

It is not a no-op: on a frozen model gates that may open without a price all open, as that is the dense model, which
cannot be improved. Here no gate can: effects are compared within a block, a common part of them moves nothing, and the
pass in which the loss is measured always keeps as many keys as it must. A score rises only where its key is worth more
than its rivals.

Vectors that the scores read get no gradient from them, so that no layer learns to steer choices of a later one.
Prompts read in several passes, or behind others, are not asked: their scores get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llm_variator.engine.blocks import Region, Rows, reduces
from llm_variator.engine.cache.selected import HeadClass

_QUERIES = 128  # in one step of the backward pass, whose memory is this times the keys
_LEAST_SPREAD = 0.1  # of a block's scores: a fresh plugin's are all equal


class Gates:
    """Of the prompt tokens in one pass over one layer. Symbols: b rows, H KV heads, P tokens, B tokens of a block."""

    def __init__(
        self, scores: Tensor, order: Tensor, region: Region, rows: Rows, classes: list[HeadClass]
    ) -> None:
        """`scores` (b, H, P) and their `order`; `region` holds whole prompts."""
        assert not region.pending
        self._scores, self._region, self._rows = scores, region, rows
        flat = scores.detach()
        while_reading, after = (torch.empty_like(flat, dtype=torch.bool) for _ in range(2))
        for one in classes:
            own = one.of(order)
            while_reading[:, one.heads] = region.flags(own, one.k)
            after[:, one.heads] = region.keep(one.of(flat), own, one.k)
        self._lengths = self._rowwise(region.lengths)
        ends = [
            n - place.tail if reduces(place, region.block, n) else min(n, place.head)
            for n, place in zip(region.lengths, region.places, strict=True)
        ]
        self._ends = self._rowwise(ends)
        self._tails = self._rowwise(
            [n - place.tail for n, place in zip(region.lengths, region.places, strict=True)]
        )
        column = torch.arange(region.tokens, device=scores.device)
        whole = region.lead + (self._lengths - region.lead) // region.block * region.block
        self._while_reading = while_reading, self._slopes(while_reading, column < whole)
        self._after = after, self._slopes(after, column < self._ends)

    def reading(self, out: Tensor, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """`out` (b, query heads, P, d) of the prompt's queries, as it is.

        Keys and values (b, H, P + C, d) are those of the prompt and of the C tokens behind it.
        """
        kept, slopes = self._while_reading
        keys, values = (x[:, :, : self._region.tokens] for x in (keys, values))

        def seen(start: int, end: int) -> tuple[Tensor, Tensor]:
            lead, block = self._region.lead, self._region.block
            column = torch.arange(self._region.tokens, device=out.device)
            row = column[start:end, None]
            near = (column - lead) // block >= (row - lead) // block - 1
            always = (column < lead) | near | (column >= self._tails)  # (b or 1, 1, queries, P)
            return always & (column <= row), ~always & (column <= row)

        return self._apply(out, query, keys, values, scale, kept, slopes, seen)

    def following(self, out: Tensor, query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """The same of the C tokens behind the prompt."""
        kept, slopes = self._after
        count = query.shape[2]

        def seen(start: int, end: int) -> tuple[Tensor, Tensor]:
            column = torch.arange(self._region.tokens, device=out.device)
            gated = (column >= self._region.lead) & (column < self._ends)
            causal = torch.ones(end - start, count, dtype=torch.bool, device=out.device).tril(start)
            always = (~gated & (column < self._lengths)).expand(-1, -1, end - start, -1)
            always = torch.cat((always, causal.expand(len(always), 1, -1, -1)), dim=-1)
            return always, F.pad(gated, (0, count))

        return self._apply(out, query, keys, values, scale, kept, slopes, seen)

    def _apply(self, out: Tensor, *parts: Any) -> Tensor:
        query, keys, values, *rest = parts
        gated: Tensor = _Gated.apply(out, self._scores, query, keys, values, self, *rest)
        return gated

    def _rowwise(self, values: list[int]) -> Tensor:
        """(b or 1, 1, 1, 1)."""
        return torch.tensor(values, device=self._scores.device)[:, None, None, None]

    def _blocks(self, x: Tensor) -> Tensor:
        """(b or H or 1.., P) -> (.., blocks, B), with zeros behind the end."""
        block = self._region.block
        inner = x[..., self._region.lead :]
        return F.pad(inner, (0, -inner.shape[-1] % block)).unflatten(-1, (-1, block))

    def _tokens(self, x: Tensor) -> Tensor:
        """What `_blocks` cut, zeros for the dense head."""
        lead, tokens = self._region.lead, self._region.tokens
        return F.pad(x.flatten(-2)[..., : tokens - lead], (lead, 0))

    def _slopes(self, kept: Tensor, inside: Tensor) -> Tensor:
        """(b, H, blocks, B): how a soft gate moves with its score; 0 where nothing is chosen.

        `kept` (b, H, P), `inside` (b or 1, 1, 1, P) the tokens that the choice is made of.
        """
        scores, chosen = self._blocks(self._scores.detach()), self._blocks(kept)
        inside = self._blocks(inside.squeeze(2)).expand_as(chosen)
        chosen, dropped = chosen & inside, ~chosen & inside
        count = inside.sum(-1, keepdim=True).clamp(min=1)
        mean = (scores * inside).sum(-1, keepdim=True) / count
        spread = (((scores - mean) * inside).square().sum(-1, keepdim=True) / count).sqrt()
        last = scores.masked_fill(~chosen, float("inf")).amin(-1, keepdim=True)
        first = scores.masked_fill(~dropped, float("-inf")).amax(-1, keepdim=True)
        temperature = spread.clamp(min=_LEAST_SPREAD)
        soft = ((scores - (last + first) / 2) / temperature).sigmoid()
        is_choice = chosen.any(-1, keepdim=True) & dropped.any(-1, keepdim=True)
        return (soft * (1 - soft) / temperature).masked_fill(~(inside & is_choice), 0)

    def gradient(self, effect: Tensor, slopes: Tensor) -> Tensor:
        """(b, H, P): of the scores, from the effects (b, H, P) of letting a key in."""
        blocks = self._blocks(effect)
        total = slopes.sum(-1, keepdim=True)
        mean = (slopes * blocks).sum(-1, keepdim=True) / total.masked_fill(total == 0, 1)
        return self._tokens(slopes * (blocks - mean))


class _Gated(torch.autograd.Function):
    """Hands the outputs of attention through; scores get a gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        out: Tensor,
        scores: Tensor,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        gates: Gates,
        scale: float,
        kept: Tensor,
        slopes: Tensor,
        seen: Callable[[int, int], tuple[Tensor, Tensor]],
    ) -> Tensor:
        """`seen` of queries `start` to `end`: masks (b or 1, 1, queries, keys), seen always, and by choice."""
        ctx.save_for_backward(out, query, keys, values)
        ctx.gates, ctx.scale, ctx.kept, ctx.slopes, ctx.seen = gates, scale, kept, slopes, seen
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, query, keys, values = ctx.saved_tensors
        wide = torch.promote_types(ctx.slopes.dtype, torch.float32)
        keys, values = keys.to(wide).transpose(-1, -2), values.to(wide).transpose(-1, -2)  # (b, H, d, keys)
        kept, heads, tokens = ctx.kept, keys.shape[1], ctx.kept.shape[-1]
        chosen = F.pad(kept, (0, keys.shape[-1] - tokens))[:, :, None, None]
        effect = torch.zeros(kept.shape, dtype=wide, device=kept.device)
        with torch.autocast(out.device.type, enabled=False):
            for start in range(0, query.shape[2], _QUERIES):
                end = min(start + _QUERIES, query.shape[2])
                rows, towards, state = (
                    x[:, :, start:end].to(wide).unflatten(1, (heads, -1)) for x in (query, grad, out)
                )  # (b, H, g, queries, d)
                always, by_choice = (mask[:, :, None] for mask in ctx.seen(start, end))
                logits = (rows @ keys[:, :, None] * ctx.scale).masked_fill(
                    ~(always | by_choice), float("-inf")
                )
                weights = logits.softmax(-1).nan_to_num()  # fillers see nothing
                sees = always | (by_choice & chosen)
                total = (weights * sees).sum(-1, keepdim=True)
                share = weights / (total + weights * ~sees).clamp(min=torch.finfo(wide).tiny)
                moved = towards @ values[:, :, None] - (towards * state).sum(-1, keepdim=True)
                effect += (share * moved * by_choice).sum((2, 3))[..., :tokens]
            gradient = ctx.gates.gradient(effect, ctx.slopes)
        return grad, gradient, *[None] * 8
