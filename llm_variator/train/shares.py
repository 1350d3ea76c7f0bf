"""How much each KV head keeps: ratios for an asked share of a prompt's keys and values. Knows scores, no model.

Heads differ far more than tokens, and their scores are logarithms of the same kind of energy: one threshold over all of
them says which share each head deserves. Shares become ratios, powers of two, and the entries are counted exactly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from llm_variator.engine import blocks
from llm_variator.errors import VariatorError

_HALVINGS = 50  # of the bracket around the scale of the shares


def entries(length: int, k: int, *, ends: tuple[int, int], block: int) -> int:
    """Keys that a head of ratio `k` keeps of a prompt."""
    return blocks.entries(blocks.Place(*ends, 0, length), k, block, length)


class Budget:
    """The most entries that all heads of a model may have together, of prompts of some lengths."""

    def __init__(
        self, keep: float, lengths: Sequence[int], *, ends: tuple[int, int], block: int, dense_layers: int = 0
    ) -> None:
        """`keep`: share of all entries; `dense_layers`: of the model's, keep all of theirs and count too.

        Raises:
            VariatorError: a length is too short to keep a share of it.
        """
        self.keep, self.lengths, self._ends, self._block, self._dense = (
            keep,
            tuple(lengths),
            ends,
            block,
            dense_layers,
        )
        for length in lengths:
            if entries(length, block, ends=ends, block=block) == length:
                raise VariatorError(
                    f"--calibrate-tokens {length}: such a prompt stays whole, two blocks of {block} tokens and a token "
                    f"between --dense-head {ends[0]} and --dense-tail {ends[1]} are the least; make it longer"
                )

    def share(self, ratios: Tensor, length: int) -> float:
        """The share of entries that heads with `ratios` (layers, heads) keep of a prompt."""
        kinds, counts = ratios.unique(return_counts=True)
        kept = sum(
            entries(length, k, ends=self._ends, block=self._block) * count
            for k, count in zip(kinds.tolist(), counts.tolist(), strict=True)
        )
        dense = self._dense * ratios.shape[1]
        return float((kept + dense * length) / ((ratios.numel() + dense) * length))

    def holds(self, ratios: Tensor) -> bool:
        """Whether `ratios` keep no more than what is asked, at every length."""
        return all(self.share(ratios, length) <= self.keep for length in self.lengths)

    def inner(self, layers: int, between: int) -> float:
        """The share of `between` tokens between the dense ends that is left to the heads of `layers`."""
        ends = sum(self._ends)
        total = self.keep * (layers + self._dense) - self._dense
        return (total * (between + ends) / layers - ends) / between

    def ratios(self, shares: Tensor) -> Tensor:
        """Ratios (layers, heads), powers of two up to the block, as near as may be to `shares` times one factor.

        Raises:
            VariatorError: the dense ends, and one key of every block, are more than what is asked.
        """

        def rounded(scale: float) -> Tensor:
            steps = -(shares.clamp_min(1 / self._block).double() * scale).log2()
            return 2 ** steps.round().clamp(0, self._block.bit_length() - 1).long()

        low, high = 1e-9, 1e9
        if not self.holds(rounded(low)):
            most = max(self.share(rounded(low), length) for length in self.lengths)
            raise VariatorError(
                f"--keep {self.keep:g} is too little: dense ends and one key of every {self._block} are already "
                f"{most:.3f} of the entries; keep more, or give longer --calibrate-tokens or a smaller --dense-tail"
            )
        for _ in range(_HALVINGS):
            middle = (low * high) ** 0.5
            low, high = (middle, high) if self.holds(rounded(middle)) else (low, middle)
        ratios = rounded(low)
        lacking = (shares.clamp_min(1 / self._block).double() * ratios).flatten()
        for place in lacking.argsort(
            descending=True, stable=True
        ).tolist():  # what rounding cost most comes first
            more = ratios.clone()
            more.view(-1)[place] //= 2
            if more.min() >= 1 and self.holds(more):
                ratios = more
        return ratios


def deserved(scores: Iterable[Tensor], budget: Budget) -> Tensor:
    """Of each head the share of its tokens whose scores are among the highest of all heads, (layers, heads).

    `scores`: (layers, heads, tokens) between the dense ends of some prompts. As many are among the highest as the
    budget has room for; prompts count alike.
    """
    found = []
    for own in scores:
        share = min(1.0, max(0.0, budget.inner(len(own), own.shape[-1])))
        least = own.flatten().topk(max(1, round(share * own.numel()))).values[-1]
        found.append((own >= least).double().mean(-1))
    return torch.stack(found).mean(0)
