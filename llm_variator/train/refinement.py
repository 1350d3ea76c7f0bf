"""Adapters that are not linear: from the least-squares solution on by gradient steps, each layer by itself.

Not in the paper. Steps on what one layer reads and lacks need no pass of the model, so thousands take minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_variator.engine.layers import HiddenDecompressor

SMALL = 0.25
"""Root mean square of what goes into the activation at the start: there tanh is the identity, to 2 %."""
BATCH, RATE = 4096, 1e-2
HELD_OUT = 20  # of so many tokens one

Sample = tuple[Tensor, Tensor, Tensor]
"""Of N grouped tokens: features (g°, h) (N, 2d), what g° lacks (N, d), weights (N, 1)."""


def refine(
    decompressor: HiddenDecompressor, samples: Sequence[Sample], gain: Tensor, *, steps: int, seed: int = 0
) -> tuple[float, float]:
    """Go on from a linear solution to one with the adapter's activation; returns its errors before and after.

    Errors are weighted shares of what is lacking, on the last twentieth of the tokens, which is held out: that of the
    linear map, and that of the adapter in the end. Where steps do not lower it, the adapter is what they began with.

    Args:
        decompressor: holds the linear solution, as if its activation were the identity.
        samples: one for each batch.
        gain: (d,) weights of the channels.
        steps: of Adam, at a rate that falls to 0 (cosine).
        seed: of the batches.
    """
    inner, outer = decompressor.down, decompressor.up
    device = inner.weight.device
    features, missing, weights = (torch.cat(parts).to(device) for parts in zip(*samples, strict=True))
    known, held = torch.arange(len(features), device=device).tensor_split(
        [-max(1, len(features) // HELD_OUT)]
    )
    if not len(known):
        return math.nan, math.nan
    gain = gain.to(device, torch.float32)
    middle = features[known].float().mean(0)
    spread = features[known].float().std(0, correction=0)
    # of a channel that hardly varies here, no step makes weights that would carry away one that does elsewhere
    spread = spread.clamp(min=max(1e-6, 1e-3 * float(spread.mean())))

    # in standardised features and weighted channels, so that one rate suits all
    down, up = inner.weight.detach().float(), outer.weight.detach().float()
    offset = outer.bias.detach().float() + up @ (inner.bias.detach().float() + down @ middle)
    linear = [down * spread, torch.zeros_like(down[:, 0]), up * gain[:, None], offset * gain]

    def read(rows: Tensor) -> Tensor:
        return (features[rows].float() - middle) / spread

    size = F.linear(read(known[:BATCH]), linear[0]).square().mean(0).sqrt()
    shrink = SMALL / size.clamp(min=1e-6)
    start = [linear[0] * shrink[:, None], linear[1], linear[2] / shrink, linear[3]]

    def errors(
        rows: Tensor, own: list[Tensor], activation: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Sums of squares over the rows: what is left, and what was lacking."""
        wanted, w = missing[rows].float() * gain, weights[rows].float()
        given = F.linear(activation(F.linear(read(rows), own[0], own[1])), own[2], own[3])
        return ((wanted - given).square() * w).sum(), (wanted.square() * w).sum()

    @torch.no_grad()
    def held_out(own: list[Tensor], activation: Callable[[Tensor], Tensor] = torch.tanh) -> float:
        sums = [errors(rows, own, activation) for rows in held.split(BATCH)]
        left, lacking = (torch.stack(each).sum() for each in zip(*sums, strict=True))
        return float(left / lacking)

    trained = [parameter.clone().requires_grad_() for parameter in start]
    adam = torch.optim.Adam(trained, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))
    draw = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            rows = known[torch.randint(len(known), (min(BATCH, len(known)),), generator=draw).to(device)]
            left, lacking = errors(rows, trained, torch.tanh)
            adam.zero_grad()
            (left / lacking).backward()
            adam.step()
            schedule.step()
    best, after = [parameter.detach() for parameter in trained], held_out(trained)
    if not after <= held_out(start):  # more, or no number
        best, after = start, held_out(start)
    with torch.no_grad():
        inner.weight.copy_(best[0] / spread)
        inner.bias.copy_(best[1] - (best[0] / spread) @ middle)
        outer.weight.copy_(best[2] / gain[:, None])
        outer.bias.copy_(best[3] / gain)
    return held_out(linear, activation=lambda x: x), after
