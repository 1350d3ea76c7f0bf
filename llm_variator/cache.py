"""The compressed KV cache: one layer class for transformers' `DynamicCache`.

A `CompressedLayer` holds *entries*, fewer than tokens. To transformers it reports the tokens it stands for
(so positions and masks of generated tokens come out right); in memory it has the entries alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from llm_variator.errors import VariatorError
from llm_variator.groups import FILLER, Grouping


class CompressedLayer(DynamicLayer):
    """Keys and values (b, kv_heads, entries, head_dim) that stand for `get_seq_length()` columns."""

    is_croppable = False

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0
        self.has_fillers = False
        self._columns: Tensor | None = (
            None  # of the prompt entries; the dense ones after them follow from `tokens`
        )

    @classmethod
    def from_dense(cls, layer: DynamicLayer) -> CompressedLayer:
        """Take over a stock layer (empty or not): one entry per column."""
        new = cls()
        if layer.keys is not None and layer.values is not None and layer.get_seq_length():
            new.update(layer.keys, layer.values)
        return new

    @property
    def entries(self) -> int:
        """Entries really held, fillers of shorter rows included."""
        return super().get_seq_length()

    @property
    def columns(self) -> Tensor:
        """(b or 1, entries) column of each entry in the whole sequence, `FILLER` where there is none."""
        assert self.keys is not None
        known = self._columns if self._columns is not None else self.keys.new_empty(1, 0, dtype=torch.long)
        rest = self.entries - known.shape[1]
        dense = torch.arange(self.tokens - rest, self.tokens, device=known.device)
        return torch.cat((known, dense.expand(len(known), -1)), dim=1)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append dense tokens."""
        self.tokens += key_states.shape[-2]
        return super().update(key_states, value_states)

    def append(self, keys: Tensor, values: Tensor, grouping: Grouping, width: int) -> tuple[Tensor, Tensor]:
        """Append the entries of a segment of `width` columns; returns all keys and values."""
        new = torch.where(grouping.columns == FILLER, FILLER, grouping.columns + self.tokens)
        if self.entries:
            old = self.columns
            rows = max(len(old), len(new))
            new = torch.cat((old.expand(rows, -1), new.expand(rows, -1)), dim=1)
        out = super().update(keys, values)
        self._columns = new
        self.tokens += width
        self.has_fillers |= grouping.has_fillers
        return out

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
        """Forget everything."""
        super().reset()
        self.tokens, self._columns, self.has_fillers = 0, None, False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows, for beam search."""
        self._rows(beam_idx)
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        if self._columns is not None and len(self._columns) > 1:
            self._columns = self._columns.repeat_interleave(repeats, dim=0)
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._rows(indices)
        super().batch_select_indices(indices)

    def _rows(self, indices: Tensor) -> None:
        if self._columns is not None and len(self._columns) > 1:
            self._columns = self._columns[indices.to(self._columns.device)]


def is_compressed(cache: Any) -> bool:
    """Whether some layer of `cache` holds fewer entries than tokens."""
    return isinstance(cache, DynamicCache) and any(
        isinstance(layer, CompressedLayer) and layer.entries != layer.tokens for layer in cache.layers
    )


def adopt(cache: Cache, layers: Iterable[int], num_layers: int) -> None:
    """Make `layers` of a dynamic `cache` compressible, in place; what it already holds stays as it is."""
    if not isinstance(cache, DynamicCache) or getattr(cache, "offloading", False):
        raise VariatorError(
            f"a plugin that compresses the KV cache needs transformers' DynamicCache, got {type(cache).__name__}"
            f"{' with offloading' if getattr(cache, 'offloading', False) else ''}; leave out past_key_values and "
            "cache_implementation"
        )
    while len(cache.layers) < num_layers:
        cache.layers.append(DynamicLayer())
    for index in layers:
        layer = cache.layers[index]
        assert isinstance(layer, DynamicLayer), "sliding and linear layers are never compressed"
        if not isinstance(layer, CompressedLayer):
            cache.layers[index] = CompressedLayer.from_dense(layer)


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """KV cache of one layer: entries (per row) and bytes (all rows), as held and as a dense cache would."""

    entries: int
    bytes: int
    dense_entries: int
    dense_bytes: int


@dataclasses.dataclass(frozen=True)
class KVCacheReport:
    """`VariatorModel.kv_cache_report()`: one `LayerReport` per decoder layer, and the sums."""

    layers: tuple[LayerReport, ...]

    @classmethod
    def of(cls, cache: Cache) -> KVCacheReport:
        """Measure the tensors that `cache` holds now."""
        layers = []
        for layer in cache.layers:
            assert isinstance(layer, CacheLayerMixin)
            tensors = [t for t in (layer.keys, layer.values) if t is not None and t.numel()]
            held = tensors[0].shape[-2] if tensors else 0
            size = sum(t.numel() * t.element_size() for t in tensors)
            dense = layer.tokens if isinstance(layer, CompressedLayer) else held
            layers.append(LayerReport(held, size, dense, size // held * dense if held else 0))
        return cls(tuple(layers))

    @property
    def bytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def dense_bytes(self) -> int:
        """Bytes that the base model alone would hold for the same tokens."""
        return sum(layer.dense_bytes for layer in self.layers)

    def __str__(self) -> str:
        ratio = self.bytes / self.dense_bytes if self.dense_bytes else 1.0
        lines = [
            f"KV cache {self.bytes:,} bytes, dense {self.dense_bytes:,} ({ratio:.1%})",
            "layer entries dense",
        ]
        lines += [f"{i:5} {layer.entries:7} {layer.dense_entries:5}" for i, layer in enumerate(self.layers)]
        return "\n".join(lines)
