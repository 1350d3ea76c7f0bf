"""CPUs that have no products in bfloat16 or float16: torch computes them there by plain loops."""

from __future__ import annotations

import time
from functools import lru_cache

import torch

_SLOW = 10  # times; CPUs that have such products need 0.3 to 2 times as long as in float32
_SIZE = 256
_REPEATS = 3


def complaint(dtype: torch.dtype) -> str | None:
    """What is wrong with computing in `dtype` on this CPU, in words; None where nothing is."""
    if not dtype.is_floating_point or dtype.itemsize >= torch.float32.itemsize:
        return None
    times = product_seconds(dtype) / product_seconds(torch.float32)
    if times < _SLOW:
        return None
    name = str(dtype).removeprefix("torch.")
    return f"this CPU has no products in {name}: one of {_SIZE} x {_SIZE} takes {times:.0f} times as long as in float32"


@lru_cache
def product_seconds(dtype: torch.dtype) -> float:
    """Seconds of a small product in `dtype` here: measured once, as instruction sets do not tell what torch uses."""
    matrix = torch.ones(_SIZE, _SIZE, dtype=dtype)
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        matrix @ matrix
        best = min(best, time.perf_counter() - started)
    return best
