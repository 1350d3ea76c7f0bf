"""Tokens that wait to be reduced: dense ones at the end of a cache whose heads keep keys of their own choice.

With `decode_block` a *window* opens behind a prompt: its dense tail, and all tokens that follow. Before a token is read
that would be the newest of near + step others, the oldest `step` tokens of the window, whole blocks of B, are reduced
to B/k in a head of ratio k, by the scores that they had when they were read. A prompt that is reduced closes the
window before its first token: all of it is reduced, the last block to ceil(length / k). A prompt that stays dense is
read as if it were generated. So every row goes by its own tokens, and nothing depends on where a pass ends.

Scores are remembered in half precision. A token that comes again has the same score in the first layer, but from a pass
of another width it may differ in its last bit: rounded they are equal, and of equal scores the earlier token wins.

Knows scores and numbers, no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_variator.engine.devices import numbers


class Rule(NamedTuple):
    """How a window ages."""

    block: int
    """B."""
    step: int
    """Tokens that are reduced at a time, a multiple of B."""
    near: int
    """The newest tokens, which stay dense."""
    head: int
    """First tokens of a sequence, which stay dense for ever."""
    owner: int
    """Whose scores they are."""

    def steps(self, length: int, read: int) -> int:
        """How often a window of `length` tokens is reduced while so many more are read."""
        return max(0, length + read - 1 - self.near) // self.step if read else 0

    def after(self, length: int, read: int) -> int:
        """Tokens in the window then."""
        return length + read - self.steps(length, read) * self.step

    def kept(self, count: int, k: int) -> int:
        """What is left of the oldest `count` tokens in a head of ratio `k`."""
        return count // self.block * (self.block // k) + -(-(count % self.block) // k)


@dataclasses.dataclass(frozen=True)
class Window:
    """The newest real entries of a layer, all of them dense tokens, and their scores."""

    rule: Rule
    lengths: tuple[int, ...]
    """Of every row; below 0: so many tokens of the sequence's head are still to come."""
    scores: Tensor
    """(b, KV heads, w), those of rows with fewer right-aligned; w is the greatest length."""

    @classmethod
    def opened(cls, rule: Rule, scores: Tensor, tokens: int) -> Window:
        """An empty one behind `tokens` that stay as they are, for `scores` like these (b, KV heads, any)."""
        return cls(rule, (0 if tokens else -rule.head,) * len(scores), scores[..., :0].detach().half())

    # --- what is old

    def cuts(self, reads: Sequence[int]) -> dict[int, list[int]]:
        """Where a pass that reads so many tokens in every row is cut, and what is reduced there in every row.

        Keys are tokens of the pass that come before, ascending.
        """
        found: dict[int, list[int]] = {}
        for row, (length, read) in enumerate(zip(self.lengths, reads, strict=True)):
            for step in range(self.rule.steps(length, read)):
                at = self.rule.near + (step + 1) * self.rule.step - length
                found.setdefault(at, [0] * len(self.lengths))[row] = self.rule.step
        return dict(sorted(found.items()))

    def order(self, old: Sequence[int]) -> Tensor:
        """(b, KV heads, blocks, B): the oldest tokens of every row, `old` of them, block by block, best first."""
        block, width = self.rule.block, self.scores.shape[-1]
        blocks = -(-max(old) // block)
        place = torch.arange(blocks * block, device=self.scores.device)
        first = self._rows([width - max(0, length) for length in self.lengths])
        columns = (first + place).clamp(max=width - 1).expand(*self.scores.shape[:2], -1)
        scores = self.scores.gather(-1, columns).masked_fill(place >= self._rows(old), float("-inf"))
        return scores.unflatten(-1, (blocks, block)).sort(dim=-1, descending=True, stable=True).indices

    def keep(self, order: Tensor, old: Sequence[int], k: int, valid: Tensor | None, entries: int) -> Tensor:
        """(b, heads, entries) bool: what heads of ratio `k` hold once the oldest tokens, in their `order`, are reduced.

        `valid` (b or 1, entries): no filler; None: none is.
        """
        block, device = self.rule.block, order.device
        inside = torch.arange(block, device=device)
        starts = torch.arange(order.shape[2], device=device)[:, None] * block
        sizes = (self._rows(old)[..., None] - starts).clamp(0, block)  # (b or 1, 1, blocks, 1)
        best = (inside < (sizes + k - 1) // k).expand_as(order)
        chosen = torch.zeros_like(best).scatter(-1, order, best).flatten(2)
        if valid is None:
            newer = torch.arange(entries, 0, -1, device=device)
        else:
            newer = valid.flip(-1).cumsum(-1).flip(-1)[:, None]  # real entries from this one to the end
        place = self._rows(self.lengths) - newer
        kept = chosen.gather(-1, place.clamp(0, chosen.shape[-1] - 1).expand(*chosen.shape[:2], -1))
        kept = kept | (place < 0) | (place >= self._rows(old))
        return kept if valid is None else kept & valid[:, None]

    def removed(self, old: Sequence[int], k: int) -> list[int]:
        """Entries that a head of ratio `k` then holds less, in every row."""
        return [count - self.rule.kept(count, k) for count in old]

    # --- changes

    def without_oldest(self, old: Sequence[int]) -> Window:
        """Once they are reduced."""
        return self._of([length - count for length, count in zip(self.lengths, old, strict=True)])

    def without_newest(self, new: Sequence[int]) -> Window:
        """Once the newest of every row are nothing that counts; a row that has lost more is empty."""
        lengths = [
            length if length < 0 else max(0, length - count)
            for length, count in zip(self.lengths, new, strict=True)
        ]
        place = torch.arange(self.scores.shape[-1], device=self.scores.device)
        columns = (place - self._rows(new)).clamp(min=0).expand_as(self.scores)
        return dataclasses.replace(self, scores=self.scores.gather(-1, columns))._of(lengths)

    def closed(self, rows: Sequence[bool]) -> Window:
        """Empty in some rows, whose next prompt has begun."""
        return self._of([0 if own else n for n, own in zip(self.lengths, rows, strict=True)])

    def appended(self, scores: Tensor, reads: Sequence[int]) -> Window:
        """With so many more tokens in every row, of left-aligned `scores` (b, KV heads, n)."""
        both, size = _joined((self.scores, scores.detach().half()), dim=-1), scores.shape[-1]
        if min(reads) < size:
            place = torch.arange(both.shape[-1], device=both.device)
            columns = (place - self._rows([size - read for read in reads])).clamp(min=0)
            both = both.gather(-1, columns.expand_as(both))
        lengths = [length + read for length, read in zip(self.lengths, reads, strict=True)]
        return dataclasses.replace(self, scores=both)._of(lengths)

    def reopened(self, rows: Sequence[bool], scores: Tensor, lengths: Sequence[int], tail: int) -> Window:
        """Where a prompt has ended in some rows: its dense tail.

        `scores` (b, KV heads, T) of prompts, left-aligned, `lengths` of each row there, or one for all.
        """
        if not any(rows):
            return self
        width = max(self.scores.shape[-1], tail)
        place = torch.arange(width, device=scores.device) - width
        ends = numbers(lengths, scores.device)[:, None, None]
        columns = (ends + place).clamp(0, max(0, scores.shape[-1] - 1)).expand(*self.scores.shape[:2], -1)
        tails = scores.detach().half().gather(-1, columns)
        own = numbers(rows, scores.device).bool()[:, None, None]
        both = torch.where(own, tails, F.pad(self.scores, (width - self.scores.shape[-1], 0)))
        new = [tail if ended else n for n, ended in zip(self.lengths, rows, strict=True)]
        return dataclasses.replace(self, scores=both)._of(new)

    def rows(self, indices: Sequence[int]) -> Window:
        """Some rows, or the same row several times."""
        scores = self.scores[numbers(indices, self.scores.device)]
        return dataclasses.replace(self, scores=scores)._of([self.lengths[row] for row in indices])

    def picked(self, indices: Tensor) -> Window:
        """The same by a tensor, which a device is not asked for where all rows are alike."""
        if len(set(self.lengths)) > 1:
            return self.rows(indices.tolist())
        scores = self.scores[indices.to(self.scores.device)]
        return dataclasses.replace(self, scores=scores, lengths=self.lengths[:1] * len(scores))

    @classmethod
    def stack(
        cls, parts: Sequence[Window | None], rows: Sequence[int], tokens: Sequence[int]
    ) -> Window | None:
        """Those of several batches, of so many `rows` behind so many `tokens`, as one batch."""
        known = [part for part in parts if part is not None]
        if not known or len({part.rule for part in known}) > 1:
            return None
        like = known[0].scores
        whole = [
            cls.opened(known[0].rule, like[:1].expand(count, -1, -1), seen)
            if part is None
            else part.rows([row % len(part.lengths) for row in range(count)])
            for part, count, seen in zip(parts, rows, tokens, strict=True)
        ]
        width = max(part.scores.shape[-1] for part in whole)
        scores = [F.pad(part.scores, (width - part.scores.shape[-1], 0)) for part in whole]
        return cls(known[0].rule, tuple(n for part in whole for n in part.lengths), _joined(scores, dim=0))

    def _of(self, lengths: Sequence[int]) -> Window:
        """With other lengths, whose scores are the last."""
        width = max(0, *lengths)
        scores = self.scores[..., self.scores.shape[-1] - width :]
        return dataclasses.replace(self, lengths=tuple(lengths), scores=scores)

    def _rows(self, values: Sequence[int]) -> Tensor:
        """One number for every row, (b or 1, 1, 1)."""
        values = list(values) if len(set(values)) > 1 else [values[0]]
        return numbers(values, self.scores.device)[:, None, None]


def _joined(scores: Sequence[Tensor], dim: int) -> Tensor:
    """torch.cat of float16, by its bits: under autocast to bfloat16 torch refuses it."""
    return torch.cat([part.view(torch.int16) for part in scores], dim=dim).view(torch.float16)
