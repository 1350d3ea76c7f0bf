"""Which rows of a flattened batch are groups: the token algebra of `groups` for chunks of many requests.

vLLM computes one chunk of every running request at a time and lays the chunks side by side. Rows of a chunk are,
in this order, dense head, groups and dense tokens, as its request's prompt splits (`groups.split`). Chunks are
cut where no group is (`cut`), so every group lies whole in one chunk. Knows tensors and integers, not vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from llm_variator.engine.groups import split
from llm_variator.integrations.policy import Ratio

Merges = Mapping[Ratio, Callable[[Tensor], Tensor]]  # plugin -> ((groups, k, d) -> (groups, d))
Restores = Mapping[Ratio, Callable[[Tensor, Tensor], Tensor]]  # plugin -> ((g, d), (g, k, d) -> (g, k, d))


class Shape(NamedTuple):
    """How a plugin splits a prompt: its dense head and tail, and every ratio above 1 of its layers."""

    head: int
    tail: int
    ratios: tuple[int, ...]


class Chunk(NamedTuple):
    """The rows of one request in a flattened batch."""

    start: int
    """First row in the batch."""
    tokens: int
    position: int
    """Place of the first row's token in its sequence."""
    prompt: int
    """Prompt tokens of the request; all later tokens are dense, whenever they are computed."""
    plugin: Ratio = 0
    """Which plugin; 0 for none."""


class Parts(NamedTuple):
    """Rows of a chunk: dense, then in groups, then dense."""

    before: int
    inside: int
    after: int


def region(prompt: int, k: int, head: int, tail: int) -> tuple[int, int]:
    """First token and end of the groups of a prompt; equal where it has none."""
    part = split(prompt, k, head, tail)
    return part.head, part.head + part.groups * k


def parts(chunk: Chunk, k: int, head: int, tail: int) -> Parts:
    """How one chunk divides at ratio `k`. A chunk that cuts a group is our scheduler's mistake."""
    first, last = region(chunk.prompt, k, head, tail)
    end = chunk.position + chunk.tokens
    begin, stop = max(chunk.position, first), min(end, last)
    if stop <= begin:
        return Parts(chunk.tokens, 0, 0)
    assert (begin - first) % k == 0, f"{chunk} begins inside a group of {k}"
    assert (stop - first) % k == 0, f"{chunk} ends inside a group of {k}"
    return Parts(begin - chunk.position, stop - begin, end - stop)


def held(tokens: int, prompt: int, k: int, head: int, tail: int) -> int:
    """KV entries that stand for the first `tokens` tokens of a sequence; a group counts from its first token."""
    first, last = region(prompt, k, head, tail)
    inside = max(0, min(tokens, last) - first)
    return tokens - inside + -(-inside // k)


def cut(position: int, prompt: int, shape: Shape) -> int:
    """The last place up to `position` at which a sequence can be cut without cutting a group of any layer."""
    regions = [(*region(prompt, k, shape.head, shape.tail), k) for k in shape.ratios]
    while any(first < position < last and (position - first) % k for first, last, k in regions):
        position -= 1
    return position


def whole_step(shape: Shape) -> int:
    """Tokens a chunk must be able to take so that a request always gets on."""
    return shape.head + math.lcm(*shape.ratios)


def settled(prompt: int, shape: Shape) -> int:
    """Tokens whose hidden states do not depend on where the prompt ends: inside the groups of every layer.

    Two prompts that begin with the same tokens have the same keys and values up to there, at most.
    """
    return min((region(prompt, k, shape.head, shape.tail)[1] for k in shape.ratios), default=prompt)


class Layout:
    """Where the groups of each plugin and the dense rows of one flattened batch lie, for one ratio per plugin.

    *Entries* are ordered by plugin, groups in the batch's order, and then all dense rows in the batch's order.
    Rows after the last chunk are padding.
    """

    def __init__(
        self, chunks: Iterable[Chunk], ratios: Mapping[Ratio, int | None], shapes: Mapping[Ratio, Shape]
    ) -> None:
        """`ratios`: plugin -> k in the layer at hand, None where the plugin leaves it dense."""
        self.groups: dict[Ratio, list[slice]] = {}
        self.ratios: dict[Ratio, int] = {}
        self.dense: list[slice] = []
        self.rows = self.grouped = 0
        for chunk in chunks:
            assert chunk.start == self.rows, "chunks lie side by side"
            k = ratios.get(chunk.plugin)
            shape = shapes.get(chunk.plugin)
            before, inside, after = chunk.tokens, 0, 0
            if k is not None and k > 1 and shape is not None:
                before, inside, after = parts(chunk, k, shape.head, shape.tail)
            self._add_dense(before)
            if inside:
                assert k is not None
                self.ratios[chunk.plugin] = k
                self.groups.setdefault(chunk.plugin, []).append(slice(self.rows, self.rows + inside))
                self.rows += inside
                self.grouped += inside // k
            self._add_dense(after)
        self.groups = dict(sorted(self.groups.items(), key=lambda item: str(item[0])))

    def _add_dense(self, tokens: int) -> None:
        if not tokens:
            return
        start = self.rows
        if self.dense and self.dense[-1].stop == start:
            start = self.dense.pop().start
        self.rows += tokens
        self.dense.append(slice(start, self.rows))

    @property
    def entries(self) -> int:
        """Vectors that remain: groups and dense rows."""
        return self.grouped + sum(piece.stop - piece.start for piece in self.dense)

    def members(self, x: Tensor, plugin: Ratio) -> Tensor:
        """(rows, ...) -> (groups of one plugin, k, ...)."""
        return _take(x, self.groups[plugin]).unflatten(0, (-1, self.ratios[plugin]))

    def alone(self, x: Tensor) -> Tensor:
        """(rows, ...) -> (dense rows, ...)."""
        return _take(x, self.dense)

    def compress(self, members: Mapping[Ratio, Tensor], x: Tensor, merge: Merges) -> Tensor:
        """Entries (entries, ...) of `x` (rows, ...), the groups `members` of each plugin merged by its `merge`."""
        merged = [merge[plugin](groups) for plugin, groups in members.items()]
        return _join([*merged, *(x[piece] for piece in self.dense)])

    def restore(
        self, entries: Tensor, members: Mapping[Ratio, Tensor], x: Tensor, restore: Restores
    ) -> Tensor:
        """(entries, d) -> (rows, d): inverse of `compress` for the outputs of the frozen layer. Padding is zero."""
        out = torch.empty_like(x, dtype=entries.dtype)
        for plugin, part in zip(self.groups, self.split(entries), strict=False):
            self.put(out, restore[plugin](part, members[plugin]), plugin)
        self.put_alone(out, entries[self.grouped :])
        out[self.rows :] = 0
        return out

    def split(self, entries: Tensor) -> tuple[Tensor, ...]:
        """The entries of each plugin in turn, and of the dense rows."""
        sizes = [
            sum(piece.stop - piece.start for piece in pieces) // self.ratios[plugin]
            for plugin, pieces in self.groups.items()
        ]
        return entries.split([*sizes, len(entries) - self.grouped])

    def put(self, out: Tensor, members: Tensor, plugin: Ratio) -> None:
        """Inverse of `members`: write (groups of one plugin, k, ...) into their rows of `out` (rows, ...)."""
        done, k = 0, self.ratios[plugin]
        for piece in self.groups[plugin]:
            groups = (piece.stop - piece.start) // k
            out[piece].unflatten(0, (-1, k)).copy_(members[done : done + groups])
            done += groups

    def put_alone(self, out: Tensor, rows: Tensor) -> None:
        """Inverse of `alone`: write the dense rows into `out` (rows, ...)."""
        done = 0
        for piece in self.dense:
            size = piece.stop - piece.start
            out[piece] = rows[done : done + size]
            done += size


def _take(x: Tensor, pieces: Sequence[slice]) -> Tensor:
    return _join([x[piece] for piece in pieces]) if pieces else x[:0]


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)
