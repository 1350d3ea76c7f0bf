"""What a cache holds, layer by layer, beside what a dense one would: `VariatorModel.kv_cache_report()`."""

from __future__ import annotations

import dataclasses

from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, QuantizedLayer

from llm_variator.engine.cache.layer import CompressedLayer
from llm_variator.engine.cache.lifecycle import stores_of
from llm_variator.engine.cache.paging import PagedStore, PoolReport
from llm_variator.engine.cache.selected import SelectedLayer
from llm_variator.engine.cache.stores import sizes


@dataclasses.dataclass(frozen=True)
class ClassReport:
    """Heads of one layer that keep equally many entries."""

    ratio: int
    """At which they reduced the newest prompt."""
    heads: int
    """How many."""
    entries: int
    """Of each head, per row."""
    bytes: int
    """Of all heads and rows."""


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """KV cache of one layer: entries (per row) and bytes (all rows), as held and as a dense cache would."""

    entries: float
    """Of each head; their mean where heads keep tokens of their own choice."""
    bytes: int
    dense_entries: int
    dense_bytes: int
    shared_bytes: int = 0
    """Of `bytes`, those that lie in tensors or blocks which other caches may use too."""
    classes: tuple[ClassReport, ...] = ()
    """Where heads keep tokens of their own choice."""
    index_bytes: int = 0
    """Beside `bytes`: which tokens those are, and the scores of those that are to age."""

    @classmethod
    def of_selected(cls, layer: SelectedLayer) -> LayerReport:
        """Measure what a layer of kept keys and values holds."""
        classes, dense, shared, index = [], 0, 0, 0
        for one in layer.classes:
            held, own_shared, column = sizes(one.store)
            dense += column * layer.tokens
            shared += own_shared
            index += one.columns.nbytes
            classes.append(ClassReport(one.k, len(one.heads), one.entries, held))
        index += layer.window.scores.nbytes if layer.window is not None else 0
        total = sum(one.bytes for one in classes)
        return cls(layer.entries, total, layer.tokens, dense, shared, tuple(classes), index)


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
            for store in stores_of(layer):
                if isinstance(store, PagedStore):
                    pool = store.pool.report()
            assert isinstance(layer, CacheLayerMixin)
            if not layer.is_initialized:
                layers.append(LayerReport(0, 0, 0, 0))
            elif isinstance(layer, SelectedLayer):
                layers.append(LayerReport.of_selected(layer))
            elif isinstance(layer, CompressedLayer):
                held, shared, column = sizes(layer.store)
                held += layer.recent.nbytes if layer.recent is not None else 0
                layers.append(LayerReport(layer.entries, held, layer.tokens, layer.tokens * column, shared))
            elif isinstance(layer, QuantizedLayer):
                tokens, (size, _, column) = layer.get_seq_length(), sizes(layer)
                layers.append(LayerReport(tokens, size, tokens, tokens * column))
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
        lines += [
            f"{i:5} {layer.entries:7.6g} {layer.dense_entries:5}" for i, layer in enumerate(self.layers)
        ]
        if self.pool is not None:
            lines.insert(1, str(self.pool))
        return "\n".join(lines)
