"""The sets of the paper's section 4.9: what a merged vector activates, against the vectors it stands for.

Of a group of k vectors, I are the neurons that all of them activate in the original model, U those that any of
them activates, and C those that the merged vector activates. Knows booleans, no model.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class SetCounts:
    """Sizes of the sets, summed over groups."""

    groups: int = 0
    neurons: int = 0
    """Groups times neurons of the layer."""
    c: int = 0
    i: int = 0
    u: int = 0
    c_and_i: int = 0
    c_and_u: int = 0
    by_chance_i: float = 0.0
    """Of `c_and_i`, what neurons drawn at random would give, as many per group as C has."""
    by_chance_u: float = 0.0

    def __add__(self, other: SetCounts) -> SetCounts:
        """The sums over the groups of both."""
        names = (field.name for field in dataclasses.fields(self))
        return SetCounts(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def shares(self) -> dict[str, Any]:
        """The two rows of Table 5, what chance alone would give, and the sizes of the sets over all neurons.

        A share of nothing is None. Sums come before the division: a group with a large I counts for more.
        """
        return {
            "c_and_i_of_i": _over(self.c_and_i, self.i),
            "c_and_u_of_c": _over(self.c_and_u, self.c),
            "chance_i": _over(self.by_chance_i, self.i),
            "chance_u": _over(self.by_chance_u, self.c),
            "c": _over(self.c, self.neurons),
            "i": _over(self.i, self.neurons),
            "u": _over(self.u, self.neurons),
        }


def _over(part: float, whole: float) -> float | None:
    return part / whole if whole else None


def count_sets(original: Tensor, merged: Tensor) -> SetCounts:
    """Count the sets of some groups.

    Args:
        original: (groups, k, neurons) bool, what each vector activates in the original model.
        merged: (groups, neurons) bool, what the vector activates that they were merged into.
    """
    both, any_ = original.all(1), original.any(1)
    c, i, u = (each.sum(-1).double() for each in (merged, both, any_))
    width = merged.shape[-1]
    return SetCounts(
        groups=len(merged),
        neurons=merged.numel(),
        c=int(c.sum()),
        i=int(i.sum()),
        u=int(u.sum()),
        c_and_i=int((merged & both).sum()),
        c_and_u=int((merged & any_).sum()),
        by_chance_i=float((c * i).sum() / width),
        by_chance_u=float((c * u).sum() / width),
    )
