"""`bench profile`: where the time of one prefill and of one decoding step goes, kernel by kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from llm_variator.bench.reading import random_cache
from llm_variator.bench.setting import DENSE, Batches, Setting, Settings
from llm_variator.cli import flag
from llm_variator.cli.values import PositiveInt
from llm_variator.measures.timing import CLOCKS, bar, wait

_NAME = 100
"""Characters of a kernel's name: those of templates have thousands."""
BUSY, REST = "all kernels", "other kernels"


@dataclass(frozen=True, kw_only=True)
class Profile(Batches, Settings):
    """Where the time of one pass goes, kernel by kernel.

    By torch's profiler: on a GPU its kernels, on a CPU torch's operators, each without what it calls. ms: of all its
    calls in one pass; share: of what all kernels take. of busy: the time of the same pass without the profiler over
    that; far above 1 the device waits for launches. decode: one token after a cache of random values.
    """

    plugins: tuple[str, ...] = ("ffn,kv:2", "kept:0.25")
    tokens: tuple[PositiveInt, ...] = (2048,)
    kernels: PositiveInt = flag(15, "rows of each table; what is left is summed up")


def rows(setting: Setting[Profile]) -> list[dict[str, Any]]:
    """The kernels of a prefill and of a decoding step, dense and with every plugin."""
    settings, model = setting.settings, setting.model
    model.decoder_only("bench profile", "it profiles a prefill and a step of decoding")
    names = [DENSE, *setting.names]
    total = 2 * len(names) * len(settings.tokens) * len(settings.batch_sizes)
    with bar(total, "profile") as advance, torch.inference_mode():

        def measure(tokens: int, batch: int) -> list[dict[str, Any]]:
            found = []
            for name in names:
                for kind, run in _passes(setting, name, tokens, batch).items():
                    with setting.using(name)():
                        table = _profiled(run, setting.device, settings)
                    where = {"case": f"{name}, {kind}", "tokens": tokens, "batch": batch}
                    found += [where | row for row in table]
                    advance()
            return found

        return setting.each_size(measure)


def _passes(setting: Setting[Profile], name: str, tokens: int, batch: int) -> dict[str, Callable[[], object]]:
    ids, token = setting.ids(batch, tokens), setting.ids(batch, 1)
    cache = random_cache(setting, name, batch, tokens)
    return {
        "prefill": lambda: setting.model(ids, use_cache=True, logits_to_keep=1),
        "decode": lambda: setting.model(token, cache=cache, use_cache=True),
    }


def _profiled(run: Callable[[], object], device: str, settings: Profile) -> list[dict[str, Any]]:
    """The kernels of one pass, those that take longest first, after as many passes without the profiler."""
    now, seconds = CLOCKS[settings.clock], []
    for _ in range(1 + settings.repetitions):
        wait(device)
        started = now()
        run()
        wait(device)
        seconds.append(now() - started)
    gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with profile(activities=activities, acc_events=True) as found:
        run()
        wait(device)
    kind = DeviceType.CUDA if gpu else DeviceType.CPU
    times = [
        (event.key, event.self_device_time_total if gpu else event.self_cpu_time_total, event.count)
        for event in found.key_averages()
        if event.device_type == kind and not event.is_user_annotation
    ]
    return table(times, sorted(seconds[1:])[len(seconds[1:]) // 2], settings.kernels)


def table(times: list[tuple[str, float, int]], seconds: float, most: int) -> list[dict[str, Any]]:
    """Rows of kernels from their (name, microseconds, calls); `seconds`: of the whole pass without the profiler."""
    times = sorted(((name, us, calls) for name, us, calls in times if us > 0), key=lambda row: -row[1])
    whole = sum(us for _, us, _ in times)
    shown = [(name[:_NAME], us, calls) for name, us, calls in times[:most]]
    if rest := times[most:]:
        shown.append((REST, sum(us for _, us, _ in rest), sum(calls for *_, calls in rest)))
    every = {"kernel": BUSY, "calls": sum(calls for *_, calls in times), "ms": whole / 1e3, "share": 1.0}
    return [
        every | {"of_busy": 1e6 * seconds / whole if whole else None},
        *({"kernel": name, "calls": calls, "ms": us / 1e3, "share": us / whole} for name, us, calls in shown),
    ]
