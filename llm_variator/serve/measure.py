"""`python -m llm_variator.serve.measure`: what plugins save inside vLLM.

`prefill` times one long prompt at each ratio, interleaved, beside the bound that the operations set; `blocks`
counts KV blocks and requests in a small pool; `load` sends rising arrivals to a running server. Plugins of the
first two are untrained: they cost what trained ones do.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from llm_variator.cli import Parser, names, parse, positive_float, positive_int, run
from llm_variator.config import VariatorConfig
from llm_variator.errors import VariatorError
from llm_variator.flops import Stack, prefill
from llm_variator.integrations.vllm.arguments import engine_arguments
from llm_variator.integrations.vllm.rows import ARGUMENT, AUTO
from llm_variator.loading import load_config, load_model
from llm_variator.model import VariatorModel
from llm_variator.results import write_result
from llm_variator.serve.__main__ import choice

SEED = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; raises VariatorError for wrong input."""
    started = time.perf_counter()
    args = parse(build_parser(), argv)
    figures = {"prefill": measure_prefill, "blocks": measure_blocks, "load": measure_load}[args.what](args)
    print(json.dumps(figures, indent=2))
    if args.json is not None:
        command = ["llm_variator.serve.measure", *(sys.argv[1:] if argv is None else argv)]
        write_result(args.json, figures, command=command, seed=SEED, started=started)


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command line."""
    parser = Parser(prog="python -m llm_variator.serve.measure", description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    for name, text in {"prefill": "wall time of long prompts", "blocks": "KV blocks and requests"}.items():
        offline = kinds.add_parser(name, help=text, description=text)
        offline.add_argument("--model", default="smollm2-135m", help="alias, local folder or hub id")
        offline.add_argument("--k", nargs="+", type=positive_int, default=[2, 4], help="ratios")
        offline.add_argument("--tokens", type=positive_int, default=4096, help="tokens of each prompt")
        offline.add_argument("--dense-tail", type=positive_int, default=64, help="dense last tokens")
        offline.add_argument("--dtype", default="float32", help="of the model, as vLLM calls it")
        offline.add_argument("--block-size", type=positive_int, default=32, help="tokens in a KV block")
        offline.add_argument("--json", type=Path, help="write the figures to this file")
        if name == "prefill":
            offline.add_argument("--sites", type=names, default=("ffn",), help="ffn or ffn,kv")
            offline.add_argument("--repetitions", type=positive_int, default=5, help="of every ratio")
            offline.add_argument(
                "--compile", action="store_true", help="with vLLM's torch.compile; else eager"
            )
        else:
            offline.add_argument("--requests", type=positive_int, default=8, help="prompts at once")
            offline.add_argument(
                "--pool", type=positive_int, help="blocks of the small pool; default: two dense prompts'"
            )
    load = kinds.add_parser("load", help="arrivals at a running server", description=measure_load.__doc__)
    load.add_argument("--url", default="http://127.0.0.1:8000", help="of the server")
    load.add_argument("--model", required=True, help="name of the served model")
    load.add_argument(
        "--choices", nargs="+", type=choice, default=[0, 2, 4, AUTO], help="fixed ratios and auto"
    )
    load.add_argument("--requests", type=positive_int, default=300, help="for each choice")
    load.add_argument("--tokens", type=positive_int, default=512, help="tokens of each prompt")
    load.add_argument("--max-tokens", type=positive_int, default=8, help="generated tokens")
    load.add_argument("--vocabulary", type=positive_int, default=40000, help="prompt tokens are below this")
    load.add_argument("--peak", type=positive_float, default=2.0, help="peak arrivals over dense capacity")
    load.add_argument("--json", type=Path, help="write the figures to this file")
    return parser


# --- inside one process


def untrained_plugins(args: argparse.Namespace, sites: tuple[str, ...], folder: str) -> dict[str, str]:
    """Plugins of the wanted ratios for `args.model`, saved under `folder`."""
    base = load_model(args.model)
    plugins = {}
    for k in args.k:
        config = VariatorConfig(k=k, sites=sites, dense_head=4, dense_tail=args.dense_tail)
        host = VariatorModel(base, config)
        plugins[f"k{k}"] = str(Path(folder) / f"k{k}")
        host.save_pretrained(plugins[f"k{k}"])
        host.unload()
    return plugins


def engine(args: argparse.Namespace, plugins: dict[str, str], **options: Any) -> Any:
    """A vLLM engine in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    settings: dict[str, Any] = dict(
        dtype=args.dtype,
        max_model_len=args.tokens + 64,
        block_size=args.block_size,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        seed=SEED,
    )
    return LLM(**engine_arguments(args.model, plugins, **(settings | options)))


def vllm_version() -> str:
    """Of vLLM as installed."""
    import vllm

    return str(vllm.__version__)


def generate(llm: Any, prompts: list[list[int]], k: int, tokens: int) -> list[Any]:
    """Greedy continuations at one ratio."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args={ARGUMENT: k}
    )
    return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)


def random_prompts(vocabulary: int, tokens: int, count: int) -> list[list[int]]:
    """Prompts of random tokens, distinct from the first on."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(3, vocabulary, (count, tokens), generator=generator).tolist()


def measure_prefill(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds from a prompt to its first token at each ratio, interleaved; medians, and shares of dense."""
    config = load_config(args.model)
    with tempfile.TemporaryDirectory() as folder:
        plugins = untrained_plugins(args, args.sites, folder)
        options = dict(
            max_num_batched_tokens=args.tokens,
            max_num_seqs=1,
            enforce_eager=not args.compile,
            num_gpu_blocks_override=2 * (args.tokens + 64) // args.block_size,
        )
        llm = engine(args, plugins, **options)
    ratios = [0, *args.k]
    prompts = random_prompts(config.vocab_size, args.tokens, (args.repetitions + 1) * len(ratios))
    seconds: dict[int, list[float]] = {k: [] for k in ratios}
    for number, (prompt, k) in enumerate(
        zip(prompts, itertools.cycle(ratios), strict=False)
    ):  # round by round
        began = time.perf_counter()
        generate(llm, [prompt], k, 1)
        if number >= len(ratios):  # the first round warms up
            seconds[k].append(time.perf_counter() - began)
    stack = Stack.of(config)
    dense = prefill(stack, args.tokens).total
    middle = {k: statistics.median(times) for k, times in seconds.items()}

    def bound(k: int) -> float:
        plugin = VariatorConfig(k=k, sites=args.sites, dense_head=4, dense_tail=args.dense_tail)
        return prefill(stack, args.tokens, plugin).total / dense

    return {
        "model": args.model,
        "vllm": vllm_version(),
        "tokens": args.tokens,
        "sites": list(args.sites),
        "dense_tail": args.dense_tail,
        "dtype": args.dtype,
        "compiled": args.compile,
        "threads": torch.get_num_threads(),
        "seconds": {str(k): times for k, times in seconds.items()},
        "median_seconds": {str(k): value for k, value in middle.items()},
        "share_of_dense": {str(k): middle[k] / middle[0] for k in args.k},
        "share_of_operations": {str(k): bound(k) for k in args.k},
    }


def measure_blocks(args: argparse.Namespace) -> dict[str, Any]:
    """Peak KV blocks of several long prompts, and how many fit at once into a small pool; exact counts."""
    config = load_config(args.model)
    prompts = random_prompts(config.vocab_size, args.tokens, args.requests)
    each = -(-(args.tokens + 64) // args.block_size)
    small = args.pool or 2 * each + 1
    figures: dict[str, Any] = {"model": args.model, "vllm": vllm_version(), "dense_tail": args.dense_tail}
    figures |= {"tokens": args.tokens, "requests": args.requests}
    figures |= {"block_size": args.block_size, "small_pool": small, "peak_blocks": {}, "concurrent": {}}
    with tempfile.TemporaryDirectory() as folder:
        plugins = untrained_plugins(args, ("ffn", "kv"), folder)
        for pool in (args.requests * each + 8, small):
            llm = engine(
                args,
                plugins,
                max_num_seqs=args.requests,
                max_num_batched_tokens=args.requests * args.tokens,  # all at once: nobody ends before
                num_gpu_blocks_override=pool,
                enforce_eager=True,
            )
            cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
            for k in (0, *args.k):
                free = cache.block_pool.get_num_free_blocks()
                blocks, requests = _peaks(llm, cache, prompts, k)
                if cache.block_pool.get_num_free_blocks() != free:
                    raise RuntimeError(f"blocks were lost at ratio {k}")
                if pool == small:
                    figures["concurrent"][str(k)] = requests
                else:
                    figures["peak_blocks"][str(k)] = blocks
            llm.llm_engine.engine_core.shutdown()
    peak = figures["peak_blocks"]
    return figures | {"times_fewer_blocks": {str(k): peak["0"] / peak[str(k)] for k in args.k}}


def _peaks(llm: Any, cache: Any, prompts: list[list[int]], k: int) -> tuple[int, int]:
    manager = cache.coordinator.single_type_managers[0]
    allocate, blocks, requests = manager.allocate_new_blocks, 0, 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal blocks, requests
        found = allocate(*args, **kwargs)
        held = [len(own) for own in manager.req_to_blocks.values() if own]
        blocks, requests = max(blocks, sum(held)), max(requests, len(held))
        return found

    manager.allocate_new_blocks = counting
    try:
        generate(llm, prompts, k, 16)
    finally:
        manager.allocate_new_blocks = allocate
    return blocks, requests


# --- over HTTP


def measure_load(args: argparse.Namespace) -> dict[str, Any]:
    """Send the same rising arrivals to a running server for every choice of ratio.

    First a closed loop measures what dense sustains; then arrivals rise from a tenth of it to `--peak` times.
    """
    return asyncio.run(_load(args))


async def _load(args: argparse.Namespace) -> dict[str, Any]:
    try:
        import aiohttp
    except ImportError:
        raise VariatorError(
            "measuring a server needs aiohttp, which vLLM brings: pip install aiohttp"
        ) from None
    prompts = random_prompts(args.vocabulary, args.tokens, args.requests)
    timeout = aiohttp.ClientTimeout(total=3600)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(args.url, timeout=timeout, connector=connector) as session:
        warm = random_prompts(args.vocabulary, args.tokens + 1, 16)
        began = time.perf_counter()
        await asyncio.gather(*(_ask(session, args, prompt, 0) for prompt in warm))
        sustained = len(warm) / (time.perf_counter() - began)
        offsets = _arrivals(args.requests, 0.1 * sustained, args.peak * sustained)
        figures: dict[str, Any] = {"sustained_dense_requests_per_second": sustained, "choices": {}}
        dense: list[list[str]] | None = None
        for choice_ in args.choices:
            counted, start = await _counts(session), time.perf_counter()

            async def arrive(at: float, prompt: list[int], start: float = start, k: Any = choice_) -> Any:
                await asyncio.sleep(max(0.0, start + at - time.perf_counter()))
                return await _ask(session, args, prompt, k)

            answers = await asyncio.gather(*map(arrive, offsets, prompts))
            wall, after = time.perf_counter() - start, await _counts(session)
            texts = [answer[1] for answer in answers]
            dense = texts if choice_ == 0 else dense
            figures["choices"][str(choice_)] = _summary(answers, wall, texts, dense, args.max_tokens) | {
                "requests_by_ratio": {k: after[k] - counted.get(k, 0) for k in after}
            }
    return figures


def _arrivals(requests: int, first: float, last: float) -> list[float]:
    """Seconds at which requests arrive: Poisson, the rate rising linearly from request to request."""
    rng, now, times = random.Random(SEED), 0.0, []
    for number in range(requests):
        now += rng.expovariate(first + (last - first) * number / max(1, requests - 1))
        times.append(now)
    return times


async def _ask(session: Any, args: argparse.Namespace, prompt: list[int], k: Any) -> Any:
    """(seconds to the first token or None, token texts, error) of one streamed completion."""
    body = {"model": args.model, "prompt": prompt, "max_tokens": args.max_tokens, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True, "logprobs": 0, "vllm_xargs": {ARGUMENT: k}}
    began, first, pieces = time.perf_counter(), None, []
    try:
        async with session.post("/v1/completions", json=body) as answer:
            if answer.status != 200:
                return None, [], f"HTTP {answer.status}: {(await answer.text())[:200]}"
            async for line in answer.content:
                text = line.decode().removeprefix("data: ").strip()
                if text and text != "[DONE]":
                    first = first or time.perf_counter() - began
                    pieces += [
                        token for part in json.loads(text)["choices"] for token in part["logprobs"]["tokens"]
                    ]
    except (TimeoutError, OSError, ValueError) as error:
        return None, pieces, repr(error)
    return first, pieces, "" if len(pieces) == args.max_tokens else f"{len(pieces)} tokens"


async def _counts(session: Any) -> dict[str, int]:
    """Requests by ratio so far, from the server's counters."""
    async with session.get("/metrics") as answer:
        lines = (await answer.text()).splitlines()
    found = (line.split('"') for line in lines if line.startswith("variator_requests_total{"))
    return {k: int(float(rest.split()[-1])) for _, k, rest in found}


def _summary(
    answers: list[Any], wall: float, texts: list[list[str]], dense: list[list[str]] | None, tokens: int
) -> dict[str, Any]:
    waits = sorted(wait for wait, _, error in answers if wait is not None and not error)
    errors = [error for _, _, error in answers if error]
    figures: dict[str, Any] = {
        "answered": len(waits),
        "failed": len(errors),
        "errors": sorted(set(errors))[:3],
    }
    if waits:
        peak = sorted(wait for wait, _, error in answers[len(answers) * 3 // 4 :] if wait and not error)
        figures |= {f"first_token_p{q}": waits[int(q / 100 * (len(waits) - 1))] for q in (50, 99)}
        figures |= {f"peak_first_token_p{q}": peak[int(q / 100 * (len(peak) - 1))] for q in (50, 99) if peak}
        figures["requests_per_second"] = len(waits) / wall
    if dense is not None:
        pairs = [
            (a, b) for own, other in zip(texts, dense, strict=True) for a, b in zip(own, other, strict=False)
        ]
        figures["tokens_as_dense"] = sum(a == b for a, b in pairs) / max(1, len(dense) * tokens)
    return figures


if __name__ == "__main__":
    run(main)
