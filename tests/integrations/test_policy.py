"""The load policy by hand, and in a simulated queue."""

from __future__ import annotations

import heapq
import itertools
import random

import pytest

from llm_variator import VariatorError
from llm_variator.integrations.policy import Load, LoadPolicy

COSTS = {2: 0.65, 4: 0.475}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def policy(clock=None, **options):
    options = (
        dict(
            target_seconds=1.0,
            window_seconds=0.001,
            costs=COSTS,
            tokens_per_second=1000.0,
            clock=clock or Clock(),
        )
        | options
    )
    return LoadPolicy((2, 4), **options)


def test_smallest_ratio_that_meets_the_target():
    # 1,000 tokens a second: 1,000, 1,538 and 2,105 tokens take a second at ratios 0, 2 and 4
    assert [policy().choose(Load(n)) for n in (1000, 1001, 1538, 1539, 2105, 9000)] == [0, 2, 2, 4, 4, 4]


def test_queued_prompts_count_at_their_own_ratio():
    queued = {0: 300, 4: 1000}  # 300 + 475 dense tokens
    assert policy().predicted_seconds(Load(200, queued), 2) == pytest.approx(0.775 + 0.13)
    assert policy().choose(Load(225, queued)) == 0
    assert policy().choose(Load(226, queued)) == 2


def test_scarce_memory_takes_the_largest_ratio():
    assert policy(free_kv=0.2).choose(Load(10, free_kv=0.19)) == 4
    assert policy(free_kv=0.2).choose(Load(10, free_kv=0.2)) == 0


def test_more_at_once_and_less_after_a_calm_while():
    clock = Clock()
    steady = policy(clock, hold_seconds=5.0, release=0.5)
    assert steady.choose(Load(3000)) == 4
    clock.now = 4.9
    assert steady.choose(Load(10)) == 4  # too soon
    clock.now = 5.1
    assert steady.choose(Load(400, {2: 400})) == 4  # 520 ms at ratio 2 are more than half the target
    clock.now = 5.2
    assert steady.choose(Load(300, {2: 400})) == 2
    clock.now = 5.25
    assert steady.choose(Load(1000)) == 0  # nobody waits
    clock.now = 5.3
    assert steady.choose(Load(10)) == 0  # calm since 0.0
    clock.now = 6.0
    assert steady.choose(Load(1200)) == 2
    clock.now = 10.9
    assert steady.choose(Load(10)) == 2
    clock.now = 11.0
    assert steady.choose(Load(10)) == 0


def test_keeps_up_with_what_arrives():
    clock = Clock()
    rising = policy(clock, window_seconds=10.0, utilisation=0.8)
    chosen = []
    for _ in range(200):  # 1,000 tokens a second, in prompts that alone would meet the target
        clock.now += 0.1
        chosen.append(rising.choose(Load(100)))
    # dense takes at most 800 tokens a second, ratio 2 takes 1,230: never more than that is needed
    assert chosen[0] == 0
    assert chosen[-1] == 2
    assert 4 not in chosen
    clock.now += 60
    assert rising.choose(Load(100)) == 0


def test_speed_is_learned():
    fresh = policy(tokens_per_second=None)
    for tokens in (500, 100):
        assert fresh.choose(Load(10**6)) == 0  # nothing known yet
        fresh.observe({0: tokens}, tokens / 1000)
    fresh.observe({0: 100}, 0.05)
    assert fresh.speed is None  # three steps, but of 700 tokens
    fresh.observe({2: 1000}, 0.5)  # 650 dense tokens
    assert fresh.speed == 1300  # 600 of 1,350 tokens were read at 1,000 a second, the next 650 at 1,300
    fresh.observe({}, 1.0)
    fresh.observe({0: 100}, 0.0)
    assert fresh.speed == 1300
    for _ in range(8):
        fresh.observe({0: 500}, 1.0)
    assert fresh.speed == 500
    for _ in range(20):
        fresh.observe({0: 30}, 0.3)
    assert fresh.speed == 500  # little work says little
    for _ in range(80):
        fresh.observe({0: 30}, 0.3)
    assert fresh.speed == pytest.approx(100)


def test_a_slow_first_pass_does_not_count():
    # a server on two CPU cores from its start: requests of some 580 tokens, whose first took 5.3 s
    clock = Clock()
    cold = policy(clock, tokens_per_second=None, target_seconds=2.0)
    for tokens, seconds in ((581, 5.334), (599, 1.262), (581, 1.201)):
        clock.now += 10.0
        assert cold.choose(Load(tokens)) == 0
        cold.observe({0: tokens}, seconds)
    assert cold.speed == pytest.approx(599 / 1.262)
    clock.now += 10.0
    assert cold.choose(Load(599)) == 0


@pytest.mark.parametrize(
    "options",
    [
        dict(target_seconds=0),
        dict(hold_seconds=-1),
        dict(release=0),
        dict(release=1.5),
        dict(free_kv=2),
        dict(window_seconds=0),
        dict(utilisation=0),
        dict(hold_seconds="x"),
        dict(tokens_per_second="3000"),
        dict(tokens_per_second=0),
        dict(costs={2: 0.6, 4: float("nan")}),
        dict(shares={2: True}),
        dict(shares={2: -0.5}),
        dict(target_seconds=float("nan")),
    ],
)
def test_wrong_values(options):
    with pytest.raises(VariatorError, match="needs"):
        policy(**options)
    with pytest.raises(VariatorError, match="at least 2"):
        LoadPolicy((0, 2))


def simulate(choose, rate, seconds=240.0, speed=1000.0, prompt=500, seed=0):
    """One reader, first come first served, Poisson arrivals at `rate(t)`. (arrival, wait, ratio) of every request."""
    rng, now, free_at, done = random.Random(seed), 0.0, 0.0, []
    unread = []  # (end, tokens, ratio)
    while (now := now + rng.expovariate(rate(now))) < seconds:
        while unread and unread[0][0] <= now:
            heapq.heappop(unread)
        queued = {}
        for _, tokens, k in unread:
            queued[k] = queued.get(k, 0) + tokens
        k = choose(now, Load(prompt, queued))
        free_at = max(now, free_at) + prompt * ({0: 1.0} | COSTS)[k] / speed
        heapq.heappush(unread, (free_at, prompt, k))
        done.append((now, free_at - now, k))
    return done


def quantile(values, q):
    return sorted(values)[int(q * (len(values) - 1))]


def test_simulated_ramp_to_twice_what_dense_sustains():
    # dense reads 2 prompts a second; a calm minute, a ramp to 4 a second, the peak, and calm again
    def rate(t):
        return 0.2 if t < 60 or t > 180 else min(4.0, 0.2 + (t - 60) / 10)

    clock = Clock()
    auto = policy(clock, target_seconds=1.5, hold_seconds=5.0, window_seconds=10.0)

    def choose(now, load):
        clock.now = now
        return auto.choose(load)

    runs = {k: simulate(lambda now, load, k=k: k, rate) for k in (0, 2, 4)}
    runs["auto"] = simulate(choose, rate)
    p99 = {name: quantile([wait for t, wait, _ in run if 60 <= t <= 180], 0.99) for name, run in runs.items()}
    assert p99["auto"] <= 1.2 * p99[4] < p99[0] / 3
    calm = [k for t, _, k in runs["auto"] if t < 60 or t > 200]
    assert set(calm) <= {0, 2}
    assert calm.count(0) > 0.8 * len(calm)
    peak = [k for t, _, k in runs["auto"] if 120 <= t <= 180]
    assert peak.count(4) > 0.5 * len(peak)
    changes = sum(a[2] != b[2] for a, b in itertools.pairwise(runs["auto"]))
    assert changes < len(runs["auto"]) / 10


def test_hysteresis_changes_less_often_than_none():
    def rate(t):
        return 2.2

    def changes(**options):
        clock = Clock()
        made = policy(clock, target_seconds=1.2, **options)

        def choose(now, load):
            clock.now = now
            return made.choose(load)

        run = simulate(choose, rate)
        return sum(a[2] != b[2] for a, b in itertools.pairwise(run))

    assert changes(hold_seconds=10.0, release=0.5) < changes(hold_seconds=0.0, release=1.0) / 3


def named(**options):
    """Keys and values kept in a third of the cache, and two that merge: as SmolLM2's are served."""
    costs = {"kv4": 0.95, 2: 0.6, 4: 0.4}
    shares = {"kv4": 0.33, 2: 0.51, 4: 0.26}
    return LoadPolicy(
        ("kv4", 2, 4),
        **dict(target_seconds=1.0, window_seconds=0.001, tokens_per_second=1000.0, clock=Clock())
        | dict(costs=costs, shares=shares)
        | options,
    )


def test_names_are_tried_in_their_order():
    # 1,000, 1,052 and 1,666 tokens take a second
    lengths = (1000, 1001, 1052, 1053, 1666, 1667, 9000)
    assert [named().choose(Load(n)) for n in lengths] == [0, "kv4", "kv4", 2, 2, 4, 4]
    with pytest.raises(VariatorError, match="needs costs and shares of kv4"):
        LoadPolicy(("kv4", 2))


def test_what_scarce_memory_leaves():
    scarce = {"free_kv": 0.05}
    lengths = (10, 1052, 1053, 9000)
    assert [named().choose(Load(n, **scarce)) for n in lengths] == ["kv4", "kv4", 4, 4]
    # where nothing saves memory, what is read fastest leaves first
    ffn = LoadPolicy((2, 4), costs=COSTS, shares={2: 1.0, 4: 1.0}, tokens_per_second=1000.0)
    assert ffn.choose(Load(10, **scarce)) == 4


def test_a_held_ratio_that_memory_does_not_allow_is_left_at_once():
    clock = Clock()
    held = named(clock=clock, hold_seconds=5.0)
    assert held.choose(Load(1500)) == 2
    clock.now = 1.0
    assert held.choose(Load(100)) == 2  # too soon for less
    clock.now = 1.5
    assert held.choose(Load(100, free_kv=0.05)) == "kv4"
    clock.now = 2.0
    assert held.choose(Load(1500, free_kv=0.05)) == 4
