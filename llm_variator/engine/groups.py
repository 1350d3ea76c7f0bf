"""Which tokens of a prompt are merged: the token algebra. Knows tensors and indices, no model and no weights.

A prompt segment of n tokens splits into `head` dense tokens, G groups of k neighbours and a dense tail:
G = max(0, (n - head - tail) // k), and what does not fill a group joins the tail. Encoders have *ragged*
groups instead: what does not fill a group is a last, shorter one. Dense tokens and merged groups are
*entries*, in order. An entry stands at the column of its last token.

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
from torch.nn import functional as F

# (..., k, d) -> (..., d); the second argument (groups, k) bool marks members, None where no group is short
Merge = Callable[[Tensor, Tensor | None], Tensor]
Restore = Callable[[Tensor, Tensor], Tensor]  # (..., d), (..., k, d) -> (..., k, d)

FILLER = -1  # column of an entry that stands for no token


class Split(NamedTuple):
    """Sizes of the three parts of one prompt: dense tokens, groups of k tokens, dense tokens."""

    head: int
    groups: int
    tail: int

    @property
    def entries(self) -> int:
        """Number of vectors that remain."""
        return self.head + self.groups + self.tail


def split(n: int, k: int, head: int, tail: int, *, ragged: bool = False) -> Split:
    """Split a prompt of `n` tokens; a prompt too short for one group stays dense.

    `ragged`: the last group may have fewer than k tokens, so that the tail keeps its size.
    """
    inner = max(0, n - head - tail)
    groups = -(-inner // k) if ragged else inner // k
    if groups == 0:
        return Split(0, 0, n)
    return Split(head, groups, tail if ragged else n - head - groups * k)


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

    @property
    def entries(self) -> int:
        """Entries of every row, m; fillers of shorter rows included."""

    @property
    def trailing(self) -> int:
        """Columns at the end that are dense tokens in every row."""

    def compress(self, x: Tensor, merge: Merge) -> Tensor:
        """(b, n, d) -> (b, m, d): dense vectors as they are, groups merged; missing members are zeros."""

    def restore(self, entries: Tensor, x: Tensor, restore: Restore) -> Tensor:
        """(b, m, d), (b, n, d) -> (b, n, d): inverse of `compress` for the outputs of the frozen layer."""

    def place(self, entries: Tensor) -> Tensor:
        """(b, m, d) -> (b, n, d): every entry at its column; the other columns hold anything finite."""

    def take(self, x: Tensor, dim: int) -> Tensor:
        """Keep the entries' columns of a tensor whose dimension `dim` has n columns and dimension 0 b rows."""


@dataclasses.dataclass(frozen=True)
class Slices:
    """Every row is [head][groups][tail], `width` columns without padding; `tail` includes any continuation."""

    k: int
    split: Split
    width: int
    device: torch.device
    has_fillers = False

    @property
    def has_groups(self) -> bool:
        return self.split.groups > 0

    @property
    def entries(self) -> int:
        return self.split.entries

    @property
    def trailing(self) -> int:
        return self.split.tail

    @property
    def inner(self) -> int:
        """Tokens inside groups: fewer than groups * k where the last group is short."""
        return self.width - self.split.head - self.split.tail

    @cached_property
    def members(self) -> Tensor | None:
        """(groups, k) bool, what a `Merge` gets."""
        places = self.split.groups * self.k
        if places == self.inner:
            return None
        return (torch.arange(places, device=self.device) < self.inner).view(-1, self.k)

    @cached_property
    def columns(self) -> Tensor:
        head, groups, tail = self.split
        columns = torch.arange(self.width, device=self.device)
        ends = (torch.arange(1, groups + 1, device=self.device) * self.k).clamp(max=self.inner) + head - 1
        return torch.cat((columns[:head], ends, columns[self.width - tail :]))[None]

    @cached_property
    def reach(self) -> Tensor:
        head = self.split.head
        reach = torch.arange(self.width, device=self.device)
        inside = reach[head : head + self.inner]
        inside += (self.k - 1) - (inside - head) % self.k
        inside.clamp_(max=head + self.inner - 1)
        return reach[None]

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        head, groups, tail = self.split
        first, inner, last = x.split((head, self.inner, tail), dim=1)
        if self.members is not None:
            inner = F.pad(inner, (0, 0, 0, groups * self.k - self.inner))
        return first, inner.unflatten(1, (groups, self.k)), last

    def compress(self, x: Tensor, merge: Merge) -> Tensor:
        if not self.has_groups:
            return x
        first, inner, last = self._parts(x)
        return torch.cat((first, merge(inner, self.members), last), dim=1)

    def restore(self, entries: Tensor, x: Tensor, restore: Restore) -> Tensor:
        if not self.has_groups:
            return entries
        first, merged, last = entries.split(tuple(self.split), dim=1)
        inner = restore(merged, self._parts(x)[1]).flatten(1, 2)[:, : self.inner]
        return torch.cat((first, inner, last), dim=1)

    def place(self, entries: Tensor) -> Tensor:
        if not self.has_groups:
            return entries
        first, merged, last = entries.split(tuple(self.split), dim=1)
        return torch.cat((first, merged.repeat_interleave(self.k, dim=1)[:, : self.inner], last), dim=1)

    def take(self, x: Tensor, dim: int) -> Tensor:
        if not self.has_groups:
            return x
        if self.members is not None:
            return x.index_select(dim, self.columns[0])
        head, groups, tail = self.split
        inner = x.narrow(dim, head, self.inner).unflatten(dim, (groups, self.k)).select(dim + 1, self.k - 1)
        return torch.cat((x.narrow(dim, 0, head), inner, x.narrow(dim, self.width - tail, tail)), dim=dim)


class Indices:
    """Rows of different length: flat indices into the b*n columns and the b*m entries."""

    def __init__(
        self, valid: Tensor, prompts: list[int], k: int, head: int, tail: int, *, ragged: bool = False
    ) -> None:
        """`valid` (b, n) bool on the CPU; row i's first `prompts[i]` valid tokens are prompt, the rest dense."""
        (rows, width), here = valid.shape, valid.device
        columns, members, present, dense = [], [], [], []
        self.trailing = width
        reach = torch.full((rows, width), FILLER, device=here)
        for row, prompt in enumerate(prompts):
            tokens = valid[row].nonzero().squeeze(-1)  # columns of this row's tokens, in order
            part = split(prompt, k, head, tail, ragged=ragged)
            start = prompt - part.tail
            behind = len(tokens) - start
            if not torch.equal(tokens[start:], torch.arange(width - behind, width, device=here)):
                behind = 0  # padding comes last, or in between
            self.trailing = min(self.trailing, behind)
            inside = tokens[part.head : start]
            places = torch.arange(part.groups * k, device=here).view(part.groups, k)
            present.append(places < len(inside))
            inside = inside[
                places.clamp(max=len(inside) - 1)
            ]  # a missing member repeats the last, and is masked
            alone = torch.cat((tokens[: part.head], tokens[start:]))
            reach[row, tokens] = tokens
            reach[row, inside] = inside[:, -1:].expand_as(inside)
            columns.append(torch.cat((tokens[: part.head], inside[:, -1], tokens[start:])))
            members.append(inside + row * width)
            dense.append(alone + row * width)
        size = max(len(own) for own in columns)
        self.shape = (rows, size)
        self.columns = torch.full((rows, size), FILLER, device=here)
        for row, own in enumerate(columns):
            self.columns[row, size - len(own) :] = own
        self.reach = reach
        self.has_fillers = bool((self.columns == FILLER).any())
        self._members = torch.cat(members)  # (groups, k) into the columns
        real = torch.cat(present)
        self._real = None if bool(real.all()) else real  # (groups, k) bool
        self._kept = real.flatten().nonzero().squeeze(-1)  # (tokens in groups,) into the members
        self._dense = torch.cat(dense)  # (dense tokens,) into the columns
        slots = torch.full((rows * width,), FILLER, device=here)  # column -> entry
        own = self.columns != FILLER
        self._entries = own.flatten().nonzero().squeeze(-1)  # (real entries,) into the entries
        starts = torch.arange(rows, device=here)[:, None] * width
        self._placed = (self.columns + starts)[own]  # ... and their columns
        slots[self._placed] = self._entries
        self._member_slots = slots[self._members[:, -1]]
        self._dense_slots = slots[self._dense]
        self.has_groups = len(self._members) > 0

    @property
    def entries(self) -> int:
        return self.shape[1]

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
        groups = flat[self._members]
        if self._real is not None:
            groups = groups.masked_fill(~self._real.unsqueeze(-1), 0)
        entries = entries.index_copy(0, self._member_slots, merge(groups, self._real).to(x.dtype))
        return entries.unflatten(0, self.shape)

    def restore(self, entries: Tensor, x: Tensor, restore: Restore) -> Tensor:
        flat, columns = entries.flatten(0, 1), x.flatten(0, 1)
        tokens = restore(flat[self._member_slots], columns[self._members]).flatten(0, 1)
        members = self._members.flatten()
        if self._real is not None:
            tokens, members = tokens[self._kept], members[self._kept]
        out = torch.zeros_like(columns, dtype=entries.dtype)
        out = out.index_copy(0, self._dense, flat[self._dense_slots])
        out = out.index_copy(0, members, tokens.to(entries.dtype))
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
        ragged: bool = False,
    ) -> None:
        """`width` columns; `valid` (b, width) bool marks tokens, None where no column is padding.

        `prompts`: prompt tokens of every row, or of each. `head`, `tail`: dense tokens at both ends of the prompt.
        `ragged`: the last group of a prompt may be short.
        """
        self.width, self.head, self.tail, self.device, self.ragged = width, head, tail, device, ragged
        self.valid: Tensor | None = None
        """(rows, width) bool on the CPU, where rows differ; None: no column is padding."""
        uniform = isinstance(prompts, int) or len(set(prompts)) == 1
        self.uniform_prompt = (prompts if isinstance(prompts, int) else prompts[0]) if uniform else None
        if valid is not None and bool(valid.all()):
            valid = None
        if valid is not None or self.uniform_prompt is None:
            rows = len(valid) if valid is not None else len(prompts)  # type: ignore[arg-type]
            self.uniform_prompt = None
            self.prompts = [prompts] * rows if isinstance(prompts, int) else prompts
            self.valid = (
                torch.ones(rows, width, dtype=torch.bool, device="cpu") if valid is None else valid.cpu()
            )
            self.prompts = [min(p, int(n)) for p, n in zip(self.prompts, self.valid.sum(1), strict=True)]
        self._groupings: dict[int, Grouping] = {}

    def grouping(self, k: int) -> Grouping:
        """The split at ratio `k`, made once per pass and shared by all layers of that ratio."""
        if k not in self._groupings:
            if self.uniform_prompt is not None:
                prompt = min(self.uniform_prompt, self.width)
                head, groups, tail = split(prompt, k, self.head, self.tail, ragged=self.ragged)
                part = Split(head, groups, tail + self.width - prompt)
                self._groupings[k] = Slices(k, part, self.width, self.device)
            else:
                assert self.valid is not None
                made = Indices(self.valid, self.prompts, k, self.head, self.tail, ragged=self.ragged)
                self._groupings[k] = made.to(self.device)
        return self._groupings[k]
