"""`python -m llm_variator.serve.measure`: what plugins save inside vLLM.

`prefill` times one long prompt at each ratio, interleaved, beside the bound that the operations set; `blocks`
counts KV blocks and requests in a small pool; `load` sends rising arrivals to a server, which it starts with vLLM's
flags after a bare `--`. Plugins that are not given are untrained: they cost what trained ones do.
"""

from __future__ import annotations

import json
import os
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
from llm_variator.integrations.vllm.arguments import engine_arguments
from llm_variator.integrations.vllm.rows import ARGUMENT
from llm_variator.measures.operations import Stack, prefill
from llm_variator.measures.results import write_result
from llm_variator.measures.timing import Case, interleaved, ratio
from llm_variator.model import VariatorModel
from llm_variator.serve.flags import Plugins, parse_plugins, split
from llm_variator.serve.load import Load, measure_load
from llm_variator.sources.models import load_config, load_model, plugin_folder

SEED = 0


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
    pool: PositiveInt | None = flag(None, "blocks of the small pool; default: two dense prompts'")


def read(argv: Sequence[str] | None = None) -> Prefill | Blocks | Load:
    """The settings that a command line, with its recipe, gives."""
    settings: Prefill | Blocks | Load = cli.read_command(
        {"prefill": Prefill, "blocks": Blocks, "load": Load},
        split(argv)[0],
        prog="python -m llm_variator.serve.measure",
        text="Measure what plugins save inside vLLM.",
    )
    return settings


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; raises VariatorError for wrong input."""
    started = time.perf_counter()
    settings, server_flags = read(argv), split(argv)[1]
    with tempfile.TemporaryDirectory() as folder:
        plugins = make_plugins(settings, folder)
        match settings:
            case Prefill():
                figures = measure_prefill(settings, plugins)
            case Blocks():
                figures = measure_blocks(settings, plugins)
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


def engine(settings: Prompts, plugins: dict[str, str], **options: Any) -> Any:
    """A vLLM engine in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    defaults: dict[str, Any] = dict(
        dtype=settings.dtype,
        max_model_len=settings.tokens + 64,
        block_size=settings.block_size,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        seed=SEED,
    )
    return LLM(**engine_arguments(settings.model, plugins, **(defaults | options)))


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


def measure_prefill(settings: Prefill, plugins: dict[str, str]) -> dict[str, Any]:
    """Seconds from a prompt to its first token at each ratio, interleaved, and the median share of dense."""
    config = load_config(settings.model)
    llm = engine(
        settings,
        plugins,
        max_num_batched_tokens=settings.tokens,
        max_num_seqs=1,
        enforce_eager=not settings.compile,
        num_gpu_blocks_override=2 * (settings.tokens + 64) // settings.block_size,
    )
    ratios = [0, *settings.k]
    prompts = random_prompts(config.vocab_size, settings.tokens, (settings.repetitions + 1) * len(ratios))
    fresh = partial(next, iter(prompts))

    def answering(k: int) -> Case:
        return Case(lambda prompt: generate(llm, [prompt], k, 1), prepare=fresh)

    seconds = interleaved({k: answering(k) for k in ratios}, settings.repetitions)
    stack = Stack.of(config)
    dense = prefill(stack, settings.tokens).total
    middle = {k: statistics.median(times) for k, times in seconds.items()}

    def bound(k: int) -> float:
        plugin = VariatorConfig.from_json(plugin_folder(plugins[f"k{k}"]) / CONFIG_FILE)
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
        "share_of_dense": {str(k): ratio(seconds[k], seconds[0]).median for k in settings.k},
        "share_of_operations": {str(k): bound(k) for k in settings.k},
    }


def measure_blocks(settings: Blocks, plugins: dict[str, str]) -> dict[str, Any]:
    """Peak KV blocks of several long prompts, and how many fit at once into a small pool; exact counts."""
    config = load_config(settings.model)
    prompts = random_prompts(config.vocab_size, settings.tokens, settings.requests)
    each = -(-(settings.tokens + 64) // settings.block_size)
    small = settings.pool or 2 * each + 1
    figures: dict[str, Any] = {"model": settings.model, "vllm": vllm_version()}
    figures |= {"dense_tail": settings.dense_tail, "tokens": settings.tokens, "requests": settings.requests}
    figures |= {"block_size": settings.block_size, "small_pool": small, "peak_blocks": {}, "concurrent": {}}
    for pool in (settings.requests * each + 8, small):
        llm = engine(
            settings,
            plugins,
            max_num_seqs=settings.requests,
            max_num_batched_tokens=settings.requests * settings.tokens,  # all at once: nobody ends before
            num_gpu_blocks_override=pool,
            enforce_eager=True,
        )
        cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
        if len(cache.coordinator.single_type_managers) > 1:
            raise VariatorError(
                "blocks are counted of one block table: give plugins whose KV cache has one ratio in all layers"
            )
        for k in (0, *settings.k):
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
    return figures | {"times_fewer_blocks": {str(k): peak["0"] / peak[str(k)] for k in settings.k}}


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


if __name__ == "__main__":
    cli.run(main)
