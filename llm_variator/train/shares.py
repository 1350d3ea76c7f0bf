"""How much each KV head keeps: ratios for an asked share of a prompt's keys and values. Knows scores, no model.

Heads differ far more than tokens. Of some prompts it is known what dropping a key costs (see `scores`): the ratios,
powers of two, are those of the least sum of costs, a Lagrange multiplier being the price of an entry. Entries are
counted exactly.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llm_variator.engine import blocks
from llm_variator.errors import VariatorError

_HALVINGS = 50  # of the bracket around the price of an entry


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

    def least(self, layers: int, heads: int) -> Tensor:
        """Ratios (layers, heads) that keep as little as there can be.

        Raises:
            VariatorError: the dense ends, and one key of every block, are more than what is asked.
        """
        most = torch.full((layers, heads), self._block)
        if not self.holds(most):
            share = max(self.share(most, length) for length in self.lengths)
            raise VariatorError(
                f"--keep {self.keep:g} is too little: dense ends, dense layers and one key of every {self._block} are "
                f"already {share:.3f} of the entries; keep more, or give longer --calibrate-tokens or a smaller "
                "--dense-tail"
            )
        return most

    def ratios(self, costs: Tensor) -> Tensor:
        """Ratios (layers, heads), powers of two up to the block, of the least sum of costs that the budget allows.

        `costs` (layers, heads, powers): of the ratios 1, 2, 4 to the block.

        Raises:
            VariatorError: the dense ends, and one key of every block, are more than what is asked.
        """
        costs = costs.double()
        powers = torch.arange(costs.shape[-1])
        entries_of = 0.5 ** powers.double()  # of a token, about

        def cheapest(price: float) -> Tensor:
            """Where an entry costs `price` too; of equal sums that of fewer entries."""
            return 2 ** (len(powers) - 1 - (costs + price * entries_of).flip(-1).argmin(-1))

        self.least(*costs.shape[:2])
        scale = max(float(costs.max()), 1e-300)
        low, high = 1e-12 * scale, 1e6 * scale
        for _ in range(_HALVINGS):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if self.holds(cheapest(middle)) else (middle, high)
        ratios = cheapest(high)
        while True:  # what is left goes where it spares most, entry by entry
            power = ratios.double().log2().long().unsqueeze(-1)
            less = (power - 1).clamp(min=0)
            spared = (costs.gather(-1, power) - costs.gather(-1, less)) / (
                entries_of[less] - entries_of[power]
            ).clamp(min=1e-12)
            spared = spared.masked_fill(power == 0, float("-inf")).flatten()
            for place in spared.argsort(descending=True, stable=True).tolist():
                more = ratios.clone()
                more.view(-1)[place] //= 2
                if more.min() >= 1 and self.holds(more):
                    ratios = more
                    break
            else:
                return ratios


def costs(scores: Tensor, effects: Tensor, block: int) -> Tensor:
    """(heads, powers) of the ratios 1, 2, 4 to `block`: the effects of what they drop, as a mean over blocks.

    Args:
        scores: (tokens, heads) of neighbouring tokens.
        effects: (tokens, heads).
        block: tokens of a block; fewer tokens count as one block.
    """
    size = min(block, len(scores))
    whole = len(scores) // size * size
    scores, effects = (x[:whole].unflatten(0, (-1, size)) for x in (scores, effects.double()))
    order = scores.argsort(dim=1, descending=True, stable=True)
    kept = effects.gather(1, order).cumsum(1).mean(0)  # (size, heads): by the first 1, 2, ... tokens
    counts = [-(-size // 2**power) for power in range(block.bit_length())]
    return torch.stack([kept[-1] - kept[count - 1] for count in counts], dim=-1)
