"""Which tokens of a prompt are merged: the token algebra. Knows tensors and indices, no model and no weights.

A prompt segment of n tokens splits into `head` dense tokens, G groups of k neighbours and a dense tail:
G = max(0, (n - head - tail) // k), and what does not fill a group joins the tail. Dense tokens and merged
groups are *entries*, in order, m = n - G*k + G of them. An entry stands at the column of its last token.

A `Grouping` carries one ratio's split of a whole batch: `Slices` when all rows look the same (views, no
index), `Indices` when rows differ in length or padding (rows right-aligned among the entries).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

Merge = Callable[[Tensor], Tensor]  # (..., k, d) -> (..., d)
Restore = Callable[[Tensor, Tensor], Tensor]  # (..., d), (..., k, d) -> (..., k, d)

FILLER = -1  # column of an entry that stands for no token


class Split(NamedTuple):
    """Sizes of the three parts of one prompt: `head + groups * k + tail` tokens."""

    head: int
    groups: int
    tail: int

    @property
    def entries(self) -> int:
        """Number of vectors that remain."""
        return self.head + self.groups + self.tail


def split(n: int, k: int, head: int, tail: int) -> Split:
    """Split a prompt of `n` tokens; a prompt too short for one group stays dense."""
    groups = max(0, (n - head - tail) // k)
    if groups == 0:
        return Split(0, 0, n)
    return Split(head, groups, n - head - groups * k)


class Grouping(Protocol):
    """How the n columns of a batch become m entries and come back. All shapes: b rows, hidden width d."""

    @property
    def columns(self) -> Tensor:
        """(b or 1, m) column of every entry, `FILLER` where a row has fewer entries."""

    @property
    def reach(self) -> Tensor:
        """(b or 1, n) last column that the token in a column may see: the end of its own group."""

    @property
    def has_groups(self) -> bool:
        """Whether anything is merged."""

    @property
    def has_fillers(self) -> bool:
        """Whether some row has fewer entries than another."""

    def compress(self, x: Tensor, merge: Merge) -> Tensor:
        """(b, n, d) -> (b, m, d): dense vectors as they are, groups merged."""

    def restore(self, entries: Tensor, x: Tensor, restore: Restore) -> Tensor:
        """(b, m, d), (b, n, d) -> (b, n, d): inverse of `compress` for the outputs of the frozen layer."""

    def place(self, entries: Tensor) -> Tensor:
        """(b, m, d) -> (b, n, d): every entry at its column; the other columns hold anything finite."""

    def take(self, x: Tensor, dim: int) -> Tensor:
        """Keep the entries' columns of a tensor whose dimension `dim` has n columns and dimension 0 b rows."""


@dataclasses.dataclass(frozen=True)
class Slices:
    """Every row is [head][groups][tail], without padding; `tail` includes any dense continuation."""

    k: int
    split: Split
    device: torch.device
    has_fillers = False

    @property
    def has_groups(self) -> bool:
        return self.split.groups > 0

    @cached_property
    def columns(self) -> Tensor:
        head, groups, tail = self.split
        start = head + groups * self.k
        first, last = torch.arange(head, device=self.device), torch.arange(tail, device=self.device) + start
        return torch.cat((first, torch.arange(1, groups + 1, device=self.device) * self.k + head - 1, last))[
            None
        ]

    @cached_property
    def reach(self) -> Tensor:
        head, groups, tail = self.split
        reach = torch.arange(head + groups * self.k + tail, device=self.device)
        inside = reach[head : head + groups * self.k]
        inside += (self.k - 1) - (inside - head) % self.k
        return reach[None]

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head, groups, tail = self.split
        first, inner, last = x.split((head, groups * self.k, tail), dim=1)
        return first, inner.unflatten(1, (groups, self.k)), last

    def compress(self, x: Tensor, merge: Merge) -> Tensor:
        if not self.has_groups:
            return x
        first, inner, last = self._parts(x)
        return torch.cat((first, merge(inner), last), dim=1)

    def restore(self, entries: Tensor, x: Tensor, restore: Restore) -> Tensor:
        if not self.has_groups:
            return entries
        first, merged, last = entries.split(tuple(self.split), dim=1)
        return torch.cat((first, restore(merged, self._parts(x)[1]).flatten(1, 2), last), dim=1)

    def place(self, entries: Tensor) -> Tensor:
        if not self.has_groups:
            return entries
        first, merged, last = entries.split(tuple(self.split), dim=1)
        return torch.cat((first, merged.repeat_interleave(self.k, dim=1), last), dim=1)

    def take(self, x: Tensor, dim: int) -> Tensor:
        if not self.has_groups:
            return x
        head, groups, tail = self.split
        start = head + groups * self.k
        inner = (
            x.narrow(dim, head, groups * self.k).unflatten(dim, (groups, self.k)).select(dim + 1, self.k - 1)
        )
        return torch.cat((x.narrow(dim, 0, head), inner, x.narrow(dim, start, tail)), dim=dim)


class Indices:
    """Rows of different length: flat indices into the b*n columns and the b*m entries."""

    def __init__(self, valid: Tensor, prompts: list[int], k: int, head: int, tail: int) -> None:
        """`valid` (b, n) bool on the CPU; row i's first `prompts[i]` valid tokens are prompt, the rest dense."""
        rows, width = valid.shape
        columns, members, dense = [], [], []
        reach = torch.full((rows, width), FILLER)
        for row, prompt in enumerate(prompts):
            tokens = valid[row].nonzero().squeeze(-1)  # columns of this row's tokens, in order
            part = split(prompt, k, head, tail)
            start = part.head + part.groups * k
            inside = tokens[part.head : start].view(part.groups, k)
            alone = torch.cat((tokens[: part.head], tokens[start:]))
            reach[row, tokens] = tokens
            reach[row, inside] = inside[:, -1:].expand_as(inside)
            columns.append(torch.cat((tokens[: part.head], inside[:, -1], tokens[start:])))
            members.append(inside + row * width)
            dense.append(alone + row * width)
        size = max(len(own) for own in columns)
        self.shape = (rows, size)
        self.columns = torch.full((rows, size), FILLER)
        for row, own in enumerate(columns):
            self.columns[row, size - len(own) :] = own
        self.reach = reach
        self.has_fillers = bool((self.columns == FILLER).any())
        self._members = torch.cat(members)  # (groups, k) into the columns
        self._dense = torch.cat(dense)  # (dense tokens,) into the columns
        slots = torch.full((rows * width,), FILLER)  # column -> entry
        own = self.columns != FILLER
        self._entries = own.flatten().nonzero().squeeze(-1)  # (real entries,) into the entries
        self._placed = (self.columns + torch.arange(rows)[:, None] * width)[own]  # ... and their columns
        slots[self._placed] = self._entries
        self._member_slots = slots[self._members[:, -1]]
        self._dense_slots = slots[self._dense]
        self.has_groups = len(self._members) > 0

    def to(self, device: torch.device) -> Indices:
        """Move every index tensor to `device`, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def compress(self, x: Tensor, merge: Merge) -> Tensor:
        flat = x.flatten(0, 1)
        entries = x.new_zeros(self.shape[0] * self.shape[1], x.shape[-1])
        entries = entries.index_copy(0, self._dense_slots, flat[self._dense])
        entries = entries.index_copy(0, self._member_slots, merge(flat[self._members]).to(x.dtype))
        return entries.unflatten(0, self.shape)

    def restore(self, entries: Tensor, x: Tensor, restore: Restore) -> Tensor:
        flat, columns = entries.flatten(0, 1), x.flatten(0, 1)
        tokens = restore(flat[self._member_slots], columns[self._members]).flatten(0, 1)
        out = torch.zeros_like(columns, dtype=entries.dtype)
        out = out.index_copy(0, self._dense, flat[self._dense_slots])
        out = out.index_copy(0, self._members.flatten(), tokens.to(entries.dtype))
        return out.unflatten(0, x.shape[:2])

    def place(self, entries: Tensor) -> Tensor:
        out = entries.new_zeros(self.reach.numel(), entries.shape[-1])
        out = out.index_copy(0, self._placed, entries.flatten(0, 1)[self._entries])
        return out.unflatten(0, tuple(self.reach.shape))

    def take(self, x: Tensor, dim: int) -> Tensor:
        shape = [1] * x.ndim
        shape[0], shape[dim] = self.shape
        wanted = list(x.shape)
        wanted[0], wanted[dim] = self.shape
        x = x.expand(self.shape[0], *x.shape[1:])  # position embeddings may have one row for all
        return x.gather(dim, self.columns.clamp(min=0).view(shape).expand(wanted))


class Segment:
    """The tokens of one forward pass: row i's first `prompts[i]` tokens are prompt, the rest stays dense."""

    def __init__(
        self,
        width: int,
        prompts: list[int] | int,
        *,
        head: int,
        tail: int,
        device: torch.device,
        valid: Tensor | None = None,
    ) -> None:
        """`width` columns; `valid` (b, width) bool marks tokens, None where no column is padding.

        `prompts`: prompt tokens of every row, or of each. `head`, `tail`: dense tokens at both ends of the prompt.
        """
        self.width, self.head, self.tail, self.device = width, head, tail, device
        uniform = isinstance(prompts, int) or len(set(prompts)) == 1
        self.uniform_prompt = (prompts if isinstance(prompts, int) else prompts[0]) if uniform else None
        if valid is not None and bool(valid.all()):
            valid = None
        if valid is not None or self.uniform_prompt is None:
            rows = len(valid) if valid is not None else len(prompts)  # type: ignore[arg-type]
            self.uniform_prompt = None
            self.prompts = [prompts] * rows if isinstance(prompts, int) else prompts
            self.valid = torch.ones(rows, width, dtype=torch.bool) if valid is None else valid.cpu()
            self.prompts = [min(p, int(n)) for p, n in zip(self.prompts, self.valid.sum(1), strict=True)]
        self._groupings: dict[int, Grouping] = {}

    def grouping(self, k: int) -> Grouping:
        """The split at ratio `k`, made once per pass and shared by all layers of that ratio."""
        if k not in self._groupings:
            if self.uniform_prompt is not None:
                prompt = min(self.uniform_prompt, self.width)
                head, groups, tail = split(prompt, k, self.head, self.tail)
                part = Split(head, groups, tail + self.width - prompt)
                self._groupings[k] = Slices(k, part, self.device)
            else:
                made = Indices(self.valid, self.prompts, k, self.head, self.tail)
                self._groupings[k] = made.to(self.device)
        return self._groupings[k]
