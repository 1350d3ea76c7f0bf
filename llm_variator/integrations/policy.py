"""Choosing the compression ratio by load: what `"auto"` means when serving, and usable around `VariatorModel`.

A policy is any object with `choose(load) -> ratio` and `observe(tokens, seconds)`. `LoadPolicy` takes the first of its
ratios at which a request should meet a target for its first token and the reader keeps up with what arrives; where the
KV cache runs short, the first of those that need the fewest entries. It has hysteresis: it compresses more at once, and
less only after a calm while. It knows neither models nor servers.

Around a `VariatorModel` with plugins "k2" and "k4":

    policy = LoadPolicy(ratios=(2, 4), target_seconds=0.5)
    k = policy.choose(Load(prompt=len(ids), queued={}))
    with model.use_plugin(f"k{k}" if k else None):
        ...  # generate, and time its first token
    policy.observe({k: len(ids)}, seconds)
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from llm_variator.errors import VariatorError

Ratio = int | str
"""0 (dense), a ratio, or the name of what is served beside others of its ratio."""
SCARCE = 1.5
"""Where the KV cache runs short: at most so many times the fewest entries."""


@dataclasses.dataclass(frozen=True)
class Load:
    """What a policy sees when a request arrives."""

    prompt: int
    """Tokens of the request's prompt."""
    queued: Mapping[Ratio, int] = dataclasses.field(default_factory=dict)
    """Prompt tokens that are still to be read before it, by the ratio at which they will be."""
    free_kv: float = 1.0
    """Free share of the KV cache, 0 to 1."""


class Policy(Protocol):
    """What may stand for `LoadPolicy`."""

    def choose(self, load: Load) -> Ratio:
        """The ratio for a request: 0 (dense) or one of the served ratios."""

    def observe(self, tokens: Mapping[Ratio, int], seconds: float) -> None:
        """Learn that prompt `tokens`, by ratio, were read within `seconds`."""


class LoadPolicy:
    """The first ratio that meets the target and keeps up with the arrivals; see the top of this file."""

    def __init__(
        self,
        ratios: Sequence[Ratio],
        *,
        target_seconds: float = 1.0,
        release: float = 0.5,
        hold_seconds: float = 5.0,
        free_kv: float = 0.1,
        utilisation: float = 0.8,
        window_seconds: float = 10.0,
        costs: Mapping[Ratio, float] | None = None,
        shares: Mapping[Ratio, float] | None = None,
        tokens_per_second: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """A policy over the served `ratios` (0, dense, is always among its choices).

        Args:
            ratios: what is served besides, what loses least first: ratios of at least 2, or names.
            target_seconds: wanted time to first token.
            release: a smaller ratio is taken again when its predicted time is below this share of the target (where
                no other request waits: below the target itself)
            hold_seconds: ... and the current ratio has not been needed for so long.
            free_kv: below this free share of the KV cache only what needs the fewest entries, or at most half as
                many more, is chosen; where nothing needs fewer than dense, what is read fastest.
            utilisation: a ratio is too small if reading what arrives would take more than this share of the time.
            window_seconds: over about which the arrivals are averaged.
            costs: time to read a prompt at each ratio relative to dense; default 0.3 + 0.7 / k, an FFN and
                KV plugin on a model whose FFN and projections take seven tenths of the time. Serving counts the
                operations of its plugins instead. Names have no default.
            shares: KV entries of a prompt at each ratio relative to dense; default 1 / k.
            tokens_per_second: dense reading speed until three steps are seen; None: dense is chosen until then.
            clock: seconds, increasing.

        Raises:
            VariatorError: a value is out of its range.
        """
        if not ratios or any(isinstance(k, int) and k < 2 for k in ratios):
            raise VariatorError(f"a load policy needs ratios of at least 2, got {list(ratios)}")
        numbers = dict(
            target_seconds=target_seconds, release=release, hold_seconds=hold_seconds, free_kv=free_kv,
            utilisation=utilisation, window_seconds=window_seconds,
        )  # fmt: skip
        positive: dict[str, float] = (
            {} if tokens_per_second is None else {"tokens_per_second": tokens_per_second}
        )
        for what, given in (("cost", costs), ("share", shares)):
            positive |= {f"the {what} of {k}": value for k, value in (given or {}).items()}
        for name, value in {**numbers, **positive}.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise VariatorError(f"a load policy needs a number for {name}, got {value!r}")
        if small := [name for name, value in positive.items() if value <= 0]:
            raise VariatorError(
                f"a load policy needs a number above 0 for {small[0]}, got {positive[small[0]]!r}"
            )
        if target_seconds <= 0 or window_seconds <= 0 or hold_seconds < 0 or not 0 <= free_kv <= 1:
            raise VariatorError(
                "a load policy needs target_seconds > 0, window_seconds > 0, hold_seconds >= 0, 0 <= free_kv <= 1"
            )
        if not 0 < release <= 1 or not 0 < utilisation <= 1:
            raise VariatorError("a load policy needs release and utilisation above 0 and at most 1")
        self.ratios: tuple[Ratio, ...] = (0, *dict.fromkeys(ratios))
        self.target_seconds, self.release, self.hold_seconds = target_seconds, release, hold_seconds
        self.free_kv, self.clock, self.speed = free_kv, clock, tokens_per_second
        known = [k for k in self.ratios if isinstance(k, int) and k]
        self.costs: dict[Ratio, float] = {0: 1.0, **{k: 0.3 + 0.7 / k for k in known}, **(costs or {})}
        self.shares: dict[Ratio, float] = {0: 1.0, **{k: 1 / k for k in known}, **(shares or {})}
        if missing := [k for k in self.ratios if k not in self.costs or k not in self.shares]:
            raise VariatorError(f"a load policy needs costs and shares of {', '.join(map(str, missing))}")
        self.utilisation, self.window_seconds = utilisation, window_seconds
        self._arriving, self._arrived_at = 0.0, clock()
        self._steps: deque[tuple[float, float]] = deque()
        self._level = 0
        self._needed_at = -float("inf")

    @property
    def ratio(self) -> Ratio:
        """The ratio of the last choice."""
        return self.ratios[self._level]

    def work(self, tokens: Mapping[Ratio, int]) -> float:
        """Dense tokens that would take as long as `tokens`, given by ratio."""
        return sum(count * self.costs.get(k, 1.0) for k, count in tokens.items())

    def predicted_seconds(self, load: Load, k: Ratio) -> float:
        """Predicted time to first token at ratio `k`; 0 while the speed is unknown."""
        if not self.speed:
            return 0.0
        return (self.work(load.queued) + load.prompt * self.costs[k]) / self.speed

    def choose(self, load: Load) -> Ratio:
        """The ratio for a request that meets this load."""
        now = self.clock()
        self._arriving *= math.exp((self._arrived_at - now) / self.window_seconds)
        self._arriving += load.prompt
        self._arrived_at = now
        small = self._small(load)
        needed = self._needed(load, small, self.target_seconds)
        if needed >= self._level or self._level not in small:
            self._level, self._needed_at = needed, now
        elif now - self._needed_at >= self.hold_seconds:
            share = self.release if load.queued else 1.0  # where nobody waits, the request alone counts
            self._level = min(self._level, self._needed(load, small, self.target_seconds * share))
        return self.ratio

    def _small(self, load: Load) -> list[int]:
        """Levels that the KV cache has room for, by its free share."""
        every = list(range(len(self.ratios)))
        if load.free_kv >= self.free_kv:
            return every
        least = min(self.shares[k] for k in self.ratios)
        if least >= 1:
            return [self._fastest(every)]
        return [level for level in every if self.shares[self.ratios[level]] <= SCARCE * least]

    def _fastest(self, levels: Sequence[int]) -> int:
        return min(levels, key=lambda level: self.costs[self.ratios[level]])

    def _needed(self, load: Load, levels: Sequence[int], seconds: float) -> int:
        """The first of `levels` that meets the target and keeps up; where none does, the fastest."""
        for level in levels:
            k = self.ratios[level]
            if self.predicted_seconds(load, k) <= seconds and self._keeps_up(load, k):
                return level
        return self._fastest(levels)

    def _keeps_up(self, load: Load, k: Ratio) -> bool:
        if not self.speed:
            return True
        before = (self._arriving - load.prompt) / self.window_seconds  # a single prompt is no rate
        return before * self.costs[k] <= self.utilisation * self.speed

    def observe(self, tokens: Mapping[Ratio, int], seconds: float) -> None:
        """Learn the reading speed: the median over the last few thousand tokens, and at least three steps.

        A median, since a server's first pass can be several times slower than all that follow.
        """
        work = self.work(tokens)
        if work <= 0 or seconds <= 0:
            return
        self._steps.append((work / seconds, work))
        total = sum(work for _, work in self._steps)
        while len(self._steps) > 3 and total - self._steps[0][1] >= 4096:
            total -= self._steps.popleft()[1]
        if len(self._steps) < 3 or total < 1024:
            return
        ordered = sorted(self._steps)
        reached = itertools.accumulate(work for _, work in ordered)
        self.speed = next(
            speed for (speed, _), below in zip(ordered, reached, strict=True) if below >= total / 2
        )
