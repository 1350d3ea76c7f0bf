"""One layer of the compressed KV cache, for transformers' `DynamicCache`.

A `CompressedLayer` holds *entries*, fewer than tokens. To transformers it reports the tokens it stands for
(so positions and masks of generated tokens come out right); in memory it has the entries alone. Where they lie
is the business of its *store*: any growing cache layer, transformers' own or one of `stores`.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from llm_variator.engine.cache.recent import Recent
from llm_variator.engine.cache.stores import SharedStore, fork_store, truncate, whole
from llm_variator.engine.groups import FILLER, Grouping
from llm_variator.errors import VariatorError


class CompressedLayer(DynamicLayer):
    """Keys and values (b, kv_heads, entries, head_dim) that stand for `get_seq_length()` columns."""

    def __init__(self, store: DynamicLayer | None = None) -> None:
        """`store` holds the entries; None: one tensor that grows by concatenation."""
        self.store = DynamicLayer() if store is None else store
        self.tokens = self.store.get_seq_length()
        self.has_fillers = False
        self.recent: Recent | None = None
        self.aged = 0
        """Entries that merging generated tokens has taken away."""
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
        self.aged += old - old // k

    def hide(self, mask: Tensor) -> None:
        """Make entries invisible whose token (rows, tokens) is not in `mask`; for tokens behind the end of a row."""
        columns = self.columns.expand(len(mask), -1)
        seen = mask.bool().to(columns.device).gather(1, columns.clamp(min=0))
        if bool((seen | (columns == FILLER)).all()):
            return
        self._columns = torch.where(seen, columns, FILLER)
        self.has_fillers |= bool((self._columns == FILLER).any())
        self.recent = None

    def get_seq_length(self) -> int:
        """Columns this layer stands for: what positions and 2D masks count."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of the mask transformers builds; compressed layers replace that mask by their own."""
        return self.tokens + query_length, 0

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether all entries are dense tokens."""
        return self._columns is None and self.recent is None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens of a dense layer. Else refused: a group cannot be cut."""
        if self.is_croppable and 0 <= -tokens_to_remove <= self.entries:
            truncate(self.store, self.entries + tokens_to_remove, "cropping")
            self.tokens += tokens_to_remove
            return
        raise VariatorError("a compressed KV cache cannot be cropped (assisted decoding is not supported)")

    def reset(self) -> None:
        """Forget everything; tensors that others share are left alone."""
        self.store = DynamicLayer()
        self.tokens, self._columns, self.has_fillers, self.recent, self.aged = 0, None, False, None, 0

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
            len(self.recent.hidden) > 1 or not isinstance(self.store, SharedStore)
        ):
            self.recent = self.recent.rows(lambda t: t[indices.to(t.device)])

    def fork(self) -> CompressedLayer:
        """A layer that goes on by itself from the same entries; storage is shared until the two diverge."""
        new = copy.copy(self)
        new.store = fork_store(self.store)
        return new
