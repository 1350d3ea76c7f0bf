"""One layer of a KV cache in which each head keeps keys and values of its own choice, for transformers' `DynamicCache`.

Heads that hold equally many entries form a *class*, whose entries are one plain tensor (b, heads, entries, head_dim)
in a store of any kind. Classes are split where a plugin gives their heads different ratios, and never joined again.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer, QuantizedLayer

from llm_variator.engine.blocks import Kept, Open, Region, entries, reduces
from llm_variator.engine.cache.layer import CompressedLayer
from llm_variator.engine.cache.stores import (
    KVStore,
    append,
    fork_store,
    of_heads,
    split,
    truncate,
    whole,
)
from llm_variator.engine.devices import behind, numbers
from llm_variator.engine.groups import FILLER
from llm_variator.engine.window import Rule, Window
from llm_variator.errors import VariatorError


class Entries(NamedTuple):
    """Keys and values (b, heads, m, d) of a class, and which of them are no fillers (b or 1, m); None: all."""

    keys: Tensor
    values: Tensor
    valid: Tensor | None


@dataclasses.dataclass(frozen=True)
class HeadClass:
    """Heads of one layer that hold equally many entries."""

    heads: tuple[int, ...]
    store: DynamicLayer
    columns: Tensor
    """(b or 1, heads, known) int32: the column in the whole sequence of the first entries, `FILLER` where there is
    none; the entries after them are dense tokens, up to the last."""
    k: int = 1
    """The ratio at which the newest prompt was reduced."""

    @property
    def entries(self) -> int:
        """Entries held in every row, fillers of shorter rows included."""
        return self.store.get_seq_length()

    def of(self, x: Tensor) -> Tensor:
        """(b, all heads, ...) -> (b, these heads, ...), a view where they are neighbours."""
        return of_heads(x, self.heads)

    def rows(self, change: Callable[[Tensor], Tensor]) -> HeadClass:
        """With rows picked or repeated in the columns; the store changes by itself."""
        return dataclasses.replace(
            self, columns=change(self.columns) if len(self.columns) > 1 else self.columns
        )


class SelectedLayer(DynamicLayer):
    """Keys and values of KV heads that stand for `get_seq_length()` columns."""

    is_croppable = True
    """As far as what came after the last prompt goes."""

    def __init__(self, heads: int) -> None:
        self.tokens = 0
        self.classes = [
            HeadClass(
                tuple(range(heads)), DynamicLayer(), torch.empty(1, heads, 0, dtype=torch.int32, device="cpu")
            )
        ]
        self.open: Open | None = None
        """Of prompts that are being read."""
        self.window: Window | None = None
        """The newest tokens, where they are reduced once they are old."""
        self.aged = (0,) * heads
        """Entries of every head that this has taken away."""
        self.has_fillers = False

    @classmethod
    def of(cls, layer: DynamicLayer, heads: int) -> SelectedLayer:
        """With what `layer`, dense or merged, holds."""
        new = cls(heads)
        if not layer.get_seq_length():
            new.classes = [dataclasses.replace(new.classes[0], store=getattr(layer, "store", layer))]
            return new
        store = layer.store if isinstance(layer, CompressedLayer) else layer
        columns = torch.empty(1, heads, 0, dtype=torch.int32, device=store.device)
        if isinstance(layer, CompressedLayer):
            columns = layer.columns.int()[:, None].expand(-1, heads, -1)
            new.has_fillers = layer.has_fillers
        new.tokens = layer.get_seq_length()
        new.classes = [HeadClass(new.classes[0].heads, store, columns)]
        return new

    @classmethod
    def holding(cls, classes: Sequence[HeadClass], tokens: int, has_fillers: bool) -> SelectedLayer:
        """A layer of `classes` that hold the entries of `tokens` columns.

        Raises:
            ValueError: their heads are not those of a layer, or their columns not those of their entries.
        """
        new = cls(sum(len(one.heads) for one in classes))
        if sorted(head for one in classes for head in one.heads) != list(range(len(new.counts))):
            raise ValueError("heads of classes")
        for one in classes:
            if one.columns.shape[1:] != (len(one.heads), one.entries) or not one.entries <= tokens:
                raise ValueError("columns of classes")
        new.classes, new.tokens, new.has_fillers = list(classes), tokens, has_fillers
        return new

    # --- what transformers asks

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Of the first class."""
        return self.classes[0].store.keys

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Of the first class."""
        return self.classes[0].store.values

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether there are keys yet."""
        return self.classes[0].store.is_initialized

    def get_seq_length(self) -> int:
        """Columns this layer stands for: what positions and 2D masks count."""
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of the mask transformers builds; this layer replaces that mask by its own."""
        return self.tokens + query_length, 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens; more than 0: all but the first so many.

        Raises:
            VariatorError: not all of them came after the last prompt; what a block has lost does not come back.
        """
        remove = max(0, self.tokens - tokens_to_remove) if tokens_to_remove > 0 else -tokens_to_remove
        if not remove:
            return
        after = min(one.entries - one.columns.shape[-1] for one in self.classes)
        if self.open is not None or remove > after:
            raise VariatorError(
                f"a compressed KV cache cannot be cropped into its prompt: {remove} tokens are to go, "
                f"{0 if self.open is not None else after} came after it; read the prompt again"
            )
        if self.window is not None and remove > min(self.window.lengths):
            raise VariatorError(
                f"a cache that reduces generated tokens (decode_block) cannot lose {remove} tokens here: they reach "
                "into its dense head or what was read before; read the prompt again"
            )
        for one in self.classes:
            truncate(one.store, one.entries - remove, "cropping")
        self.tokens -= remove
        if self.window is not None:
            self.window = self.window.without_newest([remove] * len(self.window.lengths))

    def offload(self) -> None:
        """Move the entries to the CPU."""
        for one in self.classes:
            one.store.offload()

    def prefetch(self) -> None:
        """Move them back to their device."""
        for one in self.classes:
            one.store.prefetch()

    def reset(self) -> None:
        """Forget everything."""
        self.__init__(len(self.counts))  # type: ignore[misc]

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Reorder the rows, for beam search."""
        for one in self.classes:
            if isinstance(one.store, QuantizedLayer) and not hasattr(one.store, "_pending_beam_idx"):
                raise VariatorError(
                    "this version of transformers does not reorder what its QuantizedCache has packed: leave out beams "
                    'or cache_implementation="quantized", or install a newer one'
                )
            one.store.reorder_cache(beam_idx)
        self._rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self._refuse_packed()
        for one in self.classes:
            one.store.batch_repeat_interleave(repeats)
        self.classes = [one.rows(lambda t: t.repeat_interleave(repeats, dim=0)) for one in self.classes]
        if self.open is not None:
            rows = range(len(self.open.places))
            self.open = self.open.rows([row for row in rows for _ in range(repeats)])
        if self.window is not None:
            rows = range(len(self.window.lengths))
            self.window = self.window.rows([row for row in rows for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self._refuse_packed()
        for one in self.classes:
            one.store.batch_select_indices(indices)
        self._rows(indices)

    def _refuse_packed(self) -> None:
        if any(isinstance(one.store, QuantizedLayer) for one in self.classes):
            raise VariatorError(
                "transformers' QuantizedCache cannot pick or repeat the rows that it has packed: leave it out, or "
                "quantise a context (CompressedContext.quantised)"
            )

    def _rows(self, indices: Tensor) -> None:
        self.classes = [one.rows(lambda t: t[indices.to(t.device)]) for one in self.classes]
        if self.open is not None:
            self.open = self.open.rows(indices.tolist())
        if self.window is not None:
            self.window = self.window.picked(indices)

    # --- what it holds

    @property
    def counts(self) -> tuple[int, ...]:
        """Entries of every head, fillers of shorter rows included."""
        counts = {head: one.entries for one in self.classes for head in one.heads}
        return tuple(counts[head] for head in sorted(counts))

    @property
    def entries(self) -> float:
        """The mean of `counts`."""
        total, heads = sum(self.counts), len(self.counts)
        return total // heads if total % heads == 0 else total / heads

    def columns(self, one: HeadClass) -> Tensor:
        """(b or 1, heads, entries) int32: the column of every entry of a class, `FILLER` where there is none."""
        rest = one.entries - one.columns.shape[-1]
        dense = torch.arange(self.tokens - rest, self.tokens, dtype=torch.int32, device=one.columns.device)
        return torch.cat((one.columns, dense.expand(*one.columns.shape[:2], -1)), dim=-1)

    def head_columns(self) -> list[Tensor]:
        """Of every head (b or 1, entries) int32: the column of each of its entries, `FILLER` where there is none."""
        of = {
            head: columns
            for one in self.classes
            for head, columns in zip(one.heads, self.columns(one).unbind(1), strict=True)
        }
        return [of[head] for head in sorted(of)]

    def held(self, one: HeadClass, rows: int = -1) -> Entries:
        """Keys and values of a class, those that all rows share expanded to so many; -1: as they are."""
        valid = None
        if self.has_fillers:
            valid = self.columns(one)[:, 0] != FILLER
        keys, values = (t.expand(rows, -1, -1, -1) for t in whole(one.store))
        return Entries(keys, values, valid)

    def all_held(self, rows: int = -1) -> list[Entries | None]:
        """Of every class; None where there is nothing yet."""
        return [self.held(one, rows) if one.entries else None for one in self.classes]

    # --- changes

    def refine(self, ratios: Sequence[int]) -> None:
        """Split classes until all heads of each have the same of the `ratios`, one per head."""
        for place, one in reversed([*enumerate(self.classes)]):
            kinds = sorted({ratios[head] for head in one.heads})
            new = [dataclasses.replace(one, k=kinds[0])]
            if len(kinds) > 1:
                parts = [[i for i, head in enumerate(one.heads) if ratios[head] == k] for k in kinds]
                new = [
                    HeadClass(tuple(one.heads[i] for i in places), store, one.columns[:, places], k)
                    for places, store, k in zip(parts, split(one.store, parts), kinds, strict=True)
                ]
            # at once, so that whoever gives back what a failed pass holds finds all stores
            self.classes = [*self.classes[:place], *new, *self.classes[place + 1 :]]

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        take: Callable[[Tensor, Tensor], None] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Have `take` store keys and values (b, heads, n, d); returns them, not what was there before.

        Raises:
            VariatorError: without `take`: a model's own code cannot attend to heads of unlike lengths.
        """
        if take is None:
            raise VariatorError(
                "this cache holds keys and values that a plugin kept, other ones for every head: only the wrapped "
                "model reads it; read the prompt again"
            )
        take(key_states, value_states)
        return key_states, value_states

    def add(
        self, keys: Tensor, values: Tensor, columns: Tensor | None = None, width: int | None = None
    ) -> None:
        """Append the same entries (b, heads, n, d) to every head.

        Args:
            keys: like `values`.
            values: of the entries.
            columns: (b or 1, n) where they stand among `width` new columns, `FILLER` where they are none; None: they
                are n dense tokens.
            width: new columns.
        """
        placed = None if columns is None else torch.where(columns == FILLER, FILLER, columns + self.tokens)
        changed = []
        for one in self.classes:
            if one.columns.device != keys.device:  # of a layer that was made before its first keys
                one = dataclasses.replace(one, columns=one.columns.to(keys.device))
            if placed is not None:
                own = placed[:, None].expand(-1, len(one.heads), -1)
                one = dataclasses.replace(one, columns=_joined(self.columns(one), own))
            append(one.store, one.of(keys), one.of(values))
            changed.append(one)
        self.classes = changed
        self.tokens += keys.shape[2] if width is None else width
        if columns is not None and not self.has_fillers:
            self.has_fillers = bool((columns == FILLER).any())

    def newest(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the last `count` entries of all heads (b, heads, count, d)."""
        order = tuple(head for one in self.classes for head in one.heads)
        pairs = [whole(one.store) for one in self.classes]
        keys, values = (
            torch.cat([pair[side][:, :, pair[side].shape[2] - count :] for pair in pairs], dim=1)
            for side in (0, 1)
        )
        back = behind(order, keys.device)
        return keys.index_select(1, back), values.index_select(1, back)

    def replace(self, old: int, keys: Tensor, values: Tensor, columns: Tensor, kept: Sequence[Kept]) -> None:
        """Put what every class keeps of a region (b, heads, T, d) in place of its last `old` entries.

        `columns` (b or 1, T) of the region in the whole sequence, which may be longer from now on.
        """
        changed = []
        for one, own in zip(self.classes, kept, strict=True):
            first = one.entries - old
            before = self.columns(one)[..., :first]
            if old:
                truncate(one.store, first, 'prefill_chunk_size with compressor "select"')
            append(one.store, own.take(one.of(keys)), own.take(one.of(values)))
            placed = _joined(before, own.place(columns[:, None]))
            changed.append(dataclasses.replace(one, columns=placed))
            self.has_fillers |= own.valid is not None
        self.classes = changed

    def remember(self, rule: Rule | None, scores: Tensor | None) -> None:
        """Go on with the window if it ages by this `rule`, else with a new one, for `scores` like these, or none."""
        if rule is None or scores is None:
            self.window = None
        elif self.window is None or self.window.rule != rule:
            self.window = Window.opened(rule, scores, self.tokens)

    def age(self, old: Sequence[int]) -> None:
        """Reduce the oldest tokens of the window, so many in every row."""
        if self.window is None or not any(old):
            return
        window, order, changed, fillers = self.window, self.window.order(old), [], False
        taken = list(self.aged)
        for one in self.classes:
            # entries from before the window stay where they are, for others may share them
            valid, size = self.held(one).valid, one.entries
            first = size - max(0, *window.lengths)
            if valid is not None:
                newer = valid.flip(-1).cumsum(-1).flip(-1)
                outside = newer > numbers(window.lengths, newer.device)[:, None]
                first = int(outside.sum(-1).min())
            keep = window.keep(one.of(order), old, one.k, valid, size)[..., first:]
            counts = [size - first] if valid is None else valid[:, first:].sum(-1).tolist()
            counts = counts * (len(old) // len(counts))
            counts = [n - m for n, m in zip(counts, window.removed(old, one.k), strict=True)]
            changed.append(self._with(one, keep, counts, first, "decode_block"))
            fillers |= len(set(counts)) > 1
            if valid is not None and not fillers:  # without, none of its columns is a filler
                fillers = bool((changed[-1].columns[:, :, :first] == FILLER).any())
            for head in one.heads:
                taken[head] += size - changed[-1].entries
        self.classes, self.has_fillers, self.aged = changed, fillers, tuple(taken)
        self.window = window.without_oldest(old)

    def _with(self, one: HeadClass, keep: Tensor, counts: list[int], first: int, what: str) -> HeadClass:
        """A class that holds of its entries from `first` on some: `keep` (b, heads, m) bool, so many in every row."""
        kept, columns = Kept.of(keep, counts), self.columns(one)
        pair = [kept.take(t[:, :, first:]) for t in whole(one.store)]
        truncate(one.store, first, what)
        append(one.store, *pair)
        placed = _joined(columns[..., :first], kept.place(columns[..., first:]))
        return dataclasses.replace(one, columns=placed)

    def end_prompts(self, newest: Tensor | None = None) -> list[Tensor]:
        """Reduce prompts whose last token was the newest; per class (b, heads, entries) bool: what it saw of them.

        `newest` (b, KV heads, 1): that token's scores, for the window that opens.
        """
        assert self.open is not None
        region = Region(
            self.open.places, [1] * len(self.open.places), self.open.block, self.open.scores.device
        )
        size, lengths = region.tokens, numbers(region.lengths, region.device)
        column = torch.arange(size, device=region.device)
        aligned = (column + (size - lengths)[:, None]).clamp(max=size - 1)[
            :, None
        ]  # rows end together in the cache
        scores = F.pad(self.open.scores, (size - 1 - self.open.scores.shape[-1], 1))
        if newest is not None:
            scores[..., -1:] = newest
        scores = scores.gather(-1, aligned.expand(-1, scores.shape[1], -1))
        order, changed, seen = region.order(scores), [], []
        for one in self.classes:
            # entries from before these prompts stay where they are, for others may share them
            own_entries = 1 + max(entries(place, one.k, region.block) for place in self.open.places)
            first = one.entries - own_entries
            entry = torch.arange(one.entries, device=region.device) - (one.entries - lengths)[:, None, None]
            inside = entry.clamp(min=0).expand(-1, len(one.heads), -1)
            own = one.of(order)
            seen.append(region.seen_by_last(own, one.k).gather(-1, inside) | (entry < 0))
            keep = (region.keep(one.of(scores), own, one.k).gather(-1, inside) | (entry < 0))[..., first:]
            counts = [
                count + own_entries - n for count, n in zip(region.counts(one.k), region.lengths, strict=True)
            ]
            if (valid := self.held(one).valid) is not None:
                keep = keep & valid[:, None, first:]
                counts = keep[:, 0].sum(-1).tolist()
            changed.append(
                self._with(one, keep, counts, first, 'prefill_chunk_size with compressor "select"')
            )
            self.has_fillers |= min(counts) < max(counts)
        if self.window is not None:
            ended = [reduces(place, self.open.block, 1) for place in self.open.places]
            self.window = self.window.reopened(ended, scores, region.lengths, self.open.places[0].tail)
        self.classes, self.open = changed, None
        return seen

    def hide(self, mask: Tensor) -> None:
        """Make entries invisible whose token (rows, tokens) is not in `mask`; for tokens behind the end of a row."""
        changed, same = [], True
        for one in self.classes:
            columns = self.columns(one).expand(len(mask), -1, -1)
            known = mask.bool().to(columns.device)[:, None].expand(-1, columns.shape[1], -1)
            seen = known.gather(-1, columns.long().clamp(min=0))
            if bool((seen != seen[:, :1]).any()):
                raise VariatorError(
                    "attention_mask hides tokens of which heads have kept different ones (of a prompt, or generated "
                    "behind a row's end and reduced by decode_block): read the prompt with that mask, or answer such "
                    "rows one by one"
                )
            changed.append(dataclasses.replace(one, columns=columns.masked_fill(~seen, FILLER)))
            same = same and torch.equal(changed[-1].columns, columns)
        if same:
            return
        if self.window is not None:
            behind = mask[:, : self.tokens].bool().flip(-1).cumsum(-1) == 0
            self.window = self.window.without_newest(behind.sum(-1).tolist())
        self.has_fillers |= any(bool((one.columns == FILLER).any()) for one in changed)
        self.classes = changed

    def fork(self) -> SelectedLayer:
        """A layer that goes on by itself from the same entries; storage is shared until the two diverge."""
        new = copy.copy(self)
        new.classes = [dataclasses.replace(one, store=fork_store(one.store)) for one in self.classes]
        return new

    @classmethod
    def stack(cls, parts: Sequence[SelectedLayer], rows: Sequence[int], tokens: int) -> SelectedLayer:
        """Those of several batches, of so many `rows`, as one batch; entries are right-aligned. `parts` are used up.

        `tokens`: columns of the longest.
        """
        _split_alike([part for part in parts if part.tokens])
        like = next(part for part in parts if part.tokens)
        new = cls(len(like.counts))
        new.tokens, new.has_fillers, new.classes = tokens, False, []
        for number, one in enumerate(like.classes):
            size = max(part.classes[number].entries for part in parts if part.tokens)
            keys, values, columns = [], [], []
            for part, count in zip(parts, rows, strict=True):
                if not part.tokens:
                    empty = whole(one.store)[0][:1, :, :0].expand(count, -1, -1, -1)
                    pair, own = (empty, empty), one.columns.new_empty(count, len(one.heads), 0)
                else:
                    own = part.columns(part.classes[number]).expand(count, -1, -1)
                    own = torch.where(own == FILLER, FILLER, own + (tokens - part.tokens))
                    pair = whole(part.classes[number].store)
                missing = size - own.shape[-1]
                keys.append(F.pad(pair[0].expand(count, -1, -1, -1), (0, 0, missing, 0)))
                values.append(F.pad(pair[1].expand(count, -1, -1, -1), (0, 0, missing, 0)))
                columns.append(F.pad(own, (missing, 0), value=FILLER))
            store: DynamicLayer = DynamicLayer()
            if isinstance(one.store, KVStore):
                store = one.store.like(torch.cat(keys), torch.cat(values))
            else:
                store.update(torch.cat(keys), torch.cat(values))
            placed = torch.cat(columns).int()
            new.has_fillers |= bool((placed == FILLER).any())
            new.classes.append(dataclasses.replace(one, store=store, columns=placed))
        new.open = Open.stack([part.open for part in parts], rows)
        new.window = Window.stack([part.window for part in parts], rows, [part.tokens for part in parts])
        return new


def _split_alike(parts: Sequence[SelectedLayer]) -> None:
    """Give all the same classes in the same order: split as far as any of them is."""
    whose = [{head: i for i, one in enumerate(part.classes) for head in one.heads} for part in parts]
    kinds = [tuple(own[head] for own in whose) for head in range(len(whose[0]))]
    places = [list(dict.fromkeys(kinds)).index(kind) for kind in kinds]
    for part in parts:
        ratios = {head: one.k for one in part.classes for head in one.heads}
        part.refine(places)
        part.classes = [
            dataclasses.replace(one, k=ratios[one.heads[0]])
            for one in sorted(part.classes, key=lambda one: places[one.heads[0]])
        ]


def _joined(before: Tensor, after: Tensor) -> Tensor:
    rows = max(len(before), len(after))
    before = before.to(after.device).expand(rows, -1, -1)
    return torch.cat((before, after.int().expand(rows, -1, -1)), dim=-1)
