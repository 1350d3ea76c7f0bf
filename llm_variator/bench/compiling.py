"""`bench compile`: torch.compile beside the eager model, with its graph breaks and recompilations."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llm_variator.bench.setting import DENSE, Setting, Settings
from llm_variator.cli import flag
from llm_variator.cli.values import PositiveInt
from llm_variator.engine.hooks.compiled import DECODE, PREFILL
from llm_variator.measures.timing import Case, Spread, bar, ratio

_EAGER, _COMPILED = "eager", "compiled"
_KINDS = {"prefill": PREFILL, "decode": DECODE}


@dataclass(frozen=True, kw_only=True)
class Compile(Settings):
    """torch.compile beside the eager model.

    prefill: time to generate one token; decode: time of each further one. of eager: median over the repetitions of
    compiled over eager time, with quartiles. graphs: how often torch compiled such passes, over all lengths and one
    more; breaks: of any graph. same: compiled and eager generate make the same tokens, at every length. --json also
    stores the reason for every break and recompilation.
    """

    plugins: tuple[str, ...] = ("ffn,kv:2",)
    tokens: tuple[PositiveInt, ...] = (128, 512)
    steps: PositiveInt = flag(16, "tokens generated after the first")
    backend: str = flag("inductor", "of torch.compile; eager: traces, and generates no code")


def rows(setting: Setting[Compile]) -> list[dict[str, Any]]:
    """For dense and every plugin, prefill and decode: what torch compiled, and the time."""
    settings, model = setting.settings, setting.model
    model.decoder_only("bench compile", "see VariatorModel.compile")
    names = [DENSE, *setting.names]
    made: list[dict[str, Any]] = []
    with bar(4 * len(names) * len(settings.tokens) * (settings.repetitions + 1), "compile") as advance:
        for name in names:
            with setting.using(name)():
                facts, graphs = _compile(setting)
                for tokens in settings.tokens:
                    seconds = _seconds(setting, setting.ids(1, tokens), advance)
                    for kind, code in _KINDS.items():
                        times = {case: seconds[case, kind] for case in (_EAGER, _COMPILED)}
                        row = {"case": f"{name}, {kind}", "tokens": tokens, **_columns(times), **facts}
                        reasons = [graph.recompile_reason for graph in graphs if graph.co_name == code]
                        made.append(row | {"graphs": len(reasons), "recompile_reasons": reasons[1:]})
                model.uncompile()
    return made


def _compile(setting: Setting[Compile]) -> tuple[dict[str, Any], list[Any]]:
    """Generate eagerly and compiled at every length: what torch had to say, and all that it compiled."""
    from torch._dynamo.utils import clear_compilation_metrics, counters, get_compilation_metrics

    lengths = setting.settings.tokens
    prompts = [setting.ids(1, tokens) for tokens in (*lengths, max(lengths) + 1)]
    eager = [_generate(setting, ids) for ids in prompts]
    torch._dynamo.reset()
    clear_compilation_metrics()
    counters.clear()
    started = time.perf_counter()
    setting.model.compile(
        fullgraph=False, backend=setting.settings.backend
    )  # so that breaks are counted, not raised
    compiled = [_generate(setting, ids) for ids in prompts]
    facts = {
        "same": all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True)),
        "breaks": sum(counters["graph_break"].values()),
        "break_reasons": list(counters["graph_break"]),
        "compile_seconds": time.perf_counter() - started,
    }
    return facts, get_compilation_metrics()


def _generate(setting: Setting[Compile], ids: Tensor, more: int | None = None) -> Tensor:
    new = 1 + (setting.settings.steps if more is None else more)
    made = setting.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False
    )
    assert isinstance(made, Tensor)
    return made


def _seconds(setting: Setting[Compile], ids: Tensor, advance: Any) -> dict[tuple[str, str], list[float]]:
    """Seconds of (eager or compiled, prefill or one step of decoding), by repetition."""
    stack, steps = setting.base.base_model, setting.settings.steps
    code = stack._compiled_call_impl

    @contextlib.contextmanager
    def calling(case: str) -> Iterator[None]:
        stack._compiled_call_impl = code if case == _COMPILED else None
        try:
            yield
        finally:
            stack._compiled_call_impl = code

    def timed(case: str, more: int) -> Case:
        return Case(lambda _: _generate(setting, ids, more), inside=lambda: calling(case))

    cases = {f"{case} {more}": timed(case, more) for case in (_EAGER, _COMPILED) for more in (0, steps)}
    measured = setting.interleaved(cases, advance)
    found = {}
    for case in (_EAGER, _COMPILED):
        short, long = measured[f"{case} 0"], measured[f"{case} {steps}"]
        found[case, "prefill"] = short
        found[case, "decode"] = [(b - a) / steps for a, b in zip(short, long, strict=True)]
    return found


def _columns(times: dict[str, list[float]]) -> dict[str, float]:
    relative = ratio(times[_COMPILED], times[_EAGER])
    return {
        "eager_ms": 1e3 * Spread.of(times[_EAGER]).median,
        "ms": 1e3 * Spread.of(times[_COMPILED]).median,
        "of_eager": relative.median,
        "of_eager_low": relative.low,
        "of_eager_high": relative.high,
    }
