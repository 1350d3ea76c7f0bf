"""What a device can do at best, measured on it: a large matrix product, and a large copy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from llm_variator.measures.timing import Case, interleaved

_LONG = 5e-3
"""Seconds: a run that takes so long hides its launch."""
_SIZES = {"product": (256, 16_384), "copy": (2**18, 2**30)}
"""Least and most rows of a square matrix, and elements that are copied."""


@dataclasses.dataclass(frozen=True)
class Card:
    """Rates of one device in one dtype, the best of a few runs."""

    flops_per_second: float
    """Of a product of square matrices; a multiply-add is two."""
    bytes_per_second: float
    """Read and written by a copy."""

    @classmethod
    def measured(cls, device: torch.device | str, dtype: torch.dtype) -> Card:
        """Measure for a second or two; sizes double until a run is long enough, or is as large as it may be."""

        def product(size: int) -> tuple[Callable[[], object], float]:
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            return lambda: torch.mm(a, b, out=out), 2.0 * size**3

        def copy(size: int) -> tuple[Callable[[], object], float]:
            source = torch.zeros(size, dtype=dtype, device=device)
            target = torch.empty_like(source)
            return lambda: target.copy_(source), 2.0 * source.nbytes

        with torch.inference_mode():
            return cls(*(_rate(make, *_SIZES[make.__name__], device) for make in (product, copy)))

    def seconds(self, operations: float, moved: float) -> float:
        """The least that so many operations and so many moved bytes take: each at its own rate, side by side."""
        return max(operations / self.flops_per_second, moved / self.bytes_per_second)

    def columns(self, ms: float, operations: float, moved: float) -> dict[str, float]:
        """Columns of a table: the least milliseconds of this card, and what share they are of the measured `ms`."""
        least = 1e3 * self.seconds(operations, moved)
        return {"card_ms": least, "of_card": least / ms}


def _rate(
    make: Callable[[int], tuple[Callable[[], object], float]],
    size: int,
    most: int,
    device: torch.device | str,
) -> float:
    while True:
        run, work = make(size)
        seconds = min(interleaved({0: Case(lambda _: run())}, 5, warmups=2, device=device)[0])  # noqa: B023
        if seconds >= _LONG or size >= most:
            return work / seconds
        size *= 2
