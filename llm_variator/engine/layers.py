"""The trainable layers: the paper's two (section 3.2), and a score of keys. They know vectors, no model, no sequence.

Symbols: d hidden width, k vectors per group, r bottleneck; h the group's vectors, g the merged vector,
g° the frozen layer's output for g, o the restored outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def group_mean(groups: Tensor, members: Tensor | None = None) -> Tensor:
    """Mean over the members of each group (..., k, d): (..., d). Short groups have zeros where `members` is False."""
    if members is None:
        return groups.mean(-2)
    return groups.sum(-2) / members.sum(-1, keepdim=True)


def _linear(groups: Tensor, weight: Tensor) -> Tensor:
    """`F.linear` of groups (..., k, d) cut out of rows that are longer than they.

    Torch would multiply every group for itself there, in bf16 over ten times slower: one product per row is as
    far as the view goes without a copy.
    """
    if groups.dim() < 4 or groups.is_contiguous():
        return F.linear(groups, weight)
    return F.linear(groups.flatten(-3, -2), weight).unflatten(-2, groups.shape[-3:-1])


class HiddenCompressor(nn.Module):
    """Merge k neighbouring vectors into one: a = softmax(W_c concat(h) + b_c), g = sum_j a_j h_j.

    In a short group (the last of an encoder's) missing vectors are zeros in the concatenation and get no weight:
    `members` (..., k) bool marks those that are there, None where no group is short.
    Parameters: k²d + k (paper section 3.4), none if `mean`. Starts as the mean.
    """

    def __init__(self, dim: int, k: int, *, mean: bool = False) -> None:
        super().__init__()
        self.k = k
        self.mean = mean
        if not mean:
            self.weight = nn.Parameter(torch.zeros(k, k * dim))  # W_c
            self.bias = nn.Parameter(torch.zeros(k))  # b_c

    def weights(self, groups: Tensor, members: Tensor | None = None) -> Tensor:
        """Merge weights a of `groups` (..., k, d), shape (..., k), summing to one."""
        if self.mean:
            scores = groups.new_zeros(groups.shape[:-1])
        else:
            scores = F.linear(groups.flatten(-2), self.weight.to(groups.dtype), self.bias.to(groups.dtype))
        if members is not None:
            scores = scores.masked_fill(~members, float("-inf"))
        return scores.softmax(-1)

    def forward(self, groups: Tensor, members: Tensor | None = None) -> Tensor:
        """(..., k, d) -> (..., d)."""
        if self.k == 1:
            return groups.squeeze(-2)
        if self.mean:
            return group_mean(groups, members)
        return (self.weights(groups, members).unsqueeze(-2) @ groups).squeeze(-2)


class HiddenDecompressor(nn.Module):
    """Give every token of a group its own output: o_j = g° + W_2 act(W_1 concat(g°, h_j) + b_1) + b_2.

    Parameters: 3rd + r + d (paper section 3.4), none if `copy`. Starts as a copy of g°.
    The g°-half of W_1 is applied once per group, the h-half once per token: the same arithmetic as on the
    concatenation, without building it.
    """

    def __init__(self, dim: int, r: int, *, activation: str = "identity", copy: bool = False) -> None:
        super().__init__()
        self.copy = copy
        self.activation = activation
        if not copy:
            self.down = nn.Linear(2 * dim, r)  # W_u^1, b_u^1; columns: g° first, then h
            self.up = nn.Linear(r, dim)  # W_u^2, b_u^2
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    @torch.no_grad()
    def balance(self) -> None:
        """Make each hidden unit's weights as large in W_1 as in W_2, by powers of two: exactly the same function.

        Least squares leaves large ones in W_1, beyond what float16 holds. Nothing changes where an activation is
        between the two.
        """
        if self.copy or self.activation != "identity":
            return
        before = torch.maximum(self.down.weight.abs().amax(1), self.down.bias.abs()).double()
        after = self.up.weight.abs().amax(0).double()
        # a unit that says nothing, one of the two is 0, only shrinks: to 1, if it is larger
        first = before.where(before > 0, torch.minimum(after, 1 / after))
        second = after.where(after > 0, torch.minimum(before, 1 / before))
        exponents = ((first.log2() - second.log2()) / 2).round()
        scale = exponents.where(exponents.isfinite(), exponents.new_zeros(())).exp2().to(self.up.weight.dtype)
        self.down.weight.div_(scale[:, None])
        self.down.bias.div_(scale)
        self.up.weight.mul_(scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HiddenDecompressor:
        if not self.copy:
            now = self.down.weight
            if now.dtype != torch.float16 and not now.is_meta and fn(now.new_zeros(1)).dtype == torch.float16:
                self.balance()
        return super()._apply(fn, recurse)

    def forward(self, merged: Tensor, groups: Tensor) -> Tensor:
        """Restore `merged` g° (..., d) for the tokens `groups` h (..., k, d): (..., k, d)."""
        merged = merged.unsqueeze(-2)
        if self.copy:
            return merged.expand_as(groups)
        # transformers keeps the last weight of an fp16 T5's FFN, and so its output, in fp32
        groups = groups.to(merged.dtype)
        dtype, dim = groups.dtype, groups.shape[-1]
        down, up = self.down.weight.to(dtype), self.up.weight.to(dtype)
        inner = _linear(groups, down[:, dim:])
        inner = inner + F.linear(merged, down[:, :dim], self.down.bias.to(dtype))
        if self.activation == "tanh":
            inner = inner.tanh()
        return F.linear(inner, up, self.up.bias.to(dtype)).add_(merged)  # the sum needs no tensor of its own


class KeyScore(nn.Module):
    """How much later tokens will read the key of a token, for each KV head: s = log sum_f exp 2(W_f h + b_f).

    Not in the paper. Each of the linear maps f predicts the log of what one kind of later text reads; twice that is
    the log of a mean square, and the sum over f that of their mixture. Starts as zeros: then the first tokens win.
    Parameters: F * heads * (d + 1).
    """

    def __init__(self, dim: int, heads: int, fits: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(fits, heads, dim))
        self.bias = nn.Parameter(torch.zeros(fits, heads))

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores (b, heads, n) in fp32 or wider, of what the attention reads (b, n, d)."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        fits = F.linear(hidden, self.weight.to(hidden.dtype).flatten(0, 1)).to(wide)  # (b, n, F * heads)
        fits = fits.unflatten(-1, self.bias.shape) + self.bias.to(wide)
        score = 2 * fits.squeeze(-2) if len(self.bias) == 1 else (2 * fits).logsumexp(-2)
        return score.transpose(1, 2)
