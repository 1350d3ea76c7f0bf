"""Where a cache layer's keys and values lie: growing layers beside those of transformers. Know no compression.

A *store* is a `DynamicLayer`: `update` appends keys and values (b, kv_heads, n, head_dim) and returns all of them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class Store(DynamicLayer):
    """A store of ours: what the functions below ask of it."""

    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values in one tensor each (b, kv_heads, entries, head_dim)."""
        raise NotImplementedError

    def truncate(self, entries: int) -> None:
        """Keep the first `entries`, in place."""
        raise NotImplementedError

    def fork(self) -> Store:
        """A store that goes on by itself from the same entries, sharing them."""
        raise NotImplementedError

    def like(self, keys: Tensor, values: Tensor) -> DynamicLayer:
        """A store of this kind with other entries."""
        raise NotImplementedError

    def sizes(self) -> tuple[int, int, int]:
        """Bytes held, bytes of them that others may use too, bytes of one dense column over all rows."""
        raise NotImplementedError

    def free(self) -> None:
        """Give back what is held, where that does not happen by itself."""

    def offload(self) -> None:
        """Nothing: entries stay where they are."""

    def prefetch(self) -> None:
        """Nothing, like `offload`."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows."""
        self.batch_select_indices(beam_idx)


class SharedLayer(Store):
    """A store that goes on from tensors of others: `parts` are never written, only `keys` and `values` are its own.

    A part of one row serves any number of rows: it is expanded for the moment of an `update`, and not kept.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, parts: tuple[tuple[Tensor, Tensor], ...]) -> None:
        super().__init__()
        self.parts = parts
        self.lazy_initialization(*parts[0])

    @property
    def shared(self) -> int:
        """Entries that lie in the parts."""
        return sum(keys.shape[-2] for keys, _ in self.parts)

    def get_seq_length(self) -> int:
        """Entries of the parts and its own."""
        return self.shared + (self.keys.shape[-2] if self.keys.numel() else 0)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to its own tensors; returns those of the parts in front of them."""
        self.keys = torch.cat((self.keys, key_states), dim=-2) if self.keys.numel() else key_states
        self.values = torch.cat((self.values, value_states), dim=-2) if self.values.numel() else value_states
        return self.whole()

    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values in one tensor each."""
        parts = [*self.parts, (self.keys, self.values)] if self.keys.numel() else [*self.parts]
        rows = max(len(keys) for keys, _ in parts)
        keys, values = (
            torch.cat([part[side].expand(rows, -1, -1, -1) for part in parts], dim=-2) for side in (0, 1)
        )
        return keys, values

    def truncate(self, entries: int) -> None:
        """Keep the first `entries`; parts are cut by views."""
        own = entries - self.shared
        if own >= 0:
            self.keys, self.values = self.keys[:, :, :own], self.values[:, :, :own]
            return
        kept: list[tuple[Tensor, Tensor]] = []
        for keys, values in self.parts:
            size = min(keys.shape[-2], entries - sum(part.shape[-2] for part, _ in kept))
            kept.append((keys[:, :, :size], values[:, :, :size]))
        self.parts = tuple(part for part in kept if part[0].shape[-2]) or tuple(kept[:1])
        self.lazy_initialization(*self.parts[0])

    def fork(self) -> SharedLayer:
        """Its own entries become a part."""
        own = ((self.keys, self.values),) if self.keys.numel() else ()
        return SharedLayer(self.parts + own)

    def like(self, keys: Tensor, values: Tensor) -> DynamicLayer:
        """One part."""
        return SharedLayer(((keys, values),))

    def sizes(self) -> tuple[int, int, int]:
        """Bytes held, bytes of them in parts, bytes of one dense column over all rows."""
        shared = sum(keys.nbytes + values.nbytes for keys, values in self.parts)
        parts = [*self.parts, (self.keys, self.values)] if self.keys.numel() else self.parts
        column = max((keys.nbytes + values.nbytes) // keys.shape[-2] for keys, values in parts)
        return shared + self.keys.nbytes + self.values.nbytes, shared, column

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; parts of one row serve as they are."""
        self._each_part(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows; parts of one row serve as they are."""
        self._each_part(lambda t: t[indices.to(t.device)])

    def _each_part(self, change: Any) -> None:
        if self.keys.numel():
            self.keys, self.values = change(self.keys), change(self.values)
        self.parts = tuple(
            (change(keys), change(values)) if len(keys) > 1 else (keys, values) for keys, values in self.parts
        )


def fork_store(store: DynamicLayer) -> DynamicLayer:
    """A store that goes on by itself from the same entries, sharing them."""
    if isinstance(store, Store):
        return store.fork()
    if type(store) is DynamicLayer and store.is_initialized:
        return SharedLayer((whole(store),))
    return copy.copy(store)  # transformers' layers replace their tensors, they never write into them


def truncate(store: DynamicLayer, entries: int) -> None:
    """Keep the first `entries` of a store, in place."""
    if isinstance(store, Store):
        store.truncate(entries)
        return
    keys, values = whole(store)
    store.keys, store.values = keys[:, :, :entries], values[:, :, :entries]


def whole(store: DynamicLayer) -> tuple[Tensor, Tensor]:
    """All keys and values of a store in one tensor each (b, kv_heads, entries, head_dim)."""
    if isinstance(store, Store):
        return store.whole()
    assert store.keys is not None
    assert store.values is not None
    return store.keys, store.values


def sizes(store: DynamicLayer) -> tuple[int, int, int]:
    """Bytes held, bytes of them that others may use too, bytes of one dense column over all rows."""
    if isinstance(store, Store):
        return store.sizes()
    keys, values = whole(store)
    held = keys.nbytes + values.nbytes
    return held, 0, held // max(1, keys.shape[-2])
