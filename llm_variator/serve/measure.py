"""`python -m llm_variator.serve.measure`: what plugins save inside vLLM, and whether answers stay the same.

`prefill` times one long prompt at each ratio, interleaved, beside the bound that the operations set; `blocks`
counts KV blocks and requests in a small pool, beside vLLM without plugins; `answers` compares tokens with the Hugging
Face path; `load` sends rising arrivals to a server, which it starts with vLLM's flags after a bare `--`. Plugins that
are not given are untrained: they cost what trained ones do.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_variator import cli
from llm_variator.cli import flag, flags
from llm_variator.cli.values import PositiveInt
from llm_variator.config import CONFIG_FILE, VariatorConfig
from llm_variator.errors import VariatorError
from llm_variator.integrations.vllm.rows import ratio_of
from llm_variator.measures.operations import Stack, prefill
from llm_variator.measures.results import write_result
from llm_variator.measures.timing import Case, interleaved, ratio
from llm_variator.model import VariatorModel
from llm_variator.serve.answers import Answers, measure_answers
from llm_variator.serve.blocks import Peak, block_bytes, in_use, table_count
from llm_variator.serve.engine import SEED, engine, generate, vllm_version
from llm_variator.serve.flags import Choice, Plugins, parse_plugins, split
from llm_variator.serve.load import Load, measure_load
from llm_variator.sources.models import load_config, load_model, plugin_folder


@dataclass(frozen=True, kw_only=True)
class Prompts(Plugins):
    """Prompts and KV cache."""

    tokens: PositiveInt = flag(4096, "tokens of each prompt")
    block_size: PositiveInt = flag(32, "tokens in a KV block")


@dataclass(frozen=True, kw_only=True)
class Prefill(flags.Stored, Prompts):
    """Wall time of long prompts."""

    repetitions: PositiveInt = flag(5, "of every ratio")
    compile: bool = flag(False, "with vLLM's torch.compile; else eager")


@dataclass(frozen=True, kw_only=True)
class Blocks(flags.Stored, Prompts):
    """KV blocks and requests."""

    requests: PositiveInt = flag(8, "prompts at once")
    pool: PositiveInt | None = flag(None, "dense blocks of the small pool; default: two dense prompts'")
    chunk: PositiveInt | None = flag(None, "tokens that a step reads; default: all prompts at once")


def read(argv: Sequence[str] | None = None) -> Prefill | Blocks | Answers | Load:
    """The settings that a command line, with its recipe, gives."""
    settings: Prefill | Blocks | Answers | Load = cli.read_command(
        {"prefill": Prefill, "blocks": Blocks, "answers": Answers, "load": Load},
        split(argv)[0],
        prog="python -m llm_variator.serve.measure",
        text="Measure what plugins save inside vLLM.",
    )
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; raises VariatorError for wrong input."""
    started = time.perf_counter()
    settings, server_flags = read(argv), split(argv)[1]
    if server_flags and not isinstance(settings, Load):
        raise VariatorError(
            f"{' '.join(server_flags)}: words after -- are a server's, which load alone starts"
        )
    with tempfile.TemporaryDirectory() as folder:
        plugins = make_plugins(settings, folder)
        match settings:
            case Prefill():
                figures = measure_prefill(settings, plugins)
            case Blocks():
                figures = measure_blocks(settings, plugins)
            case Answers():
                figures = measure_answers(settings, plugins)
            case Load():
                figures = measure_load(settings, plugins, server_flags)
    print(json.dumps(figures, indent=2))
    if settings.json is not None:
        command = ["llm_variator.serve.measure", *(sys.argv[1:] if argv is None else argv)]
        write_result(settings.json, figures, command=command, seed=SEED, started=started)


# --- inside one process


def make_plugins(settings: Plugins, folder: str) -> dict[str, str]:
    """The plugins that were given and, under `folder`, untrained ones of the other ratios, by name."""
    plugins = parse_plugins(settings.plugin)
    if isinstance(settings, Load) and settings.url:
        return plugins  # the server has its own
    for k in settings.k:
        if f"k{k}" not in plugins:
            config = VariatorConfig(k=k, sites=settings.sites, dense_head=4, dense_tail=settings.dense_tail)
            plugins[f"k{k}"] = str(Path(folder) / f"k{k}")
            VariatorModel(load_model(settings.model), config).save_pretrained(plugins[f"k{k}"])
    return plugins


def random_prompts(vocabulary: int, tokens: int, count: int) -> list[list[int]]:
    """Prompts of random tokens, distinct from the first on."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(3, vocabulary, (count, tokens), generator=generator).tolist()


def measure_prefill(settings: Prefill, plugins: dict[str, str]) -> dict[str, Any]:
    """Seconds from a prompt to its first token at each ratio, interleaved, and the median share of dense."""
    config = load_config(settings.model)
    llm = engine(
        settings,
        plugins,
        max_num_batched_tokens=settings.tokens,
        longest=settings.tokens + 64,
        block_size=settings.block_size,
        max_num_seqs=1,
        enforce_eager=not settings.compile,
        num_gpu_blocks_override=table_count(settings.model, plugins)
        * (2 * (settings.tokens + 64) // settings.block_size),
    )
    names = {ratio_of(name): plugin for name, plugin in plugins.items()}
    ratios: list[Choice] = [0, *names]
    prompts = random_prompts(config.vocab_size, settings.tokens, (settings.repetitions + 1) * len(ratios))
    fresh = partial(next, iter(prompts))

    def answering(k: Choice) -> Case:
        return Case(lambda prompt: generate(llm, [prompt], [k], 1), prepare=fresh)

    seconds = interleaved({k: answering(k) for k in ratios}, settings.repetitions)
    stack = Stack.of(config)
    dense = prefill(stack, settings.tokens).total
    middle = {k: statistics.median(times) for k, times in seconds.items()}

    def bound(k: Choice) -> float:
        plugin = VariatorConfig.from_json(plugin_folder(names[k]) / CONFIG_FILE)
        return prefill(stack, settings.tokens, plugin).total / dense

    return {
        "model": settings.model,
        "vllm": vllm_version(),
        "tokens": settings.tokens,
        "sites": list(settings.sites),
        "plugin": list(settings.plugin),
        "dense_tail": settings.dense_tail,
        "dtype": settings.dtype,
        "compiled": settings.compile,
        "threads": torch.get_num_threads(),
        "seconds": {str(k): times for k, times in seconds.items()},
        "median_seconds": {str(k): value for k, value in middle.items()},
        "share_of_dense": {str(k): ratio(seconds[k], seconds[0]).median for k in names},
        "share_of_operations": {str(k): bound(k) for k in names},
    }


def measure_blocks(settings: Blocks, plugins: dict[str, str]) -> dict[str, Any]:
    """Peak KV blocks of several long prompts, and how many fit at once into a small pool; exact counts.

    Plugins with several block tables have smaller blocks than vLLM without plugins: they are compared with its blocks,
    and its small pool, by their bytes.
    """
    config = load_config(settings.model)
    prompts = random_prompts(config.vocab_size, settings.tokens, settings.requests)
    each = -(-(settings.tokens + 64) // settings.block_size)
    pool = settings.pool or 2 * each + 1
    tables = table_count(settings.model, plugins)
    served = {"without_plugins": {}, "": plugins} if tables > 1 else {"": plugins}
    figures: dict[str, Any] = {
        "model": settings.model,
        "vllm": vllm_version(),
        "plugin": list(settings.plugin),
    }
    figures |= {"dense_tail": settings.dense_tail, "tokens": settings.tokens, "requests": settings.requests}
    figures |= {"block_size": settings.block_size, "chunk": settings.chunk}
    pool_bytes = None
    for name, folders in served.items():
        count = tables if folders else 1
        blocks, size = _peaks(settings, folders, prompts, count * (settings.requests * each + 8))
        pool = pool if pool_bytes is None else pool_bytes // size
        pool_bytes = pool * size
        small, _ = _peaks(settings, folders, prompts, pool)
        counts: dict[str, Any] = {"block_tables": count, "block_bytes": size, "small_pool": pool}
        counts["peak_blocks"] = {k: peak.blocks for k, peak in blocks.items()}
        counts["concurrent"] = {k: peak.requests for k, peak in small.items()}
        figures |= {name: counts} if name else counts
    dense, peaks = figures.get("without_plugins", figures), figures["peak_blocks"]
    most = dense["peak_blocks"]["0"] * dense["block_bytes"]
    return figures | {
        "share_of_dense_bytes": {k: count * figures["block_bytes"] / most for k, count in peaks.items()},
        "times_fewer_blocks": {k: peaks["0"] / count for k, count in peaks.items() if k != "0"},
    }


def _peaks(
    settings: Blocks, plugins: dict[str, str], prompts: list[list[int]], pool: int
) -> tuple[dict[str, Peak], int]:
    """The peak at every ratio in a pool of so many blocks, and the bytes of a block."""
    llm = engine(
        settings,
        plugins,
        longest=settings.tokens + 64,
        block_size=settings.block_size,
        max_num_seqs=settings.requests,
        # by default all at once: nobody ends before
        max_num_batched_tokens=settings.chunk or settings.requests * settings.tokens,
        num_gpu_blocks_override=pool,
        enforce_eager=True,
    )
    cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    found = {}
    ratios: list[Choice] = [0, *map(ratio_of, plugins)]
    for k in ratios:
        free = cache.block_pool.get_num_free_blocks()
        with in_use(cache) as found[str(k)]:
            generate(llm, prompts, [k] * len(prompts), 16)
        if cache.block_pool.get_num_free_blocks() != free:
            raise RuntimeError(f"blocks were lost at ratio {k}")
    size = block_bytes(cache)
    llm.llm_engine.engine_core.shutdown()
    return found, size


if __name__ == "__main__":
    cli.run(main)
