"""Ratios of the heads: entries counted token by token, and all ratios tried."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from llm_variator import VariatorError
from llm_variator.train.shares import Budget, costs, entries


def kept_by_hand(n: int, k: int, head: int, tail: int, block: int) -> int:
    """Token by token."""
    if n - head < 2 * block or n - head - tail <= 0:
        return n
    kept = head + tail
    for start in range(head, n - tail, block):
        size = len(range(start, min(start + block, n - tail)))
        kept += math.ceil(size / k)
    return kept


@pytest.mark.parametrize("n", [5, 19, 20, 21, 36, 47, 100])
@pytest.mark.parametrize("k", [1, 2, 8])
@pytest.mark.parametrize(("head", "tail"), [(4, 1), (0, 0), (3, 17), (4, 40)])
def test_entries_are_counted_exactly(n, k, head, tail):
    got = entries(n, k, ends=(head, tail), block=8)
    assert got == (n if k == 1 else kept_by_hand(n, k, head, tail, 8))


@pytest.mark.parametrize("keep", [0.15, 0.3, 0.415, 0.77, 1.0])
@pytest.mark.parametrize("dense", [0, 1])
def test_ratios_never_keep_more_than_asked(keep, dense):
    draw = torch.Generator().manual_seed(int(100 * keep))
    steps = torch.rand(12, 3, 6, generator=draw) ** 3
    steps[..., 0] = 0
    keep = keep * 12 / (12 + dense) + dense / (12 + dense)
    budget = Budget(keep, (300, 700), ends=(4, 20), block=32, dense_layers=dense)
    ratios = budget.ratios(steps.cumsum(-1))
    for n in (300, 700):
        entries_of_all = sum(kept_by_hand(n, k, 4, 20, 32) for k in ratios.flatten().tolist()) + dense * 3 * n
        assert budget.share(ratios, n) == pytest.approx(entries_of_all / (36 + 3 * dense) / n)
        assert entries_of_all <= keep * (36 + 3 * dense) * n
    assert set(ratios.flatten().tolist()) <= {1, 2, 4, 8, 16, 32}
    for place in ratios.flatten().nonzero().flatten().tolist():  # and no head could have more
        more = ratios.clone()
        more.view(-1)[place] //= 2
        assert more.min() < 1 or not budget.holds(more)


def test_ratios_are_the_cheapest_of_all_that_the_budget_allows():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):  # convex costs, entries that fill the budget to the last: all 4^4 tried
        steps = torch.rand(2, 2, 4, generator=draw).double().sort(dim=-1).values
        steps[..., 0] = 0
        own = steps.cumsum(-1) * torch.rand(2, 2, 1, generator=draw) ** 4
        budget = Budget(float(0.2 + 0.7 * torch.rand(1, generator=draw)), (80,), ends=(0, 0), block=8)
        ratios = budget.ratios(own)
        sums = {
            ks: sum(float(own.view(4, 4)[head, k.bit_length() - 1]) for head, k in enumerate(ks))
            for ks in itertools.product((1, 2, 4, 8), repeat=4)
            if sum(80 // k for k in ks) <= budget.keep * 320
        }
        got, best = sums[tuple(ratios.flatten().tolist())], min(sums.values())
        # a price per entry leaves at most one step of one head unspent
        assert best <= got <= best + float(own.diff(dim=-1).max())
        assert sum(own.flatten(0, 1)[:, -1]).item() >= got


def test_costs_are_the_effects_of_what_is_dropped():
    scores = torch.tensor([[3.0], [1.0], [2.0], [0.0], [0.0], [5.0], [0.0], [0.0], [9.0]])
    effects = torch.tensor([[7.0], [1.0], [2.0], [4.0], [1.0], [0.5], [2.0], [3.0], [99.0]])
    # blocks of 4: kept first are 7, 2, 1, 4, and 0.5, 1, 2, 3 (of equal scores the earlier); the ninth is cut off
    assert costs(scores, effects, 4).tolist() == [[0.0, (1 + 4 + 2 + 3) / 2, (2 + 1 + 4 + 1 + 2 + 3) / 2]]
    assert costs(scores[:3], effects[:3], 8).tolist() == [
        [0.0, 1.0, 3.0, 3.0]
    ]  # 2, 1 and 1 of three tokens are kept


def test_too_little_to_keep_is_refused():
    with pytest.raises(
        VariatorError, match=r"--keep 0\.1 is too little: .* are already 0\.150 of the entries"
    ):
        Budget(0.1, (1000,), ends=(4, 132), block=64).ratios(torch.ones(1, 1, 7))
    with pytest.raises(VariatorError, match="--calibrate-tokens 100: such a prompt stays whole"):
        Budget(0.5, (100,), ends=(4, 4), block=64)
