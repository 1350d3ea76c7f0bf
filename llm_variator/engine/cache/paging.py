"""Paged storage: fixed-size blocks of one pool, shared between caches by reference counts, copied on write.

Every row of every layer has a *table* of the blocks that hold its entries, in order. Forks share all blocks; a
block that others use too is copied before one of them appends to it. Attention gathers a layer's blocks into one
tensor for the moment it needs them.

A block is memory for `block_size` entries of all KV heads of a layer. A store of fewer heads fits as many more entries
into it: `block_size` * KV heads / its heads, rounded down.
"""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from llm_variator.engine.cache.stores import KVStore, Sizes, of_heads
from llm_variator.engine.devices import numbers
from llm_variator.errors import VariatorError

Tables = list[list[int]]


class PoolExhaustedError(VariatorError):
    """No free block is left; nothing was changed by the call that raised it."""


@dataclasses.dataclass(frozen=True)
class PoolReport:
    """Use of a `KVPool`: numbers of blocks, and bytes."""

    blocks: int
    used: int
    shared: int
    """Blocks in more than one table."""
    references: int
    """Table slots in use: what unshared tables would take in blocks."""
    block_bytes: int

    def __str__(self) -> str:
        return (
            f"pool of {self.blocks} blocks, {self.block_bytes:,} bytes each: {self.used} used, {self.shared} of them "
            f"shared; without sharing {self.references}"
        )


class KVPool:
    """Memory for the compressed KV caches of many conversations: `model.compress(document, pool=pool)`.

    All layers and contexts of one model draw from it. Tensors are made at the first use, when their shape is
    known: (blocks, kv_heads, block_size, head_dim) for keys and for values. Safe with threads.
    """

    def __init__(self, blocks: int, block_size: int = 16) -> None:
        """`block_size` entries of one row and layer fit into a block, more of heads that keep their own.

        Raises:
            VariatorError: a size below 1.
        """
        if min(blocks, block_size) < 1:
            raise VariatorError(f"a pool needs at least one block of one entry, got {blocks} of {block_size}")
        self.blocks, self.block_size = blocks, block_size
        self._free = list(range(blocks))[::-1]
        self._references = [0] * blocks
        self._lock = threading.RLock()
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def report(self) -> PoolReport:
        """How many blocks are used and shared now."""
        with self._lock:
            counts = [count for count in self._references if count]
        size = 0 if self.keys is None or self.values is None else self.keys[0].nbytes + self.values[0].nbytes
        return PoolReport(self.blocks, len(counts), sum(c > 1 for c in counts), sum(counts), size)

    def fit(self, keys: Tensor, values: Tensor, heads: int) -> None:
        """Make the tensors for entries like `keys` and `values` (b, some heads, n, head_dim), or check that they fit.

        `heads`: KV heads of the layer.
        """
        with self._lock:
            if self.keys is None or self.values is None:
                with torch.inference_mode(False):  # those that come later may be outside of it
                    self.keys, self.values = (
                        t.new_zeros(self.blocks, heads, self.block_size, t.shape[3]) for t in (keys, values)
                    )
            for mine, given in ((self.keys, keys), (self.values, values)):
                if (mine.shape[1], mine.shape[3], mine.dtype) != (heads, given.shape[3], given.dtype):
                    raise VariatorError(
                        "this pool holds entries of another shape or dtype: every model needs its own, and so "
                        "do layers that differ in heads"
                    )

    def capacity(self, heads: int) -> int:
        """Entries of so many heads that fit into a block."""
        assert self.keys is not None
        return self.block_size * self.keys.shape[1] // heads

    def of_heads(self, heads: int) -> tuple[Tensor, Tensor]:
        """Keys and values as (blocks, heads, capacity, head_dim), views."""
        assert self.keys is not None
        assert self.values is not None
        size = self.capacity(heads)
        keys, values = (
            t.flatten(1, 2)[:, : heads * size].unflatten(1, (heads, size)) for t in (self.keys, self.values)
        )
        return keys, values

    def take(self, count: int) -> list[int]:
        """`count` unused blocks, now with one reference each.

        Raises:
            PoolExhaustedError: fewer are free; none is taken.
        """
        with self._lock:
            if count > len(self._free):
                raise PoolExhaustedError(
                    f"the KV pool is exhausted: {count} more of its {self.blocks} blocks are needed, "
                    f"{len(self._free)} are free; free some contexts or make a larger pool"
                )
            taken = [self._free.pop() for _ in range(count)]
            for block in taken:
                self._references[block] = 1
            return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more reference to each of `blocks`."""
        with self._lock:
            for block in blocks:
                assert self._references[block] > 0, "a free block cannot be shared"
                self._references[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One reference less to each of `blocks`; those without any are free."""
        with self._lock:
            for block in blocks:
                assert self._references[block] > 0, "block freed twice"
                self._references[block] -= 1
                if not self._references[block]:
                    self._free.append(block)

    def is_shared(self, block: int) -> bool:
        """Whether more than one table holds `block`."""
        return self._references[block] > 1


class PagedStore(KVStore):
    """A store whose entries lie in the blocks of a `KVPool`."""

    def __init__(
        self, pool: KVPool, tables: Tables | None = None, entries: int = 0, heads: int = 0, of: int = 0
    ) -> None:
        """`heads` are those held, `of` all KV heads of the layer; 0: as many as are given first."""
        super().__init__()
        self.pool, self.entries = pool, entries
        self.heads, self.of = heads, of
        self.tables: Tables = [] if tables is None else tables
        self.is_freed = False
        self._finalizer = weakref.finalize(self, _release, pool, self.tables)
        if self.tables:
            self.is_initialized = True
            assert pool.keys is not None
            self.dtype, self.device = pool.keys.dtype, pool.keys.device

    def get_seq_length(self) -> int:
        """Entries held in every row."""
        return self.entries

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append to the last blocks, to copies of those that others hold too, and to new ones.

        Raises:
            PoolExhaustedError: too few blocks are free; nothing has changed.
        """
        self._check()
        rows, heads, count = keys.shape[:3]
        pool, self.heads, self.of = self.pool, heads, self.of or heads
        pool.fit(keys, values, self.of)
        assert pool.keys is not None
        assert pool.values is not None
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        size = pool.capacity(heads)
        first, offset = divmod(self.entries, size)
        fresh = -(-(self.entries + count) // size) - -(-self.entries // size)
        with pool._lock:
            tables = self.tables or [[] for _ in range(rows)]
            assert len(tables) == rows
            # a block is copied for every row that holds it, even if the others all go on from copies
            copied = [bool(offset and count) and pool.is_shared(table[first]) for table in tables]
            taken = pool.take(rows * fresh + sum(copied))
            for table, copy in zip(tables, copied, strict=True):
                if copy:
                    old, table[first] = table[first], taken.pop()
                    for tensor in (pool.keys, pool.values):
                        tensor[table[first]] = tensor[old]
                    pool.release([old])
                for _ in range(fresh):
                    table.append(taken.pop())
        if not self.tables:
            self.tables.extend(tables)
        places = torch.arange(self.entries, self.entries + count, device=pool.keys.device)
        held = self._table()[:, places // size]  # (rows, count)
        slots = (places % size).expand(rows, -1)
        for tensor, states in zip(pool.of_heads(heads), (keys, values), strict=True):
            tensor[held, :, slots] = states.transpose(1, 2)
        self.entries += count

    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values, gathered."""
        self._check()
        assert self.pool.keys is not None
        table = self._table()
        keys, values = (
            tensor[table].transpose(1, 2).flatten(2, 3)[:, :, : self.entries]
            for tensor in self.pool.of_heads(self.heads)
        )
        return keys, values

    def truncate(self, entries: int) -> None:
        """Keep the first `entries`; blocks behind them are given back."""
        self._check()
        kept = -(-entries // self.pool.capacity(self.heads))
        for table in self.tables:
            self.pool.release(table[kept:])
            del table[kept:]
        self.entries = entries

    def fork(self) -> PagedStore:
        """A store with the same blocks."""
        self._check()
        for table in self.tables:
            self.pool.share(table)
        return PagedStore(
            self.pool, [list(table) for table in self.tables], self.entries, self.heads, self.of
        )

    def __deepcopy__(self, memo: Any) -> PagedStore:
        return self.fork()  # for copy.deepcopy of a cache: a block is copied where the two diverge

    def __reduce__(self) -> Any:
        raise VariatorError("a pool's blocks are not pickled: write the context to a file by its save")

    def like(self, keys: Tensor, values: Tensor) -> PagedStore:
        """A store in the same pool that holds these entries."""
        new = PagedStore(self.pool, of=self.of)
        new.append(keys, values)
        return new

    def split(self, parts: Sequence[Sequence[int]]) -> list[PagedStore]:
        """Stores in the same pool; their entries move to blocks of their own.

        Raises:
            PoolExhaustedError: too few blocks are free; nothing has changed.
        """
        self._check()
        stores = [PagedStore(self.pool, of=self.of or sum(map(len, parts))) for _ in parts]
        if self.tables:
            keys, values = self.whole()
            try:
                for new, places in zip(stores, parts, strict=True):
                    new.append(of_heads(keys, places), of_heads(values, places))
            except PoolExhaustedError:
                for new in stores:
                    new.free()
                raise
        self.free()
        return stores

    def free(self) -> None:
        """Give all blocks back; the store is of no use afterwards.

        Raises:
            VariatorError: it was freed before.
        """
        self._check()
        self.is_freed = True
        self._finalizer()

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; the copies share its blocks."""
        self._pick([row for row in range(len(self.tables)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if self.tables:
            self._pick(torch.arange(len(self.tables), device="cpu")[indices.cpu()].tolist())

    def sizes(self) -> Sizes:
        """Whole blocks; shared are those of several tables."""
        if self.pool.keys is None or self.pool.values is None:
            return Sizes(0, 0, 0)
        own = Counter(block for table in self.tables for block in table)
        shared = sum(self.pool.is_shared(block) for block in own)
        block = self.pool.report().block_bytes
        column = sum(t.shape[3] * t.dtype.itemsize for t in (self.pool.keys, self.pool.values))
        return Sizes(len(own) * block, shared * block, len(self.tables) * self.heads * column)

    def _table(self) -> Tensor:
        """(rows, blocks) where the pool lies."""
        assert self.pool.keys is not None
        flat = numbers([block for table in self.tables for block in table], self.pool.keys.device)
        return flat.view(len(self.tables), len(self.tables[0]))

    def _pick(self, rows: list[int]) -> None:
        self._check()
        new = [list(self.tables[row]) for row in rows]
        for table in new:
            self.pool.share(table)
        for table in self.tables:
            self.pool.release(table)
        self.tables[:] = new

    def _check(self) -> None:
        if self.is_freed:
            raise VariatorError("this context was freed: its blocks may hold other contexts now")


def _release(pool: KVPool, tables: Tables) -> None:
    for table in tables:
        pool.release(table)
    tables.clear()
