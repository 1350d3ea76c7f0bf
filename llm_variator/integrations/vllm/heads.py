"""Where the entries of one KV head lie in its blocks, step by step: slots, lengths and who reads what.

With a plugin that keeps keys and values, every KV head holds a number of entries of its own, so every head is a layer
of its own to vLLM, and all heads whose prompts are reduced alike, a class, share block tables. A head's entries lie
one behind the other in the order of their tokens. A chunk of a prompt never goes through the blocks: it is read from
the step's own keys, together with what the head holds, and only what is left of it is written. So a head needs the
blocks of its entries, whatever the length of a chunk. Knows integers and NumPy, not vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llm_variator.engine.blocks import Place, entries, pending, reduces
from llm_variator.integrations.policy import Ratio
from llm_variator.integrations.vllm.plan import Chunk, Layout, Shape, held, parts


class Keep(NamedTuple):
    """How a plugin reduces what one KV head holds of a prompt."""

    k: int
    """The head keeps one token of so many."""
    block: int
    """Of each block of so many tokens."""


def kept(tokens: int, prompt: int, keep: Keep, head: int, tail: int) -> int:
    """Entries that a head holds once the first `tokens` tokens of a sequence are read.

    While the prompt is read this may fall from one token to the next: a block is reduced.
    """
    read = min(tokens, prompt)
    return entries(Place(head, tail, 0, prompt), keep.k, keep.block, read) + tokens - read


def reduced(prompt: int, keep: Keep, head: int, tail: int) -> bool:
    """Whether a head loses anything of a prompt; where not, its tokens are ordinary dense ones."""
    return keep.k > 1 and reduces(Place(head, tail), keep.block, prompt)


def entries_of(
    tokens: int,
    prompt: int,
    plugin: Ratio,
    shape: Shape,
    ratios: Mapping[Ratio, int],
    keeps: Mapping[Ratio, Keep],
) -> int:
    """Entries of the first `tokens` tokens of a request with `plugin`, where this is how plugins merge or keep."""
    if plugin in keeps:
        return kept(tokens, prompt, keeps[plugin], shape.head, shape.tail)
    if plugin in ratios:
        return held(tokens, prompt, ratios[plugin], shape.head, shape.tail)
    return tokens


class Rows:
    """Collects the rows of one kernel call."""

    def __init__(self) -> None:
        self.queries: list[int] = []
        self.lengths: list[int] = []
        """Entries each row may see at its last query."""
        self.rows: list[int] = []
        """Of the batch."""
        self.slots: list[np.ndarray] = []

    def add(self, row: int, queries: int, end: int, table: np.ndarray, block_size: int) -> None:
        """`queries` entries of batch row `row` that end before entry `end` of its sequence."""
        if queries:
            self.queries.append(queries)
            self.lengths.append(end)
            self.rows.append(row)
            self.slots.append(slots(table[row], end - queries, end, block_size))

    @property
    def starts(self) -> np.ndarray:
        """(rows + 1,): where the queries of each row begin."""
        return np.concatenate(([0], np.cumsum(self.queries)))


def slots(blocks: np.ndarray, start: int, end: int, block_size: int) -> np.ndarray:
    """Slots of entries `start` to `end` of a sequence that lies in `blocks`."""
    places = np.arange(start, end)
    return blocks[places // block_size].astype(np.int64) * block_size + places % block_size


class Reading(NamedTuple):
    """A chunk of a prompt, or its part before the prompt's end, in a head that reduces it."""

    row: int
    """Of the batch."""
    plugin: Ratio
    start: int
    """First row in the flattened batch."""
    entry: int
    """First of its keys among all of the step."""
    tokens: int
    place: Place
    keep: Keep
    held: int
    """Entries before the chunk."""
    pending: int
    """The last of them, of blocks that are still whole."""
    blocks: np.ndarray
    """That hold them."""
    slots: np.ndarray
    """Of what is left of the pending entries and the chunk."""

    @property
    def before(self) -> int:
        """Entries that no longer change."""
        return self.held - self.pending


class HeadStep:
    """One step in all heads of one kind."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        rows: Sequence[int],
        ratios: Mapping[Ratio, int],
        keeps: Mapping[Ratio, Keep],
        shapes: Mapping[Ratio, Shape],
        table: np.ndarray,
        block_size: int,
    ) -> None:
        """What `chunks`, of these `rows` of the batch and of `table`, compute and write.

        `ratios` and `keeps`: by plugin, how it merges tokens in front of this head, or keeps its keys.
        """
        self.layout = Layout(chunks, ratios, shapes)
        """Of the layer's entries: groups by plugin, and behind them all other rows in the batch's order."""
        self.grouped = {plugin: Rows() for plugin in self.layout.groups}
        """By plugin: the queries of its groups."""
        self.dense = Rows()
        """All other queries that see what the head holds before them."""
        self.reading: dict[int, Reading] = {}
        """By row of the batch: chunks of prompts that are reduced."""
        self.dense_rows: list[slice] = []
        """Where `dense` is in the flattened batch."""
        alone = 0
        self._written: list[slice] = [slice(0, self.layout.grouped)]
        for row, chunk in zip(rows, chunks, strict=True):
            shape, keep = shapes.get(chunk.plugin, Shape(0, 0, ())), keeps.get(chunk.plugin)
            if keep is None:
                alone += self._merge(
                    row, chunk, ratios.get(chunk.plugin) or 1, shape, alone, table, block_size
                )
                continue
            head, tail = shape.head, shape.tail
            read = 0
            if reduced(chunk.prompt, keep, head, tail):
                read = max(0, min(chunk.tokens, chunk.prompt - chunk.position))
            if read:
                place = Place(head, tail, chunk.position, chunk.prompt - chunk.position)
                before, after = (
                    kept(tokens, chunk.prompt, keep, head, tail)
                    for tokens in (chunk.position, chunk.position + read)
                )
                left, entry = pending(place, keep.block), self.layout.grouped + alone
                self.reading[row] = Reading(
                    row,
                    chunk.plugin,
                    chunk.start,
                    entry,
                    read,
                    place,
                    keep,
                    before,
                    left,
                    table[row, : -(-before // block_size)].copy(),
                    slots(table[row], before - left, after, block_size),
                )
            end = kept(chunk.position + chunk.tokens, chunk.prompt, keep, head, tail)
            self._alone(row, chunk.start + read, chunk.tokens - read, end, alone + read, table, block_size)
            alone += chunk.tokens

    def _merge(
        self, row: int, chunk: Chunk, k: int, shape: Shape, alone: int, table: np.ndarray, block_size: int
    ) -> int:
        """One chunk of a plugin that merges, or of none; rows that are in no group."""
        before, inside, after = parts(chunk, k, *shape[:2]) if k > 1 else (chunk.tokens, 0, 0)

        def end(tokens: int) -> int:
            return held(chunk.position + tokens, chunk.prompt, k, shape.head, shape.tail)

        self._alone(row, chunk.start, before, end(before), alone, table, block_size)
        if inside:
            group = self.grouped[chunk.plugin]
            group.add(row, inside // k, end(before + inside), table, block_size)
        start = chunk.start + before + inside
        self._alone(row, start, after, end(chunk.tokens), alone + before, table, block_size)
        return before + after

    def _alone(
        self, row: int, start: int, tokens: int, end: int, alone: int, table: np.ndarray, block_size: int
    ) -> None:
        if tokens:
            self.dense.add(row, tokens, end, table, block_size)
            self.dense_rows.append(slice(start, start + tokens))
            first = self.layout.grouped + alone
            self._written.append(slice(first, first + tokens))

    @property
    def written(self) -> np.ndarray:
        """(written,) which of the layer's entries are written as they are."""
        return _numbers(self._written)

    @property
    def slots(self) -> np.ndarray:
        """(written,) where they go."""
        pieces = [piece for part in (*self.grouped.values(), self.dense) for piece in part.slots]
        return np.concatenate(pieces) if pieces else np.empty(0, dtype=np.int64)

    @property
    def dense_index(self) -> np.ndarray:
        """(queries of `dense`,) their rows in the flattened batch."""
        return _numbers(self.dense_rows)


def _numbers(pieces: Sequence[slice]) -> np.ndarray:
    numbers = [np.arange(piece.start, piece.stop) for piece in pieces]
    return np.concatenate(numbers) if numbers else np.empty(0, dtype=np.int64)
