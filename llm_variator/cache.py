"""The compressed KV cache: one layer class for transformers' `DynamicCache`.

A `CompressedLayer` holds *entries*, fewer than tokens. To transformers it reports the tokens it stands for
(so positions and masks of generated tokens come out right); in memory it has the entries alone. Where they lie
is the business of its *store*: any growing cache layer, transformers' own or one of `stores`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from llm_variator.errors import VariatorError
from llm_variator.groups import FILLER, Grouping
from llm_variator.paging import PagedLayer, PoolReport
from llm_variator.recent import Recent
from llm_variator.stores import SharedLayer, Store, fork_store, sizes, truncate, whole


class CompressedLayer(DynamicLayer):
    """Keys and values (b, kv_heads, entries, head_dim) that stand for `get_seq_length()` columns."""

    is_croppable = False

    def __init__(self, store: DynamicLayer | None = None) -> None:
        """`store` holds the entries; None: one tensor that grows by concatenation."""
        self.store = DynamicLayer() if store is None else store
        self.tokens = self.store.get_seq_length()
        self.has_fillers = False
        self.recent: Recent | None = None
        # of the first entries; the dense ones after them follow from `tokens`
        self._columns: Tensor | None = None

    @classmethod
    def holding(
        cls, store: DynamicLayer, tokens: int, columns: Tensor | None, has_fillers: bool
    ) -> CompressedLayer:
        """A layer whose `store` holds the entries of `tokens` columns; `columns` of the first entries, or all."""
        new = cls(store)
        new.tokens, new._columns, new.has_fillers = tokens, columns, has_fillers
        return new

    # What transformers reads and writes on a layer is the store's.

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """The store's keys; of a shared store only its own part."""
        return self.store.keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Like `keys`."""
        return self.store.values

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the store has seen keys yet."""
        return self.store.is_initialized

    def offload(self) -> None:
        """Move the store to the CPU."""
        self.store.offload()

    def prefetch(self) -> None:
        """Move the store back to its device."""
        self.store.prefetch()

    @property
    def entries(self) -> int:
        """Entries really held, fillers of shorter rows included."""
        return self.store.get_seq_length()

    @property
    def columns(self) -> Tensor:
        """(b or 1, entries) column of each entry in the whole sequence, `FILLER` where there is none."""
        known = self._columns
        if known is None:
            known = torch.empty(1, 0, dtype=torch.long, device=self.store.device)
        rest = self.entries - known.shape[1]
        dense = torch.arange(self.tokens - rest, self.tokens, device=known.device)
        return torch.cat((known, dense.expand(len(known), -1)), dim=1)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        grouping: Grouping | None = None,
        width: int | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append dense tokens, or with `grouping` the entries of `width` columns; returns all keys and values."""
        if grouping is not None:
            assert width is not None
            new = torch.where(grouping.columns == FILLER, FILLER, grouping.columns + self.tokens)
            if self.entries:
                old = self.columns
                rows = max(len(old), len(new))
                new = torch.cat((old.expand(rows, -1), new.expand(rows, -1)), dim=1)
        out = self.store.update(key_states, value_states)
        if grouping is None:
            self.tokens += key_states.shape[-2]
        else:
            assert width is not None
            self._columns = new
            self.tokens += width
            self.has_fillers |= grouping.has_fillers
        return out

    def merge(self, keys: Tensor, values: Tensor, k: int) -> None:
        """Put `keys` and `values` in place of the oldest recent entries, one for every k of them."""
        assert self.recent is not None
        old, known, start = keys.shape[2] * k, len(self.recent), self.entries - len(self.recent)
        columns, (all_keys, all_values) = self.columns, whole(self.store)
        ends = columns[:, start : start + old].unflatten(1, (-1, k)).amax(-1)
        self._columns = torch.cat((columns[:, :start], ends, columns[:, start + old :]), dim=1)
        rest = slice(start + old, None)
        keys = torch.cat((keys, all_keys[:, :, rest]), dim=2)
        values = torch.cat((values, all_values[:, :, rest]), dim=2)
        truncate(self.store, start)
        self.store.update(keys, values)
        self.recent = self.recent.last(known - old)

    def hide(self, mask: Tensor) -> None:
        """Make entries invisible whose token (rows, tokens) is not in `mask`; for tokens behind the end of a row."""
        columns = self.columns.expand(len(mask), -1)
        seen = mask.bool().to(columns.device).gather(1, columns.clamp(min=0))
        self._columns = torch.where(seen, columns, FILLER)
        self.has_fillers |= bool((self._columns == FILLER).any())
        self.recent = None

    def get_seq_length(self) -> int:
        """Columns this layer stands for: what positions and 2D masks count."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of the mask transformers builds; compressed layers replace that mask by their own."""
        return self.tokens + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: a group cannot be cut."""
        raise VariatorError("a compressed KV cache cannot be cropped (assisted decoding is not supported)")

    def reset(self) -> None:
        """Forget everything; tensors that others share are left alone."""
        self.store = DynamicLayer()
        self.tokens, self._columns, self.has_fillers, self.recent = 0, None, False, None

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows, for beam search."""
        self._rows(beam_idx)
        self.store.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self._columns is not None and len(self._columns) > 1:
            self._columns = self._columns.repeat_interleave(repeats, dim=0)
        if self.recent is not None:
            self.recent = self.recent.rows(lambda t: t.repeat_interleave(repeats, dim=0))
        self.store.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._rows(indices)
        self.store.batch_select_indices(indices)

    def _rows(self, indices: Tensor) -> None:
        if self._columns is not None and len(self._columns) > 1:
            self._columns = self._columns[indices.to(self._columns.device)]
        if self.recent is not None and (
            len(self.recent.hidden) > 1 or not isinstance(self.store, SharedLayer)
        ):
            self.recent = self.recent.rows(lambda t: t[indices.to(t.device)])

    def fork(self) -> CompressedLayer:
        """A layer that goes on by itself from the same entries; storage is shared until the two diverge."""
        new = copy.copy(self)
        new.store = fork_store(self.store)
        return new


def is_compressed(cache: Any) -> bool:
    """Whether some layer of `cache` holds fewer entries than tokens."""
    return any(
        isinstance(layer, CompressedLayer) and layer.entries != layer.tokens
        for layer in getattr(cache, "layers", ())
    )


def adopt(cache: Cache, layers: Iterable[int], num_layers: int) -> None:
    """Make `layers` of a growing `cache` compressible, in place; what it already holds stays as it is."""
    while cache.layer_class_to_replicate is not None and len(cache.layers) < num_layers:
        cache.layers.append(cache.layer_class_to_replicate())
    for index in layers:
        layer = cache.layers[index] if index < len(cache.layers) else None
        if not isinstance(layer, DynamicLayer):
            raise VariatorError(
                "a plugin that compresses the KV cache needs a cache that grows, like transformers' DynamicCache, "
                f"got {type(cache).__name__}; leave out past_key_values and cache_implementation"
            )
        assert not layer.is_sliding, "sliding layers are never compressed"
        if not isinstance(layer, CompressedLayer):
            cache.layers[index] = CompressedLayer(layer)


def fork(cache: Cache) -> DynamicCache:
    """A cache that goes on by itself from what `cache` holds; nothing is copied until the two diverge."""
    new: Any = DynamicCache()
    new.layer_class_to_replicate = None
    new.layers = [
        layer.fork() if isinstance(layer, CompressedLayer) else copy.copy(layer) for layer in cache.layers
    ]
    new.ends_before_last_token = getattr(cache, "ends_before_last_token", False)
    return new


def release(cache: Cache) -> None:
    """Give back the blocks of a pool that `cache` holds."""
    for layer in cache.layers:
        if isinstance(layer, CompressedLayer) and isinstance(layer.store, Store):
            layer.store.free()


@contextlib.contextmanager
def released_on_error(cache: Cache) -> Iterator[None]:
    """Give back the blocks of `cache` at once if the block fails, not when the error is forgotten."""
    try:
        yield
    except BaseException:
        release(cache)
        raise


def expand(cache: Cache, rows: int) -> None:
    """Make a cache of one row serve `rows` rows, in place; a shared store keeps its one copy."""
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        layer.batch_repeat_interleave(rows)


def stack(caches: Sequence[Cache], rows: Sequence[Tensor]) -> list[Any]:
    """The layers of one cache with the rows of all `caches`, right-aligned; `rows`: where each cache's rows go.

    A row of fewer tokens than the longest begins with columns that stand for nothing: its mask must say so.
    """
    tokens = max(cache.get_seq_length() for cache in caches)
    order = torch.cat(list(rows)).argsort()
    stacked: list[Any] = []
    for parts in zip(*(cache.layers for cache in caches), strict=True):
        like = next(part for part in parts if part.get_seq_length())
        if isinstance(like, CompressedLayer):
            tensors = _tensors([getattr(part, "store", part) for part in parts], rows)
            store, placed = _stack_tensors(tensors, DynamicLayer()), []
            for part, (keys, _) in zip(parts, tensors, strict=True):
                own = part.columns if part.get_seq_length() else order.new_empty(1, 0)
                own = torch.where(own == FILLER, FILLER, own + tokens - part.get_seq_length())
                own = own.expand(len(keys), -1)
                placed.append(F.pad(own, (store.get_seq_length() - own.shape[1], 0), value=FILLER))
            if like.entries and isinstance(like.store, Store):
                store = like.store.like(*whole(store))
            columns = torch.cat(placed)
            new: Any = CompressedLayer.holding(store, tokens, columns, bool((columns == FILLER).any()))
            new.recent = Recent.stack([getattr(part, "recent", None) for part in parts], [*map(len, rows)])
        elif isinstance(like, DynamicSlidingWindowLayer):
            new = _stack_tensors(_tensors(parts, rows), copy.copy(like))
            new.cumulative_length = tokens
        else:
            new = _stack_tensors(_tensors(parts, rows), DynamicLayer())
        new.batch_select_indices(order)
        stacked.append(new)
    return stacked


def _tensors(layers: Sequence[DynamicLayer], rows: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer; of one that has seen nothing yet, none for as many rows."""
    held = [whole(layer) if layer.get_seq_length() else None for layer in layers]
    keys, values = next(pair for pair in held if pair is not None)
    return [
        (keys[:1, :, :0].expand(len(own), -1, -1, -1), values[:1, :, :0].expand(len(own), -1, -1, -1))
        if pair is None
        else (pair[0].expand(len(own), -1, -1, -1), pair[1].expand(len(own), -1, -1, -1))
        for pair, own in zip(held, rows, strict=True)
    ]


def _stack_tensors(parts: Sequence[tuple[Tensor, Tensor]], into: DynamicLayer) -> DynamicLayer:
    width = max(keys.shape[2] for keys, _ in parts)
    if not into.is_initialized:
        into.lazy_initialization(*parts[0])
    into.keys, into.values = (
        torch.cat([F.pad(part[side], (0, 0, width - part[side].shape[2], 0)) for part in parts])
        for side in (0, 1)
    )
    return into


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """KV cache of one layer: entries (per row) and bytes (all rows), as held and as a dense cache would."""

    entries: int
    bytes: int
    dense_entries: int
    dense_bytes: int
    shared_bytes: int = 0
    """Of `bytes`, those that lie in tensors or blocks which other caches may use too."""


@dataclasses.dataclass(frozen=True)
class KVCacheReport:
    """`VariatorModel.kv_cache_report()`: one `LayerReport` per decoder layer, and the sums."""

    layers: tuple[LayerReport, ...]
    pool: PoolReport | None = None
    """Of the pool that the cache draws from."""

    @classmethod
    def of(cls, cache: Cache) -> KVCacheReport:
        """Measure what `cache` holds now."""
        layers, pool = [], None
        for layer in cache.layers:
            if isinstance(layer, CompressedLayer) and isinstance(layer.store, PagedLayer):
                pool = layer.store.pool.report()
            assert isinstance(layer, CacheLayerMixin)
            if not layer.is_initialized:
                layers.append(LayerReport(0, 0, 0, 0))
            elif isinstance(layer, CompressedLayer):
                held, shared, column = sizes(layer.store)
                held += layer.recent.nbytes if layer.recent is not None else 0
                layers.append(LayerReport(layer.entries, held, layer.tokens, layer.tokens * column, shared))
            else:
                assert layer.keys is not None
                assert layer.values is not None
                size, held = layer.keys.nbytes + layer.values.nbytes, layer.keys.shape[-2]
                layers.append(LayerReport(held, size, held, size))
        return cls(tuple(layers), pool)

    @property
    def bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes that the base model alone would hold for the same tokens."""
        return sum(layer.dense_bytes for layer in self.layers)

    @property
    def shared_bytes(self) -> int:
        """Of `bytes`, those that other caches may use too."""
        return sum(layer.shared_bytes for layer in self.layers)

    def __str__(self) -> str:
        ratio = self.bytes / self.dense_bytes if self.dense_bytes else 1.0
        shared = f", {self.shared_bytes:,} of them shared" if self.shared_bytes else ""
        lines = [
            f"KV cache {self.bytes:,} bytes{shared}, dense {self.dense_bytes:,} ({ratio:.1%})",
            "layer entries dense",
        ]
        lines += [f"{i:5} {layer.entries:7} {layer.dense_entries:5}" for i, layer in enumerate(self.layers)]
        if self.pool is not None:
            lines.insert(1, str(self.pool))
        return "\n".join(lines)
