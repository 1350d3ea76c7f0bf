"""Where a cache layer's keys and values lie: growing layers beside those of transformers. Know no compression.

A *store* is a `DynamicLayer`: `update` appends keys and values (b, kv_heads, n, head_dim) and returns all of them.
"""

from __future__ import annotations

import copy
import operator
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from llm_variator.engine.cache.quantised import Quantised, change, dense
from llm_variator.errors import VariatorError

Part = tuple[Tensor | Quantised, Tensor | Quantised]  # keys and values


class Sizes(NamedTuple):
    """Bytes of the entries of all rows."""

    held: int
    shared: int
    """Of `held`, those that other stores may use too."""
    column: int
    """Of one dense token."""


class KVStore(DynamicLayer):
    """A store of ours, growing by `update`: what a compressed layer and the functions below ask of it."""

    @abstractmethod
    def get_seq_length(self) -> int:
        """Entries held in every row."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append, and gather nothing."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append; returns all keys and values."""
        self.append(key_states, value_states)
        return self.whole()

    @abstractmethod
    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values in one tensor each (b, kv_heads, entries, head_dim)."""

    @abstractmethod
    def truncate(self, entries: int) -> None:
        """Keep the first `entries`, in place."""

    @abstractmethod
    def fork(self) -> KVStore:
        """A store that goes on by itself from the same entries, sharing them."""

    @abstractmethod
    def like(self, keys: Tensor, values: Tensor) -> KVStore:
        """A store of this kind with other entries."""

    @abstractmethod
    def split(self, parts: Sequence[Sequence[int]]) -> Sequence[KVStore]:
        """Stores of some heads each, by their places among those of this one, in whose place they stand."""

    @abstractmethod
    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""

    @abstractmethod
    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""

    @abstractmethod
    def sizes(self) -> Sizes:
        """Bytes held, shared, and of a dense token."""

    def free(self) -> None:
        """Give back what is held, where that does not happen by itself."""

    def offload(self) -> None:
        """Nothing: entries stay where they are."""

    def prefetch(self) -> None:
        """Nothing, like `offload`."""

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows."""
        self.batch_select_indices(beam_idx)


class SharedStore(KVStore):
    """A store that goes on from tensors of others: `parts` are never written, only `keys` and `values` are its own.

    A part of one row serves any number of rows: it is expanded for the moment of an `update`, and not kept.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, parts: tuple[Part, ...]) -> None:
        super().__init__()
        self.parts = parts
        self._empty()

    @property
    def shared(self) -> int:
        """Entries that lie in the parts."""
        return sum(keys.shape[-2] for keys, _ in self.parts)

    def get_seq_length(self) -> int:
        """Entries of the parts and its own."""
        return self.shared + (self.keys.shape[-2] if self.keys.numel() else 0)

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Append to its own tensors."""
        self.keys = torch.cat((self.keys, keys), dim=-2) if self.keys.numel() else keys
        self.values = torch.cat((self.values, values), dim=-2) if self.values.numel() else values

    def whole(self) -> tuple[Tensor, Tensor]:
        """All keys and values in one tensor each."""
        parts = [*self.parts, (self.keys, self.values)] if self.keys.numel() else [*self.parts]
        rows = max(len(keys) for keys, _ in parts)
        keys, values = (
            torch.cat([dense(part[side]).expand(rows, -1, -1, -1) for part in parts], dim=-2)
            for side in (0, 1)
        )
        return keys, values

    def truncate(self, entries: int) -> None:
        """Keep the first `entries`; parts are cut by views."""
        own = entries - self.shared
        if own >= 0:
            self.keys, self.values = self.keys[:, :, :own], self.values[:, :, :own]
            return
        kept: list[Part] = []
        for keys, values in self.parts:
            size = min(keys.shape[-2], entries - sum(part.shape[-2] for part, _ in kept))
            first = operator.itemgetter((slice(None), slice(None), slice(size)))
            kept.append((change(keys, first), change(values, first)))
        self.parts = tuple(part for part in kept if part[0].shape[-2]) or tuple(kept[:1])
        self._empty()

    def fork(self) -> SharedStore:
        """Its own entries become a part."""
        own = ((self.keys, self.values),) if self.keys.numel() else ()
        return SharedStore(self.parts + own)

    def like(self, keys: Tensor, values: Tensor) -> SharedStore:
        """One part."""
        return SharedStore(((keys, values),))

    def split(self, parts: Sequence[Sequence[int]]) -> list[SharedStore]:
        """Parts of neighbouring heads are views."""
        stores = []
        for places in parts:

            def take(t: Tensor, places: Sequence[int] = places) -> Tensor:
                return of_heads(t, places)

            new = SharedStore(
                tuple((change(keys, take), change(values, take)) for keys, values in self.parts)
            )
            if self.keys.numel():
                new.append(take(self.keys), take(self.values))
            stores.append(new)
        return stores

    def sizes(self) -> Sizes:
        """Shared is what lies in parts."""
        shared = sum(keys.nbytes + values.nbytes for keys, values in self.parts)
        parts = [*self.parts, (self.keys, self.values)] if self.keys.numel() else [*self.parts]
        column = max(
            sum(t.shape[0] * t.shape[1] * t.shape[3] * t.dtype.itemsize for t in part) for part in parts
        )
        return Sizes(shared + self.keys.nbytes + self.values.nbytes, shared, column)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row; parts of one row serve as they are."""
        self._each_part(lambda t: t.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows; parts of one row serve as they are."""
        self._each_part(lambda t: t[indices.to(t.device)])

    def _each_part(self, how: Callable[[Tensor], Tensor]) -> None:
        if self.keys.numel():
            self.keys, self.values = how(self.keys), how(self.values)
        self.parts = tuple(
            (change(keys, how), change(values, how)) if len(keys) > 1 else (keys, values)
            for keys, values in self.parts
        )

    def _empty(self) -> None:
        """Own no entries."""
        like = self.parts[0][0]
        own = torch.empty(0, dtype=like.dtype, device=like.device)
        self.lazy_initialization(own, own)


def fork_store(store: DynamicLayer) -> DynamicLayer:
    """A store that goes on by itself from the same entries, sharing them."""
    if isinstance(store, KVStore):
        return store.fork()
    if type(store) is DynamicLayer and store.is_initialized:
        return SharedStore((whole(store),))
    return copy.copy(store)  # transformers' layers replace their tensors, they never write into them


def append(store: DynamicLayer, keys: Tensor, values: Tensor) -> None:
    """Append to a store, for who reads all of it later."""
    store.append(keys, values) if isinstance(store, KVStore) else store.update(keys, values)


def split(store: DynamicLayer, parts: Sequence[Sequence[int]]) -> Sequence[DynamicLayer]:
    """Stores of some heads each, by their places among those of `store`, which is of no use afterwards."""
    if isinstance(store, KVStore):
        return store.split(parts)
    if isinstance(store, QuantizedLayer) and store.get_seq_length():
        raise VariatorError(
            "transformers' QuantizedCache packs all heads together, and this plugin gives them other ratios than the "
            "one before: read the prompt again with this plugin, or quantise a context (CompressedContext.quantised)"
        )
    stores = [copy.copy(store) for _ in parts]
    if store.get_seq_length():
        for new, places in zip(stores, parts, strict=True):
            # nothing is read: an offloaded layer may be on its way back
            new.keys, new.values = (of_heads(t, places).clone() for t in whole(store))
    return stores


def of_heads(x: Tensor, heads: Sequence[int]) -> Tensor:
    """(b, all heads, ...) -> (b, these heads, ...), a view where they are neighbours."""
    first, last = heads[0], heads[-1]
    if last - first == len(heads) - 1:
        return x[:, first : last + 1]
    return torch.cat([x[:, head : head + 1] for head in heads], dim=1)  # faster than an index


def truncate(store: DynamicLayer, entries: int, what: str = "decode_block") -> None:
    """Keep the first `entries` of a store, in place, for `what` to put others behind them."""
    if isinstance(store, KVStore):
        store.truncate(entries)
        return
    if isinstance(store, QuantizedLayer):
        raise VariatorError(
            f"{what} does not work with transformers' QuantizedCache, whose entries cannot be taken back: leave "
            "out one of the two, or quantise a context (CompressedContext.quantised)"
        )
    keys, values = whole(store)
    store.keys, store.values = keys[:, :, :entries], values[:, :, :entries]


def whole(store: DynamicLayer) -> tuple[Tensor, Tensor]:
    """All keys and values of a store in one tensor each (b, kv_heads, entries, head_dim)."""
    if isinstance(store, KVStore):
        return store.whole()
    if isinstance(store, QuantizedLayer):
        stored: Any = store
        packed = [stored._dequantize(each) for each in (stored._quantized_keys, stored._quantized_values)]
        if (
            getattr(stored, "_pending_beam_idx", None) is not None
        ):  # beams reorder what is packed at an update only
            packed = stored._apply_pending_reorder(*packed)
        pairs = zip(packed, (stored.keys, stored.values), strict=True)
        keys, values = (torch.cat([old, new], dim=-2) if new.numel() else old for old, new in pairs)
        return keys, values
    assert store.keys is not None
    assert store.values is not None
    return store.keys, store.values


def sizes(store: DynamicLayer) -> Sizes:
    """What a store takes."""
    if isinstance(store, KVStore):
        return store.sizes()
    keys, values = whole(store)
    held = keys.nbytes + values.nbytes
    column = held // max(1, keys.shape[-2])
    if isinstance(store, QuantizedLayer):  # what its bits promise, and the newest entries, which stay dense
        assert store.keys is not None
        rest = store.keys.shape[-2] if store.keys.numel() else 0
        packed = (keys.shape[-2] - rest) * column * store.nbits // (8 * keys.element_size())
        held = rest * column + packed
    return Sizes(held, 0, column)
