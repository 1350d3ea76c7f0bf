"""Adapters that are not linear: from the least-squares solution on by gradient steps, each layer by itself.

Not in the paper. Steps on what one layer reads and lacks need no pass of the model, so thousands take minutes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from llm_variator.engine.layers import HiddenDecompressor

SMALL = 0.25
"""Root mean square of what goes into the activation at the start: there tanh is the identity, to 2 %."""
BATCH, RATE = 4096, 1e-2
HELD_OUT = 20  # every so many tokens one

Sample = tuple[Tensor, Tensor, Tensor]
"""Of N grouped tokens: features (g°, h) (N, 2d), what g° lacks (N, d), weights (N, 1)."""


def refine(
    decompressor: HiddenDecompressor, samples: Sequence[Sample], gain: Tensor, *, steps: int, seed: int = 0
) -> tuple[float, float]:
    """Go on from a linear solution to one with the adapter's activation; returns its errors before and after.

    Errors are weighted shares of what is lacking, on every twentieth token, which is held out: that of the linear map,
    and that of the adapter in the end. Where steps do not lower it, the adapter stays what the first step found.

    Args:
        decompressor: holds the linear solution, as if its activation were the identity.
        samples: one for each batch.
        gain: (d,) weights of the channels.
        steps: of Adam, at a rate that falls to 0 (cosine).
        seed: of the batches.
    """
    features, missing, weights = (
        torch.cat([each.cpu() for each in parts]) for parts in zip(*samples, strict=True)
    )
    held = torch.arange(len(features)) % HELD_OUT == 0
    known = (~held).nonzero()[:, 0]
    gain = gain.float()
    middle, spread = (of(features[known].float(), 0) for of in (torch.mean, torch.std))
    spread = spread.clamp(min=1e-6)

    # in standardised features and weighted channels, so that one rate suits all
    down, up = (
        decompressor.down.weight.detach().cpu().float() * spread,
        decompressor.up.weight.detach().cpu().float(),
    )
    offset = decompressor.up.bias.detach().cpu().float() + up @ (
        decompressor.down.bias.detach().cpu().float()
        + decompressor.down.weight.detach().cpu().float() @ middle
    )
    linear = [down, torch.zeros(len(down)), up * gain[:, None], offset * gain]
    size = F.linear((features[known[:BATCH]].float() - middle) / spread, down).square().mean(0).sqrt()
    shrink = SMALL / size.clamp(min=1e-6)
    parameters = [linear[0] * shrink[:, None], linear[1], linear[2] / shrink, linear[3]]
    parameters = [parameter.clone().requires_grad_() for parameter in parameters]

    def errors(rows: Tensor, *, activation: str) -> tuple[Tensor, Tensor]:
        """Sums of squares over the rows: what is left, and what was lacking."""
        inner_weight, inner_bias, outer_weight, outer_bias = parameters if activation == "tanh" else linear
        inner = F.linear((features[rows].float() - middle) / spread, inner_weight, inner_bias)
        wanted = missing[rows].float() * gain
        given = F.linear(inner.tanh() if activation == "tanh" else inner, outer_weight, outer_bias)
        w = weights[rows].float()
        return ((wanted - given).square() * w).sum(), (wanted.square() * w).sum()

    @torch.no_grad()
    def held_out(activation: str) -> float:
        sums = [errors(rows, activation=activation) for rows in held.nonzero()[:, 0].split(BATCH)]
        left, lacking = (torch.stack(each).sum() for each in zip(*sums, strict=True))
        return float(left / lacking)

    before, at_start = held_out("identity"), held_out("tanh")
    start = [parameter.detach().clone() for parameter in parameters]
    adam = torch.optim.Adam(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, max(1, steps))
    draw = torch.Generator().manual_seed(seed)
    with torch.enable_grad():
        for _ in range(steps):
            rows = known[torch.randint(len(known), (min(BATCH, len(known)),), generator=draw)]
            left, lacking = errors(rows, activation="tanh")
            adam.zero_grad()
            (left / lacking).backward()
            adam.step()
            schedule.step()
    after = held_out("tanh")
    if after > at_start:
        parameters, after = start, at_start
    with torch.no_grad():
        inner_weight, inner_bias, outer_weight, outer_bias = (parameter.detach() for parameter in parameters)
        decompressor.down.weight.copy_(inner_weight / spread)
        decompressor.down.bias.copy_(inner_bias - (inner_weight / spread) @ middle)
        decompressor.up.weight.copy_(outer_weight / gain[:, None])
        decompressor.up.bias.copy_(outer_bias / gain)
    return before, after
