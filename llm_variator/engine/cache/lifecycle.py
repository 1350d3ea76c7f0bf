"""A whole compressed cache, from its first pass to its end: made, forked, widened, put together, given back."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llm_variator.engine.cache.layer import CompressedLayer
from llm_variator.engine.cache.recent import Recent
from llm_variator.engine.cache.selected import SelectedLayer
from llm_variator.engine.cache.stores import KVStore, whole
from llm_variator.engine.groups import FILLER
from llm_variator.errors import VariatorError


def is_compressed(cache: Any) -> bool:
    """Whether some layer of `cache` holds fewer entries than tokens, fillers of a row, or entries to merge later."""
    return any(
        isinstance(layer, SelectedLayer)
        or (
            isinstance(layer, CompressedLayer)
            and (layer.entries != layer.tokens or layer.has_fillers or layer.recent is not None)
        )
        for layer in getattr(cache, "layers", ())
    )


def adopt(
    cache: Cache, layers: Iterable[int], num_layers: int, selected: Mapping[int, Sequence[int]] | None = None
) -> None:
    """Make `layers` of a growing `cache` compressible, in place; what it already holds stays as it is.

    `selected`: those of them where heads keep keys of their own choice, with the ratio of each head.
    """
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
        if isinstance(layer, SelectedLayer):
            continue
        if selected is not None and index in selected:
            cache.layers[index] = SelectedLayer.of(layer, len(selected[index]))
        elif not isinstance(layer, CompressedLayer):
            cache.layers[index] = CompressedLayer(layer)
    held: list[Any] = cache.layers
    if selected and len({layer.get_seq_length() for layer in held}) > 1:
        raise VariatorError(
            "the layers of this cache hold different numbers of tokens, as after a pass or a crop that failed: read "
            "the prompt again"
        )


def fork(cache: Cache) -> DynamicCache:
    """A cache that goes on by itself from what `cache` holds; nothing is copied until the two diverge."""
    new: Any = DynamicCache()
    new.layer_class_to_replicate = None
    new.layers = [
        layer.fork() if isinstance(layer, (CompressedLayer, SelectedLayer)) else copy.copy(layer)
        for layer in cache.layers
    ]
    new.answered = getattr(cache, "answered", None)
    new.unread = getattr(cache, "unread", 0)
    return new


def release(cache: Cache) -> None:
    """Give back the blocks of a pool that `cache` holds."""
    for layer in cache.layers:
        for store in stores_of(layer):
            if isinstance(store, KVStore):
                store.free()


def stores_of(layer: Any) -> list[DynamicLayer]:
    """Where a compressed layer's entries lie: one store, or one of each class of heads."""
    if isinstance(layer, SelectedLayer):
        return [one.store for one in layer.classes]
    return [layer.store] if isinstance(layer, CompressedLayer) else []


def columns_of(layer: Any, heads: int) -> list[Tensor]:
    """Of every KV head of a cache layer (b or 1, entries): the column of each entry, `FILLER` where there is none.

    `heads`: of a layer whose heads all hold the same.
    """
    if isinstance(layer, SelectedLayer):
        return layer.head_columns()
    if isinstance(layer, CompressedLayer):
        return [layer.columns] * heads
    if not layer.is_initialized:
        return [torch.empty(1, 0, dtype=torch.long, device="cpu")] * heads
    end = layer.get_seq_length()  # dense; of a sliding window the last ones
    return [torch.arange(end - layer.keys.shape[-2], end, device=layer.keys.device)[None]] * heads


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
        # rows that have read nothing yet still hold what an earlier plugin left, or what was read without one
        like = max((part for part in parts if part.get_seq_length()), key=_unlike_dense)
        if isinstance(like, SelectedLayer):
            kept = [
                part if isinstance(part, SelectedLayer) else SelectedLayer.of(part, len(like.counts))
                for part in parts
            ]
            new: Any = SelectedLayer.stack(kept, [*map(len, rows)], tokens)
        elif isinstance(like, CompressedLayer):
            merged = [part if isinstance(part, CompressedLayer) else CompressedLayer(part) for part in parts]
            tensors = _tensors([part.store for part in merged], rows)
            store, placed = _stack_tensors(tensors, DynamicLayer()), []
            for part, (keys, _) in zip(merged, tensors, strict=True):
                own = part.columns if part.get_seq_length() else order.new_empty(1, 0)
                own = torch.where(own == FILLER, FILLER, own + tokens - part.get_seq_length())
                own = own.expand(len(keys), -1)
                placed.append(F.pad(own, (store.get_seq_length() - own.shape[1], 0), value=FILLER))
            if like.entries and isinstance(like.store, KVStore):
                store = like.store.like(*whole(store))
            columns = torch.cat(placed)
            new = CompressedLayer.holding(store, tokens, columns, bool((columns == FILLER).any()))
            new.recent = Recent.stack([part.recent for part in merged], [*map(len, rows)])
        elif isinstance(like, DynamicSlidingWindowLayer):
            new = _stack_tensors(_tensors(parts, rows), copy.copy(like))
            new.cumulative_length = tokens
        else:
            new = _stack_tensors(_tensors(parts, rows), DynamicLayer())
        new.batch_select_indices(order)
        stacked.append(new)
    return stacked


def _unlike_dense(layer: DynamicLayer) -> int:
    return 2 * isinstance(layer, SelectedLayer) + isinstance(layer, CompressedLayer)


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
