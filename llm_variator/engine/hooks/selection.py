"""Site "kv" where keys and values are kept ("select"): one layer's attention, and what its cache then holds.

The model's own code computes queries, keys and values of all tokens. Its call of the cache hands them to a
`SelectCall`, which stores what is kept of them; then the attention function has it attend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_variator.engine.blocks import Kept, Place, Region, Rows, reduces
from llm_variator.engine.cache import SelectedLayer
from llm_variator.engine.cache.selected import Entries
from llm_variator.engine.devices import behind
from llm_variator.engine.hooks.gates import Gates
from llm_variator.engine.hooks.last_layer import at_the_end
from llm_variator.engine.hooks.strips import View, attend, attend_region
from llm_variator.engine.plugin import SelectLayers
from llm_variator.engine.session import Pass, broken
from llm_variator.errors import VariatorError


class _Piece(NamedTuple):
    """Tokens `start` to `end` behind the prompts of a pass, between which nothing is reduced."""

    start: int
    end: int
    held: list[Entries | None]
    """Of every class, up to the last of them."""


class SelectCall:
    """One layer's attention in a pass with a plugin that selects; stands in for the cache inside the layer."""

    def __init__(
        self, site: SelectLayers, now: Pass, held: SelectedLayer | None, cache: Any, hidden: Tensor
    ) -> None:
        """`held` None: nothing is cached. `hidden` (b, n, d) is what the attention reads."""
        self.site, self.now, self.cache = site, now, cache
        self.stored = held is not None
        self.held = SelectedLayer(len(site.ratios)) if held is None else held
        self.past = self.held.tokens
        self.rule = now.rule(site)
        """How the tokens behind a prompt age; None: they stay dense."""
        scored = now.rows is not None or self.rule is not None
        self.scores = site.score(hidden.detach()) if scored else None
        """(b, H, n); None where nothing is chosen of these tokens. Here H are all KV heads."""
        self.gates: Gates | None = None
        """While scores are trained."""
        self.updated = False
        self.attended = False
        self._attend: Callable[[Tensor, float], Tensor]

    def get_seq_length(self, layer: int) -> int:
        """Columns before this pass."""
        return self.past

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store what is kept of keys and values (b, H, n, d); returns all of them."""
        self.updated = True

        def take(key: Tensor, value: Tensor) -> None:
            self.held.refine(self.site.ratios)
            self.held.remember(self.rule, self.scores)
            (self._take_token if self.now.rows is None else self._take_prompt)(key, value)

        if self.stored:  # an offloaded cache has the layer's entries at hand only while it is updated
            self.cache.update(key, value, layer, take=take)
        else:
            take(key, value)
        return key, value

    def attend(self, query: Tensor, scale: float) -> Tensor:
        """(b, query heads, n, d) -> the same, of all columns or of the last."""
        self.attended = True
        return self._attend(query, scale)

    def prove(self, layer: int) -> None:
        """When the layer's attention has ended: raise unless the model's code used what this stands for."""
        if not self.updated:
            raise broken(f"the attention of layer {layer} did not hand its keys and values to its cache")
        if not self.attended:
            raise broken(f"layer {layer} attended without the library's attention function")

    # --- prompts, and what comes after them in the same pass

    def _take_prompt(self, key: Tensor, value: Tensor) -> None:
        held, rows, region = self.held, self.now.rows, self.now.region(self.site.block)
        assert rows is not None
        assert self.scores is not None
        self._close_window()
        keys, values = rows.prompt(key), rows.prompt(value)
        scores = rows.prompt(self.scores.unsqueeze(-1)).squeeze(-1)
        columns = self.past + rows.prompt_columns
        if old := region.pending:
            assert held.open is not None
            keys, values = (
                torch.cat(pair, dim=2) for pair in zip(held.newest(old), (keys, values), strict=True)
            )
            scores = torch.cat((held.open.scores, scores), dim=-1)
            first = torch.arange(self.past - old, self.past, device=key.device).expand(len(columns), -1)
            columns = torch.cat((first, columns), dim=1)
        order = region.order(scores)
        if scores.requires_grad and not self.past and region.holds_whole_prompts:
            self.gates = Gates(scores, order, region, rows, held.classes)
        before = [_without_last(own, old) for own in held.all_held(len(key))]
        kept = [
            Kept.of(region.keep(one.of(scores), one.of(order), one.k), region.counts(one.k))
            for one in held.classes
        ]
        held.replace(old, keys, values, columns, kept)
        held.open = region.after(scores)
        if held.window is not None:
            held.window = held.window.reopened(
                [place.left == new > 0 for place, new in self._prompts()],
                scores,
                region.lengths,
                region.places[0].tail,
            )
        held.tokens += rows.prompts[0] if rows.uniform else 0
        after = self._take_rest(rows, rows.rest(key), rows.rest(value))
        self._attend = partial(self._attend_prompt, keys, values, order, before, after)
        if self.gates is not None:
            if len(after) > 1:
                raise VariatorError(
                    "scores get no gradient from tokens that age behind a prompt: train without decode_block, and "
                    "give it when the plugin is loaded"
                )
            keys, values = (torch.cat((x, rows.rest(y)), dim=2) for x, y in ((keys, key), (values, value)))
            self._attend = partial(self._attend_gated, self.gates, keys, values, self._attend)

    def _prompts(self) -> list[tuple[Place, int]]:
        """Of every row the place of this pass in its prompt, and the tokens of it."""
        rows, places = self.now.rows, self.now.places
        assert rows is not None
        assert places is not None
        assert self.scores is not None
        pairs = list(zip(places, rows.prompts, strict=True))
        return pairs if len(pairs) > 1 else pairs * len(self.scores)

    def _close_window(self) -> None:
        """In rows whose prompt begins, and will be reduced."""
        held = self.held
        if held.window is None:
            return
        begins = [new > 0 and not place.done for place, new in self._prompts()]
        lengths = held.window.lengths
        held.age([max(0, n) if own else 0 for n, own in zip(lengths, begins, strict=True)])
        held.window = held.window.closed(begins)

    def _take_rest(self, rows: Rows, keys: Tensor, values: Tensor) -> list[_Piece]:
        """Store what comes behind the prompts, (b, H, C, d), in pieces between which old tokens are reduced."""
        held, count = self.held, keys.shape[2]
        if not count:
            if not rows.uniform:
                held.tokens += rows.width
            return []
        assert self.scores is not None
        scores = rows.rest(self.scores.unsqueeze(-1)).squeeze(-1)
        reads = rows.rests if len(rows.rests) == len(keys) else rows.rests * len(keys)
        cuts = {} if held.window is None else held.window.cuts(reads)
        starts, pieces = sorted({0, *cuts}), []
        for start, end in zip(starts, [*starts[1:], count], strict=True):
            held.age(cuts.get(start, ()))
            own = slice(start, end)
            if rows.uniform:
                held.add(keys[:, :, own], values[:, :, own])
            else:
                width = (
                    rows.width if end == count else 0
                )  # columns are counted from the beginning of the pass
                columns = rows.rest_columns[:, own]
                held.add(keys[:, :, own], values[:, :, own], columns, width)
            if held.window is not None:
                new = [min(max(0, read - start), end - start) for read in reads]
                held.window = held.window.appended(scores[..., own], new)
            pieces.append(_Piece(start, end, held.all_held()))
        return pieces

    def _attend_prompt(
        self,
        keys: Tensor,
        values: Tensor,
        order: Tensor,
        before: list[Entries | None],
        after: list[_Piece],
        query: Tensor,
        scale: float,
    ) -> Tensor:
        rows, region, wanted = self.now.rows, self.now.region(self.site.block), query.shape[2]
        assert rows is not None
        if rows.uniform:
            rest = min(wanted, rows.rest_columns.shape[1])
            first, last = query[:, :, : wanted - rest], query[:, :, wanted - rest :]
        else:  # rows may end in different columns
            whole = at_the_end(query.transpose(1, 2), rows.width).transpose(1, 2)
            first, last = rows.prompt(whole), rows.rest(whole)

        def go_on(number: int, own: Tensor, piece: _Piece) -> Tensor:
            held = piece.held[number]
            assert held is not None
            return attend(own, held, scale)

        if first.shape[2]:
            views = [
                View(one, one.of(order), held) for one, held in zip(self.held.classes, before, strict=True)
            ]
            grouped = first.unflatten(1, (keys.shape[1], -1))
            out = self._read(grouped, keys, values, views, region, scale).flatten(1, 2)
        else:
            out = first
        missing = rows.rest_columns.shape[1] - last.shape[2]  # queries that nobody reads
        parts = [
            self._by_class(last[:, :, max(0, piece.start - missing) : end], partial(go_on, piece=piece))
            for piece in after
            if (end := piece.end - missing) > 0
        ]
        out = rows.joined(out, torch.cat(parts, dim=2) if parts else last)
        return out[:, :, out.shape[2] - wanted :]

    def _read(
        self, query: Tensor, keys: Tensor, values: Tensor, views: list[View], region: Region, scale: float
    ) -> Tensor:
        """(b, KV heads, g, Q, d): of the prompt's queries."""
        rows, width = self.now.rows, query.shape[3]
        assert rows is not None
        if rows.uniform or region.tails_are_near:
            return attend_region(query, keys, values, views, region, scale)
        outputs = []
        for row, (single, n) in enumerate(zip(region.singles(), region.lengths, strict=True)):
            own, blocks = slice(row, row + 1), max(0, n - region.lead) // region.block
            parts = query[own, :, :, :n], keys[own, :, :n], values[own, :, :n]
            out = parts[0]
            if n:
                out = attend_region(*parts, [view.row(row, blocks) for view in views], single, scale)
            outputs.append(F.pad(out, (0, 0, 0, width - n)))
        return torch.cat(outputs)

    def _attend_gated(
        self,
        gates: Gates,
        keys: Tensor,
        values: Tensor,
        attend: Callable[[Tensor, float], Tensor],
        query: Tensor,
        scale: float,
    ) -> Tensor:
        """The same outputs, from which scores get a gradient; keys and values of prompt and rest."""
        rows, out = self.now.rows, attend(query, scale)
        assert rows is not None
        first = gates.reading(rows.prompt(out), rows.prompt(query), keys, values, scale)
        rest = gates.following(rows.rest(out), rows.rest(query), keys, values, scale)
        return rows.joined(first, rest)

    # --- single tokens

    def _take_token(self, key: Tensor, value: Tensor) -> None:
        held, ends = self.held, self.now.ends_prompts and self.held.open is not None
        if held.window is not None:
            assert self.scores is not None
            reads = [1] * len(key)
            if ends and held.open is not None:
                reads = [int(not reduces(place, held.open.block, 1)) for place in held.open.places]
            held.age(held.window.cuts(reads).get(0, ()))
            held.window = held.window.appended(self.scores, reads)
        held.add(key, value)
        found = held.all_held()
        seen: list[Tensor | None] = [None] * len(found)
        if ends:
            seen = list(held.end_prompts(self.scores))

        def step(number: int, own: Tensor, scale: float) -> Tensor:
            entries = found[number]
            assert entries is not None
            return attend(own, entries, scale, seen[number])

        self._attend = lambda query, scale: self._by_class(query, partial(step, scale=scale))

    def _by_class(self, query: Tensor, attend_one: Callable[[int, Tensor], Tensor]) -> Tensor:
        """(b, query heads, n, d), computed class by class: its number, (b, heads, g, n, d) -> the same."""
        return by_class(query, self.held, attend_one)


def by_class(query: Tensor, held: SelectedLayer, attend_one: Callable[[int, Tensor], Tensor]) -> Tensor:
    """(b, query heads, n, d) attend class by class: number of the class, (b, heads, g, n, d) -> the same."""
    grouped = query.unflatten(1, (len(held.counts), -1))
    outputs = [attend_one(number, one.of(grouped)) for number, one in enumerate(held.classes)]
    if len(outputs) == 1:
        return outputs[0].flatten(1, 2)
    order = tuple(head for one in held.classes for head in one.heads)
    out = torch.cat(outputs, dim=1)
    if list(order) != sorted(order):
        out = out.index_select(1, behind(order, out.device))
    return out.flatten(1, 2)


def _without_last(held: Entries | None, count: int) -> Entries | None:
    if held is None or not count:
        return held
    end = held.keys.shape[2] - count
    valid = None if held.valid is None else held.valid[:, :end]
    return Entries(held.keys[:, :, :end], held.values[:, :, :end], valid) if end else None
