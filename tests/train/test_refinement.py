"""Adapters with a nonlinearity: steps after the linear solution, judged by the adapter's own forward."""

from __future__ import annotations

import math

import pytest
import torch

from llm_variator.engine.layers import HiddenDecompressor
from llm_variator.train import refinement
from llm_variator.train.least_squares import _Moments
from llm_variator.train.refinement import HELD_OUT, refine

DIM, RANK, TOKENS = 12, 6, 6000


def sample(bend: float, seed: int = 0):
    """Features of unlike sizes, and what tokens lack: linear in them, and bent by so much."""
    draw = torch.Generator().manual_seed(seed)
    features = (
        torch.randn(TOKENS, 2 * DIM, generator=draw) @ torch.randn(2 * DIM, 2 * DIM, generator=draw) / 4
    )
    inner = torch.randn(2 * DIM, RANK, generator=draw) / 2
    outer = torch.randn(RANK, DIM, generator=draw)
    plain = features @ inner
    missing = (plain * (1 - bend) + bend * (2 * plain).tanh()) @ outer + 0.5
    scale = torch.logspace(-1, 3, 2 * DIM)  # some channels are a thousand times larger
    return (features + 0.3) * scale, missing, 0.5 + torch.rand(TOKENS, 1, generator=draw)


def error(adapter: HiddenDecompressor, given, gain) -> float:
    """By the adapter itself: the weighted share of what is lacking that it does not give, on held-out tokens."""
    features, missing, weights = (part[-(TOKENS // HELD_OUT) :].double() for part in given)
    merged, own = features[:, :DIM], features[:, DIM:]
    with torch.no_grad():
        restored = adapter.double()(merged, own[:, None])[:, 0] - merged
    adapter.float()
    left, lacking = ((x * gain).square() * weights for x in (restored - missing, missing))
    return float(left.sum() / lacking.sum())


def solved(given, gain, activation: str) -> HiddenDecompressor:
    adapter, moments = HiddenDecompressor(DIM, RANK, activation=activation), _Moments()
    moments.add(*given)
    moments.solve(adapter, gain)
    return adapter


@pytest.mark.parametrize("bend", [0.0, 1.0])
def test_steps_find_what_a_linear_map_cannot_say(bend):
    given, gain = sample(bend), torch.linspace(0.5, 2, DIM)
    linear = error(solved(given, gain, "identity"), given, gain)
    adapter = solved(given, gain, "tanh")
    before, after = refine(
        adapter, [tuple(part[:3000] for part in given), tuple(part[3000:] for part in given)], gain, steps=600
    )
    assert before == pytest.approx(linear, rel=0.02, abs=1e-4)
    assert error(adapter, given, gain) == pytest.approx(after, rel=0.01, abs=1e-5)
    assert after < (0.7 * before if bend else 0.01)


@pytest.mark.parametrize("rate", [1e3, math.inf])
def test_steps_that_do_harm_are_taken_back(rate, monkeypatch):
    """Then the adapter is the linear map, as near as tanh is the identity."""
    given, gain = sample(0.3), torch.ones(DIM)
    linear = error(solved(given, gain, "identity"), given, gain)
    adapter, untouched = (solved(given, gain, "tanh") for _ in range(2))
    refine(untouched, [given], gain, steps=0)
    monkeypatch.setattr(refinement, "RATE", rate)
    before, after = refine(adapter, [given], gain, steps=5)
    assert before == pytest.approx(linear, rel=0.01)
    assert after == pytest.approx(before, abs=0.005)
    assert error(adapter, given, gain) == pytest.approx(after, rel=0.01)
    pairs = zip(adapter.parameters(), untouched.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_channel_that_never_varied_does_not_carry_tokens_away():
    """What it does later was never seen: it weighs no more than others that vary little."""
    features, missing, weights = sample(1.0)
    features[:, 3] = 7.0
    given, gain = (features, missing, weights), torch.ones(DIM)
    adapter = solved(given, gain, "tanh")
    refine(adapter, [given], gain, steps=300)
    spread = features.std(0)
    assert adapter.down.weight[:, 3].abs().max() < 1.1 / (1e-3 * spread.mean())
    moved = features[-50:].clone()
    moved[:, 3] += 1e-4 * float(spread.mean())
    with torch.no_grad():
        outs = [adapter(x[:, :DIM], x[:, None, DIM:]) - x[:, None, :DIM] for x in (features[-50:], moved)]
    assert (outs[1] - outs[0]).abs().max() < 0.5 * outs[0].std()


def test_nothing_to_learn_from_leaves_the_adapter():
    given, gain = [part[:1] for part in sample(0.3)], torch.ones(DIM)
    adapter = solved(sample(0.3), gain, "tanh")
    weights = [parameter.clone() for parameter in adapter.parameters()]
    assert all(map(math.isnan, refine(adapter, [given], gain, steps=5)))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(adapter.parameters(), weights, strict=True))
