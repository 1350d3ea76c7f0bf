"""The dense tokens at the end of a cache, kept so that they can be merged once they are old. Knows tensors only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Recent:
    """What one attention layer read for the last `len()` entries of its cache, all of them dense tokens."""

    hidden: Tensor
    """(b, n, d) input of the layer's projections."""
    position: tuple[Tensor, ...]
    """Cosine and sine of each token's rotary position, each (b or 1, n, head_dim)."""

    def __len__(self) -> int:
        return self.hidden.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes that are held."""
        return sum(t.nbytes for t in (self.hidden, *self.position))

    def __add__(self, newer: Recent) -> Recent:
        return self._joined([self, newer], dim=1)

    def first(self, count: int) -> Recent:
        """The oldest `count` tokens."""
        return self._each(lambda t: t[:, :count])

    def last(self, count: int) -> Recent:
        """The newest `count` tokens."""
        return self._each(lambda t: t[:, t.shape[1] - count :])

    def ends(self, k: int) -> tuple[Tensor, ...]:
        """`position` of the last token of every group of k."""
        return tuple(t[:, k - 1 :: k] for t in self.position)

    def rows(self, change: Callable[[Tensor], Tensor]) -> Recent:
        """Pick or repeat rows; what one row has for all stays."""
        return Recent(change(self.hidden), tuple(change(t) if len(t) > 1 else t for t in self.position))

    @classmethod
    def stack(cls, parts: Sequence[Recent | None], rows: Sequence[int]) -> Recent | None:
        """Those of several batches as one batch: the newest tokens that all of them have."""
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        width = min(map(len, known))
        ends = [
            part.last(width)._each(lambda t, n=count: t.expand(n, -1, -1))  # type: ignore[misc]
            for part, count in zip(known, rows, strict=True)
        ]
        return cls._joined(ends, dim=0)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Recent:
        return Recent(change(self.hidden), tuple(map(change, self.position)))

    @classmethod
    def _joined(cls, parts: Sequence[Recent], dim: int) -> Recent:
        positions = []
        for tensors in zip(*(part.position for part in parts), strict=True):
            rows = max(map(len, tensors)) if dim == 1 else -1
            positions.append(torch.cat([t.expand(rows, -1, -1) for t in tensors], dim=dim))
        return cls(torch.cat([part.hidden for part in parts], dim=dim), tuple(positions))
