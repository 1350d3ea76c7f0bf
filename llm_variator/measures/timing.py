"""Interleaved timing: every case runs once per repetition, so that a machine that slows down does so for all alike.

A ratio is taken within each repetition, and the median over the repetitions is reported: drift cancels.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from rich.progress import Progress

CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
Name = TypeVar("Name", bound=Hashable)


@dataclasses.dataclass(frozen=True)
class Case:
    """What is timed: `run`, inside the context `inside`; `prepare`, which makes its argument, and `after` are not."""

    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext
    after: Callable[[Any], object] = lambda result: None
    """Gets what `run` returned, of warm-ups too."""


def interleaved(
    cases: Mapping[Name, Case],
    repetitions: int,
    *,
    warmups: int = 1,
    device: torch.device | str = "cpu",
    progress: Callable[[], None] = lambda: None,
    clock: str | Callable[[], float] = "wall",
) -> dict[Name, list[float]]:
    """Seconds of each case in each repetition, in turns; `warmups` rounds before are not counted."""
    now = CLOCKS[clock] if isinstance(clock, str) else clock
    seconds: dict[Name, list[float]] = {name: [] for name in cases}
    for repetition in range(-warmups, repetitions):
        for name, case in cases.items():
            with case.inside():
                state = case.prepare()
                wait(device)
                started = now()
                result = case.run(state)
                wait(device)
                passed = now() - started
                case.after(result)
            del state, result  # the next case has the memory to itself
            if repetition >= 0:
                seconds[name].append(passed)
            progress()
    return seconds


def own_memory(head: Any, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """A pre-hook of the module that makes logits: copy the rows they are made of, with a plugin and without.

    Transformers cuts them out of the prompt as a view, which torch multiplies on a CPU in bf16 by way of a copy of all
    of the head's weights, seconds for LLaMA-7B. Dense would look slower than it has to be: a plugin narrows the last
    layer to such copies.
    """
    return (args[0].clone(memory_format=torch.contiguous_format),)


@contextmanager
def fair_head(base: Any) -> Iterator[None]:
    """A block in which the head of `base` has `own_memory`."""
    head = base.get_output_embeddings()
    handle = None if head is None else head.register_forward_pre_hook(own_memory)
    try:
        yield
    finally:
        if handle is not None:
            handle.remove()


def wait(device: torch.device | str) -> None:
    """Until a GPU has done all it was given; a CPU is never behind."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@dataclasses.dataclass(frozen=True)
class Spread:
    """Median and quartiles; with fewer than three values the quartiles are the extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        median = statistics.median(values)
        if len(values) < 3:
            return cls(median, min(values), max(values))
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """Ours over theirs, repetition by repetition."""
    return Spread.of([a / b for a, b in zip(ours, theirs, strict=True)])


def timed(seconds: Mapping[str, Sequence[float]], name: str, reference: str) -> dict[str, float]:
    """The columns that every table has: milliseconds of `name`, and their ratio to those of `reference`."""
    own, relative = Spread.of(seconds[name]), ratio(seconds[name], seconds[reference])
    return {
        "ms": 1e3 * own.median,
        "ms_low": 1e3 * own.low,
        "ms_high": 1e3 * own.high,
        "of_dense": relative.median,
        "of_dense_low": relative.low,
        "of_dense_high": relative.high,
    }


@contextmanager
def bar(total: int, title: str) -> Iterator[Callable[[], None]]:
    """A progress bar of `total` runs; the block calls what it gets once per run."""
    with Progress(transient=True) as progress:
        task = progress.add_task(title, total=total)
        yield lambda: progress.advance(task)
