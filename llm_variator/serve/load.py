"""Rising arrivals at a server: time to the first token, throughput, ratios and answers for every choice of ratio.

Arrivals are a Poisson process whose rate rises linearly in time, from a tenth of what dense sustains to `--peak`
times that. After the last answer a calm while and three single requests show whether "auto" returns to dense.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from llm_variator.cli import flag, flags
from llm_variator.cli.values import JsonMapping, OutputFile, PositiveFloat, PositiveInt
from llm_variator.errors import VariatorError
from llm_variator.extras import needed
from llm_variator.integrations.vllm.rows import ARGUMENT, AUTO
from llm_variator.serve.flags import Choice, Plugins
from llm_variator.serve.prompts import QUESTIONS, Asked, Judge, prompts_from
from llm_variator.sources.corpora import EMBEDDED

SEED = 0
FIRST_RATE = 0.1  # of what dense sustains
PHASES = 10  # of the time in which requests arrive
_SALTS = itertools.count(time.time_ns())
CALM_SECONDS, CALM_REQUESTS = 12.0, 3
START_SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Load(flags.Stored, Plugins):
    """Rising arrivals over HTTP."""

    url: str | None = flag(None, "of a running server; default: start one, for as long as it takes")
    log: OutputFile | None = flag(None, "file for the output of a server that is started")
    policy: JsonMapping | None = flag(None, "arguments of its LoadPolicy, as JSON")
    choices: tuple[Choice, ...] = flag(
        (0, 2, 4, AUTO),
        "fixed ratios and auto; no word: no server, the answers of --earlier are judged anew",
        may_be_empty=True,
    )
    requests: PositiveInt = flag(300, "for each choice")
    tokens: tuple[PositiveInt, ...] = flag((384, 640), "shortest and longest prompt")
    max_tokens: PositiveInt = flag(8, "generated tokens")
    data: str = flag(
        EMBEDDED,
        f"text the prompts are cut from, a source as in training; or {QUESTIONS}: questions, with judged answers",
    )
    peak: PositiveFloat = flag(2.0, "peak arrivals over dense capacity")
    earlier: tuple[Path, ...] = flag(
        (),
        "results of other choices: their dense capacity is used, their answers are compared with",
        metavar="FILE",
    )

    def __post_init__(self) -> None:
        if self.peak <= FIRST_RATE:
            raise VariatorError(
                f"--peak is where arrivals rise to from {FIRST_RATE:g}: give more, not {self.peak:g}"
            )
        given = {"--policy": self.policy, "--log": self.log}
        if self.url and (surplus := [name for name, value in given.items() if value is not None]):
            raise VariatorError(
                f"{', '.join(surplus)}: of a server that is started; the one at --url runs already, leave out either"
            )


class Answer(NamedTuple):
    """What became of one request."""

    arrived: float
    """Seconds after the start."""
    first: float | None
    """Seconds to the first token."""
    last: float
    """Seconds to the end of the answer."""
    tokens: list[int]
    error: str
    """Empty where all is well."""


def measure_load(settings: Load, plugins: dict[str, str], server_flags: list[str]) -> dict[str, Any]:
    """Send the same rising arrivals for each of `settings.choices`, to `settings.url` or to a server of our own."""
    if settings.url and server_flags:
        raise VariatorError(
            f"{' '.join(server_flags)}: of a server that is started; the one at --url runs already, leave out either"
        )
    earlier, shared = [_read(path) for path in settings.earlier], _shared(settings, server_flags)
    for figures in earlier:
        if differs := [name for name, value in shared.items() if figures["settings"].get(name) != value]:
            raise VariatorError(f"--earlier was measured with other settings: {', '.join(differs)}")
    asked = prompts_from(
        settings.data,
        settings.model,
        count=settings.requests,
        lengths=settings.tokens,
        seed=SEED,
        max_tokens=settings.max_tokens,
    )
    if not settings.choices:
        return _judged(earlier, asked)
    own = contextlib.nullcontext(settings.url) if settings.url else served(settings, plugins, server_flags)
    with own as url:
        return {"settings": shared, **asyncio.run(_load(settings, url, asked, earlier))}


def _shared(settings: Load, server_flags: list[str]) -> dict[str, Any]:
    """What runs must share to be compared."""
    return {
        "model": settings.model,
        "data": settings.data,
        "requests": settings.requests,
        "prompt_tokens": list(settings.tokens),
        "answer_tokens": settings.max_tokens,
        "dtype": settings.dtype,
        "peak": settings.peak,
        "server_flags": server_flags,
    }


def arrivals(requests: int, first: float, last: float, seed: int = SEED) -> list[float]:
    """Seconds at which requests arrive: Poisson, the rate rising linearly in time from `first` to `last` a second."""
    rng, expected, times = random.Random(seed), 0.0, []
    rise = (last**2 - first**2) / (2 * requests)  # of the rate, each second: it ends at `last`
    for _ in range(requests):
        expected += rng.expovariate(1.0)
        times.append((math.sqrt(first**2 + 2 * rise * expected) - first) / rise)
    return times


# --- the server


@contextlib.contextmanager
def served(settings: Load, plugins: dict[str, str], server_flags: list[str]) -> Iterator[str]:
    """The address of a server with these plugins, which lives as long as the context."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-m", "llm_variator.serve", "--model", settings.model, "--port", str(port)]
    words += ["--plugin", *(f"{name}={plugin}" for name, plugin in plugins.items()), "--host", "127.0.0.1"]
    words += ["--dtype", settings.dtype, "--policy", json.dumps(settings.policy or {}), "--"]
    words += ["--max-model-len", str(settings.tokens[-1] + settings.max_tokens)]
    words += ["--disable-uvicorn-access-log", "--no-enable-prefix-caching"]  # no prompt is read twice
    words += server_flags
    with settings.log.open("wb") if settings.log else contextlib.nullcontext(subprocess.DEVNULL) as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    try:
        asyncio.run(_answers(f"http://127.0.0.1:{port}", process))
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


async def _answers(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    async with _session(url) as session:
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                async with session.get("/health") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.5)
    raise VariatorError("the server did not start: see its output with --log FILE")


# --- the clients


def _session(url: str) -> Any:
    aiohttp = needed("aiohttp", "measuring a server", "vllm")
    return aiohttp.ClientSession(
        url, timeout=aiohttp.ClientTimeout(total=3600), connector=aiohttp.TCPConnector(limit=0)
    )


async def _load(settings: Load, url: str, asked: Asked, earlier: list[dict[str, Any]]) -> dict[str, Any]:
    prompts = asked.prompts
    known = {choice: row for figures in earlier for choice, row in figures["choices"].items()}
    async with _session(url) as session:
        sustained = next((figures["sustained_dense_requests_per_second"] for figures in earlier), None)
        if sustained is None:
            sustained = await _sustained(session, settings, prompts)
        offsets = arrivals(settings.requests, FIRST_RATE * sustained, settings.peak * sustained)
        found: dict[str, Any] = {}
        stopped = ""
        for choice in settings.choices:
            try:
                row = await _run(session, settings, prompts, offsets, choice)
            except _lost() as failure:
                stopped = f"at {choice}: {failure!r}"
                break
            found[str(choice)] = row | _compared(choice, row, known | found | {str(choice): row}, asked.judge)
    if stopped and not found:
        raise VariatorError(f"the server was lost {stopped}: see its output with --log FILE")
    return {
        "policy": settings.policy or {},
        "sustained_dense_requests_per_second": sustained,
        "arriving_seconds": offsets[-1],
        "choices": found,
        **({"stopped": stopped} if stopped else {}),
    }


def _lost(*more: type[Exception]) -> tuple[type[Exception], ...]:
    """What a request to a server that is gone ends with, and `more`."""
    import aiohttp

    return aiohttp.ClientError, TimeoutError, OSError, *more


async def _sustained(session: Any, settings: Load, prompts: list[list[int]]) -> float:
    """Requests a second that dense answers when all arrive at once, after warming up."""
    sample = prompts[:: max(1, len(prompts) // 24)][:24]
    await asyncio.gather(*(_ask(session, settings, prompt, 0) for prompt in sample[:2]))
    began = time.perf_counter()
    answers = await asyncio.gather(*(_ask(session, settings, prompt, 0) for prompt in sample))
    if errors := [answer.error for answer in answers if answer.error]:
        raise VariatorError(f"the server does not answer as it should: {errors[0]}")
    return len(sample) / (time.perf_counter() - began)


async def _run(
    session: Any, settings: Load, prompts: list[list[int]], offsets: list[float], choice: int | str
) -> dict[str, Any]:
    for prompt in prompts[:2]:  # whatever this ratio has to do once
        await _ask(session, settings, prompt[::-1], 0 if choice == AUTO else choice)
    counts, start = [await _counts(session)], time.perf_counter()

    async def arrive(at: float, prompt: list[int]) -> Answer:
        await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
        return await _ask(session, settings, prompt, choice, start)

    async def watch() -> None:
        for phase in range(PHASES):
            await asyncio.sleep(max(0.0, start + offsets[-1] * (phase + 1) / PHASES - time.perf_counter()))
            counts.append(await _counts(session))

    answers, _ = await asyncio.gather(asyncio.gather(*map(arrive, offsets, prompts)), watch())
    wall = time.perf_counter() - start
    total = await _counts(session) - counts[0]
    await asyncio.sleep(CALM_SECONDS if choice == AUTO else 0.0)
    before = await _counts(session)
    if choice == AUTO:
        for prompt in prompts[:CALM_REQUESTS]:
            await _ask(session, settings, prompt[::-1], choice)
    return _summary(answers, wall) | {
        "requests_by_ratio": dict(sorted(total.items())),
        "requests_by_ratio_and_phase": [
            dict(sorted((after - earlier).items())) for earlier, after in itertools.pairwise(counts)
        ],
        "requests_by_ratio_when_calm_again": dict(await _counts(session) - before),
        "answers": [" ".join(map(str, answer.tokens)) for answer in answers],
    }


async def _ask(
    session: Any, settings: Load, prompt: Sequence[int], choice: int | str, start: float = 0.0
) -> Answer:
    """One streamed completion."""
    body = {"model": settings.model, "prompt": list(prompt), "max_tokens": settings.max_tokens}
    body |= {"stream": True, "ignore_eos": True, "logprobs": 0, "return_tokens_as_token_ids": True}
    body |= {"temperature": 0, "vllm_xargs": {ARGUMENT: choice}}
    body |= {
        "cache_salt": str(next(_SALTS))
    }  # no prompt is read from what the server kept of another request
    began, first, tokens, error = time.perf_counter(), None, [], ""
    try:
        async with session.post("/v1/completions", json=body) as answer:
            if answer.status != 200:
                error = f"HTTP {answer.status}: {(await answer.text())[:200]}"
            async for line in answer.content:
                text = line.decode().removeprefix("data: ").strip()
                if not error and text and text != "[DONE]":
                    first = first or time.perf_counter() - began
                    for part in json.loads(text)["choices"]:
                        tokens += [int(name.partition(":")[2]) for name in part["logprobs"]["tokens"]]
    except _lost(ValueError, KeyError) as failure:
        error = repr(failure)
    if not error and len(tokens) != settings.max_tokens:
        error = f"{len(tokens)} tokens"
    return Answer(began - start, first, time.perf_counter() - began, tokens, error)


async def _counts(session: Any) -> Counter[str]:
    """Requests by ratio so far, from the server's counters."""
    async with session.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    found = (line.split('"') for line in lines if line.startswith("variator_requests_total{"))
    return Counter({k: int(float(rest.split()[-1])) for _, k, rest in found})


# --- figures


def _summary(answers: list[Answer], wall: float) -> dict[str, Any]:
    good = [answer for answer in answers if not answer.error]
    peak = [answer for answer in answers[len(answers) * 3 // 4 :] if not answer.error]
    figures: dict[str, Any] = {
        "answered": len(good),
        "failed": len(answers) - len(good),
        "errors": sorted({answer.error for answer in answers if answer.error})[:3],
        "requests_per_second": len(good) / wall,
        "seconds": wall,
    }
    for name, part in {"": good, "peak_": peak}.items():
        waits = [answer.first for answer in part if answer.first is not None]
        if waits:
            figures |= {f"{name}first_token_p{q}": quantile(waits, q / 100) for q in (50, 99)}
    return figures


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _compared(
    choice: int | str, row: dict[str, Any], known: dict[str, Any], judge: Judge | None = None
) -> dict[str, Any]:
    """How right a run's answers are and how like the dense run's; each of auto's must be that of some fixed ratio."""
    answers = _token_ids(row)
    fixed = {name: _token_ids(other) for name, other in known.items() if name != AUTO}
    dense = fixed.get("0")
    figures = judge(answers, dense) if judge else {}
    if dense and any(dense):
        pairs = [
            (ours, theirs)
            for own, other in zip(answers, dense, strict=True)
            for ours, theirs in zip(own, other, strict=False)
        ]
        figures["tokens_as_dense"] = sum(a == b for a, b in pairs) / sum(map(len, dense))
        firsts = [own[:1] == other[:1] for own, other in zip(answers, dense, strict=True)]
        figures["first_tokens_as_dense"] = sum(firsts) / len(firsts)
    if choice == AUTO and fixed:
        strange = [own for own, *others in zip(answers, *fixed.values(), strict=True) if own not in others]
        figures |= {"answers_unlike_every_fixed_ratio": len(strange), "fixed_ratios": sorted(fixed)}
    return figures


def _judged(earlier: list[dict[str, Any]], asked: Asked) -> dict[str, Any]:
    """The earlier figures, with what is said of answers made anew."""
    if not earlier:
        raise VariatorError(
            "there is nothing to do: give --choices, or --earlier FILE to judge its answers anew"
        )
    known = {choice: row for figures in earlier for choice, row in figures["choices"].items()}
    again = {choice: row | _compared(choice, row, known, asked.judge) for choice, row in known.items()}
    return earlier[-1] | {"choices": again}


def _token_ids(row: dict[str, Any]) -> list[list[int]]:
    return [[int(token) for token in answer.split()] for answer in row["answers"]]


def _read(path: Path) -> dict[str, Any]:
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["figures"]
        figures["settings"], figures["choices"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise VariatorError(f"{path} is no result of this command ({error!r})") from None
    return figures
