"""Which keys and values of a prompt are kept: the algebra of blocks ("select"). Knows scores and indices, no model.

A prompt of n tokens is a dense head, blocks of B tokens counted from its end, and a dense tail that begins anywhere.
Each KV head has a ratio k. While the prompt is read, a query sees of far blocks the B/k tokens with the highest scores
in each head, and all tokens of its own block and of the one before. After the prompt every block, cut off where the
tail begins, is reduced to ceil(length / k) tokens. A prompt shorter than head + 2B stays dense.

A prompt may be read in several passes: tokens whose block may still be seen whole, or be cut off, are *pending* until
then. So no choice depends on where a pass ends.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from llm_variator.engine.devices import numbers
from llm_variator.engine.groups import FILLER, Segment


class Place(NamedTuple):
    """The place of a pass in its prompt."""

    head: int
    """Dense tokens at the beginning of the prompt."""
    tail: int
    """And at its end."""
    done: int = 0
    """Tokens of the prompt that were read before."""
    left: int = 0
    """Tokens from here to its end."""


def closed_blocks(place: Place, block: int, read: int = 0) -> int:
    """Whole blocks that are reduced once `read` more tokens are read."""
    head, tail, done, left = place.head, place.tail, place.done + read, place.left - read
    if done + left - head < 2 * block:
        return 0
    whole = max(0, done + left - tail - head) // block
    return whole if not left else max(0, min((done - head) // block - 1, whole))


def entries(place: Place, k: int, block: int, read: int = 0) -> int:
    """Keys that a head of ratio `k` holds of a prompt once `read` more tokens of it are read."""
    head, tail, done, left = place.head, place.tail, place.done + read, place.left - read
    held = done - closed_blocks(place, block, read) * (block - block // k)
    if left or done - head < 2 * block or done - tail <= head:
        return held
    cut = (done - tail - head) % block
    return held - cut + -(-cut // k)


def pending(place: Place, block: int) -> int:
    """Tokens read before that the next pass may still see, or cut off; the head is not among them."""
    return max(0, place.done - place.head - closed_blocks(place, block) * block)


def seen(n: int, k: int, head: int, tail: int, block: int) -> int:
    """Pairs of query and key while a prompt of `n` tokens is read, in a head of ratio `k`.

    Of the block where a tail begins that is longer than a block, as many chosen tokens are counted as are left on
    average.
    """
    head = min(head, n)
    total = head * (head + 1) // 2
    for start in range(head, n, block):
        rows = min(block, n - start)
        far = max(0, start - block - head)
        whole = max(0, far - max(0, n - tail - head))  # far tokens of the tail
        total += rows * (start - far + whole + (far - whole) // k) + rows * (rows + 1) // 2
    return total


@dataclasses.dataclass(frozen=True)
class Open:
    """What a layer remembers of prompts, one per row, of which more is to come."""

    places: list[Place]
    """Of every row, where the next pass begins."""
    block: int
    scores: Tensor
    """(b, KV heads, w) of the pending tokens, those of rows with fewer right-aligned."""

    def rows(self, indices: list[int]) -> Open:
        """Some rows, or the same row several times."""
        scores = self.scores[numbers(indices, self.scores.device)]
        return Open([self.places[index] for index in indices], self.block, scores)

    @classmethod
    def stack(cls, parts: Sequence[Open | None], rows: Sequence[int]) -> Open | None:
        """Those of several batches, of so many `rows`, as one batch."""
        known = [part for part in parts if part is not None]
        if not known:
            return None
        width = max(part.scores.shape[-1] for part in known)
        places, scores = [], []
        for part, count in zip(parts, rows, strict=True):
            if part is None:  # nothing is read of a prompt of one token
                first = known[0].places[0]
                places += [first._replace(done=0)] * count
                scores.append(known[0].scores.new_zeros(count, known[0].scores.shape[1], width))
            else:
                places += part.places
                scores.append(F.pad(part.scores, (width - part.scores.shape[-1], 0)))
        return cls(places, known[0].block, torch.cat(scores))


@dataclasses.dataclass(frozen=True)
class Kept:
    """Some of T columns, of every row and head."""

    index: Tensor
    """(b, heads, m) ascending; rows that keep fewer are right-aligned."""
    valid: Tensor | None
    """(b, m) bool: no filler; None: none is."""

    @classmethod
    def of(cls, keep: Tensor, counts: list[int]) -> Kept:
        """Of `keep` (b, heads, T) bool; `counts` are known beforehand, one per row, or one for all."""
        size, columns = max(counts), torch.arange(keep.shape[-1], device=keep.device)
        count = numbers(counts, keep.device)[:, None, None]
        rank = torch.where(keep, keep.cumsum(-1) + (size - count - 1), size)
        index = rank.new_zeros(*rank.shape[:2], size + 1).scatter(-1, rank, columns.expand_as(rank))
        valid = None
        if min(counts) < size:
            valid = torch.arange(size, device=keep.device) >= size - count[:, 0]
        return cls(index[..., :size], valid)

    def take(self, x: Tensor) -> Tensor:
        """(b, heads, T, d) -> (b, heads, m, d)."""
        rows, heads = (torch.arange(n, device=x.device) for n in x.shape[:2])
        return x[rows[:, None, None], heads[:, None], self.index]  # copies whole vectors, as gather does not

    def place(self, columns: Tensor) -> Tensor:
        """(b or 1, heads or 1, T) -> (b, heads, m): what stands at the kept columns, `FILLER` at fillers."""
        at = columns.expand(*self.index.shape[:2], -1).gather(-1, self.index)
        return at if self.valid is None else at.masked_fill(~self.valid[:, None], FILLER)


class Region:
    """The prompt tokens that a pass works on in every row: what is pending, and what is new; T tokens at most.

    Rows of different length are left-aligned, so that blocks begin in the same columns; what fills up a shorter row
    comes behind all of its tokens, where causality hides it.
    """

    def __init__(self, places: list[Place], new: list[int], block: int, device: torch.device) -> None:
        """`new` prompt tokens of every row, beginning at its `places`; one of each where all rows are the same."""
        self.places, self.new, self.block, self.device = places, new, block, device
        held = [pending(place, block) for place in places]
        self.pending = held[0]
        """Tokens of earlier passes, the same for all rows unless each row has one new token."""
        self.lengths = [old + more for old, more in zip(held, new, strict=True)]
        self.tokens = max(self.lengths)
        """T."""
        self.lead = min(self.tokens, *(max(0, place.head - place.done) for place in places))
        """Tokens of the head that the region begins with."""
        self.tail = max(self.lead, self.pending + places[0].left - places[0].tail)
        """Where the tail begins; behind the region where rows differ."""
        self._biases: dict[tuple[object, ...], Tensor] = {}
        self.alignment = 1 if device.type == "cpu" else 16
        """Of a bias, in numbers: torch's kernels for GPUs copy one whose rows begin elsewhere, or stop."""
        if len(set(zip(places, new, strict=True))) > 1:
            self.tail = self.tokens

    @property
    def tails_are_near(self) -> bool:
        """Whether every token of a tail sees all of it as a part of its own block and the one before."""
        return self.places[0].tail <= self.block

    @property
    def holds_whole_prompts(self) -> bool:
        """Whether the prompts begin and end here."""
        return all(
            not place.done and place.left == new for place, new in zip(self.places, self.new, strict=True)
        )

    def singles(self) -> list[Region]:
        """The region of every row by itself."""
        pairs = zip(self.places, self.new, strict=True)
        return [Region([place], [new], self.block, self.device) for place, new in pairs]

    def after(self, scores: Tensor) -> Open | None:
        """What is remembered of its `scores` (b, heads, T) for the next pass; None: the prompts are over.

        All rows are the same.
        """
        after = [
            place._replace(done=place.done + new, left=place.left - new)
            for place, new in zip(self.places, self.new, strict=True)
        ]
        if not after[0].left:
            return None
        held = scores[..., self.tokens - pending(after[0], self.block) :]
        return Open(after * (len(scores) // len(after)), self.block, held)

    def causal(self, groups: int, queries: int, keys: int, dtype: torch.dtype) -> Tensor | None:
        """(groups * queries, keys) to add to scores where the queries are those of the last keys; None: nothing."""
        if queries == 1:
            return None

        def hidden() -> Tensor:
            return torch.ones(queries, queries, dtype=torch.bool, device=self.device).triu(1)

        return self._bias((groups, queries, dtype), hidden, groups, keys, dtype)

    def near_and_far(
        self, groups: int, queries: int, keys: int, start: int, copies: int, k: int, dtype: torch.dtype
    ) -> Tensor:
        """(groups * queries, keys) to add to scores of queries from `start` on, of several blocks.

        The last keys are the chosen tokens of `copies` blocks, and behind them all tokens from the first of these
        blocks on: each query sees a block either chosen or whole.
        """
        block = self.block
        offset, each = (start - self.lead) % block, block // k

        def hidden() -> Tensor:
            query = (
                torch.arange(queries, device=self.device)[:, None] + offset + block
            )  # from the band's beginning
            token = torch.arange(offset + queries + block, device=self.device)
            chosen = torch.arange(copies, device=self.device).repeat_interleave(each)
            near = query // block - 1
            return torch.cat((chosen >= near, (token // block < near) | (token > query)), dim=1)

        return self._bias((groups, queries, offset, copies, k, dtype), hidden, groups, keys, dtype)

    def _bias(
        self,
        key: tuple[object, ...],
        hidden: Callable[[], Tensor],
        groups: int,
        keys: int,
        dtype: torch.dtype,
    ) -> Tensor:
        """(groups * queries, keys): 0, and -inf where `hidden()` (queries, the last of the keys); made once.

        The keys are the last columns of one that is made for more of them, and kept. Where they begin, and every row,
        is a multiple of `alignment`: a kernel refuses a bias that is not.
        """
        step = self.alignment
        key = (*key, keys % step)
        made = self._biases.get(key)
        if made is None or made.shape[1] < keys:
            last, width = hidden(), keys + -(-keys // step) * step
            made = torch.zeros(len(last), width, dtype=dtype, device=self.device)
            made[:, width - last.shape[1] :].masked_fill_(last, float("-inf"))
            made = self._biases[key] = F.pad(made, (0, -width % step)).repeat(groups, 1)[:, :width]
        return made[:, made.shape[1] - keys :]

    def order(self, scores: Tensor) -> Tensor:
        """(b, heads, T) -> (b, heads, whole blocks, B): the tokens of every whole block, best first."""
        blocks = max(0, self.tokens - self.lead) // self.block
        inner = scores[..., self.lead : self.lead + blocks * self.block]
        return inner.unflatten(-1, (blocks, self.block)).sort(dim=-1, descending=True, stable=True).indices

    def far(self, order: Tensor, k: int) -> Tensor:
        """(b, heads, m): the chosen tokens of all blocks that the last query sees as far."""
        count = max(0, (self.tokens - 1 - self.lead) // self.block - 1)
        best = order[:, :, :count, : self.block // k].sort(-1).values
        starts = torch.arange(count, device=order.device)[:, None] * self.block + self.lead
        return (best + starts).flatten(2)

    def flags(self, order: Tensor, k: int) -> Tensor:
        """(b, heads, T) bool: the chosen tokens of all whole blocks."""
        best = torch.zeros_like(order, dtype=torch.bool).scatter(-1, order[..., : self.block // k], True)
        inner = best.flatten(2)
        return F.pad(inner, (self.lead, self.tokens - self.lead - inner.shape[-1]))

    def counts(self, k: int) -> list[int]:
        """Tokens of the region that a head of ratio `k` holds after this pass, in every row."""
        return [
            entries(place, k, self.block, new) - entries(place, k, self.block) + pending(place, self.block)
            for place, new in zip(self.places, self.new, strict=True)
        ]

    def keep(self, scores: Tensor, order: Tensor, k: int) -> Tensor:
        """(b, heads, T) bool: what heads of ratio `k` hold after this pass, of their `scores` and `order`."""
        block, lead, ends = self.block, self.lead, []
        for place, new, length in zip(self.places, self.new, self.lengths, strict=True):
            closed = closed_blocks(place, block, new) - closed_blocks(place, block)
            cut_off = place.left == new and reduces(place, block, new)
            ends.append(length - place.tail if cut_off else lead + closed * block)
        column = torch.arange(self.tokens, device=scores.device)
        end = self._rows(ends)
        whole = lead + (end - lead) // block * block
        keep = (column < lead) | (column >= end) | (self.flags(order, k) & (column < whole))
        if any((one - lead) % block for one in ends):
            keep = keep | self._cut(scores, whole, end, k)
        return keep & (column < self._rows(self.lengths))

    def seen_by_last(self, order: Tensor, k: int) -> Tensor:
        """(b, heads, T) bool: what the last token of every row sees."""
        column = torch.arange(self.tokens, device=order.device)
        length = self._rows(self.lengths)
        tail = self._rows([n - place.tail for n, place in zip(self.lengths, self.places, strict=True)])
        near = self.lead + ((length - 1 - self.lead) // self.block - 1) * self.block
        seen = (column < self.lead) | (column >= near) | (column >= tail)
        return (seen | self.flags(order, k)) & (column < length)

    def _cut(self, scores: Tensor, start: Tensor, end: Tensor, k: int) -> Tensor:
        """(b, heads, T) bool: the chosen tokens of the block that the tail cuts off, from `start` to `end`."""
        inside = torch.arange(self.block, device=self.device)
        size = end - start
        places = (start + inside).expand(*scores.shape[:2], -1)
        own = F.pad(scores, (0, self.block)).gather(-1, places).masked_fill(inside >= size, float("-inf"))
        order = own.sort(dim=-1, descending=True, stable=True).indices
        best = (inside < (size + k - 1) // k).expand_as(order)
        chosen = torch.zeros_like(best).scatter(-1, order, best)
        out = chosen.new_zeros(*scores.shape[:2], self.tokens + self.block)
        return out.scatter(-1, places, chosen)[..., : self.tokens]

    def _rows(self, values: list[int]) -> Tensor:
        """One number for every row, (b or 1, 1, 1)."""
        values = values if len(set(values)) > 1 else values[:1]
        return numbers(values, self.device)[:, None, None]


def reduces(place: Place, block: int, read: int) -> bool:
    """Whether a prompt that ends `read` tokens later is long enough to be reduced."""
    n = place.done + read
    return n - place.head >= 2 * block and n - place.tail > place.head


class Rows:
    """The columns of a pass as the prompt tokens of every row and what comes behind them, each left-aligned.

    Where all rows look the same these are slices.
    """

    def __init__(self, segment: Segment, dense: Sequence[bool] = (False,)) -> None:
        """`dense`: rows, or all, whose prompt is read like what comes behind one."""
        self.width, device = segment.width, segment.device
        self.uniform = segment.uniform_prompt is not None
        """Whether all rows look the same, without padding."""
        if segment.uniform_prompt is not None:
            self.prompts = [0 if dense[0] else min(segment.uniform_prompt, self.width)]
            """Prompt tokens of every row; one number where rows are the same."""
            self.rests = [self.width - self.prompts[0]]
            """Tokens behind them."""
            columns = torch.arange(self.width, device=device)[None]
            self.prompt_columns, self.rest_columns = (
                columns[:, : self.prompts[0]],
                columns[:, self.prompts[0] :],
            )
            """(b or 1, P) and (b or 1, C): where they stand; `FILLER` behind the end of a shorter row."""
            return
        assert segment.valid is not None
        dense = dense if len(dense) > 1 else [dense[0]] * len(segment.prompts)
        self.prompts = [0 if own else n for n, own in zip(segment.prompts, dense, strict=True)]
        tokens = [row.nonzero().squeeze(-1) for row in segment.valid]
        self.rests = [len(own) - n for own, n in zip(tokens, self.prompts, strict=True)]
        parts = [(own[:n], own[n:]) for own, n in zip(tokens, self.prompts, strict=True)]
        self.prompt_columns, self.rest_columns = (
            pad_sequence([part[side] for part in parts], batch_first=True, padding_value=FILLER).to(device)
            for side in (0, 1)
        )

    def prompt(self, x: Tensor) -> Tensor:
        """(b, heads, n, d) -> (b, heads, P, d)."""
        return x[:, :, : self.prompts[0]] if self.uniform else _gathered(x, self.prompt_columns)

    def rest(self, x: Tensor) -> Tensor:
        """(b, heads, n, d) -> (b, heads, C, d)."""
        return x[:, :, self.prompts[0] :] if self.uniform else _gathered(x, self.rest_columns)

    def joined(self, prompt: Tensor, rest: Tensor) -> Tensor:
        """(b, heads, P, d), (b, heads, C, d) -> (b, heads, n, d), anything finite at padding."""
        if self.uniform:
            return torch.cat((prompt, rest), dim=2) if rest.shape[2] else prompt
        columns = torch.cat((self.prompt_columns, self.rest_columns), dim=1)
        columns = columns.masked_fill(columns == FILLER, self.width)[:, None, :, None]
        both = torch.cat((prompt, rest), dim=2)
        out = both.new_zeros(*both.shape[:2], self.width + 1, both.shape[3])
        return out.scatter(2, columns.expand_as(both), both)[:, :, : self.width]


def _gathered(x: Tensor, columns: Tensor) -> Tensor:
    columns = columns.clamp(min=0)[:, None, :, None]
    return x.gather(2, columns.expand(-1, x.shape[1], -1, x.shape[3]))
