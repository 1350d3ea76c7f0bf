"""AdamW in steps relative to the weights, for what least squares set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW


class RelativeAdamW(AdamW):
    """AdamW that moves each weight by the learning rate times the weight's size at the first step.

    Not in the paper. AdamW's step is as long for every weight, yet adapters read channels of very different size, and
    least squares leave weights that differ by orders of magnitude: a rate that moves those of small channels ruins what
    those of large ones say.

    Sizes are the best product of one factor per row and one per column (as Adafactor's second moments, Shazeer and
    Stern 2018), so a weight that happens to be small moves with its neighbours; vectors have each weight's own. What
    starts as zeros, as merge weights do, has size 1: there the learning rate is AdamW's. Sizes are part of the state.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; weight decay is AdamW's."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [
            (group, weight)
            for group in self.param_groups
            for weight in group["params"]
            if weight.grad is not None
        ]
        old = [weight.clone() for _, weight in moved]
        for _, weight in moved:
            weight.zero_()  # then AdamW leaves its step alone, without rounding it to the weight's own precision
        try:
            super().step()
        except BaseException:  # also a user's Ctrl-C: nothing is lost
            for (_, weight), before in zip(moved, old, strict=True):
                weight.copy_(before)
            raise
        for (group, weight), before in zip(moved, old, strict=True):
            state = self.state[weight]
            if "size" not in state:
                state["size"] = sizes(before)
            weight.mul_(state["size"]).add_(before, alpha=1 - float(group["lr"]) * group["weight_decay"])
        return loss


def sizes(weights: Tensor) -> Tensor:
    """How large each of `weights` is: see `RelativeAdamW`. Of the same shape."""
    if not weights.any():
        return torch.ones_like(weights)
    if weights.ndim < 2:
        return weights.abs()
    squares = weights.double().square()
    rows, columns = squares.mean(-1, keepdim=True), squares.mean(-2, keepdim=True)
    mean = rows.mean(-2, keepdim=True)
    return (rows * columns / mean.where(mean > 0, 1)).sqrt().to(weights.dtype)
