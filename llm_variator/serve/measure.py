"""`python -m llm_variator.serve.measure`: what plugins save inside vLLM.

`prefill` times one long prompt at each ratio, interleaved, beside the bound that the operations set; `blocks`
counts KV blocks and requests in a small pool; `load` sends rising arrivals to a server, which it starts with vLLM's
flags after a bare `--`. Plugins that are not given are untrained: they cost what trained ones do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llm_variator.config import CONFIG_FILE, VariatorConfig
from llm_variator.errors import VariatorError
from llm_variator.integrations.vllm.arguments import engine_arguments
from llm_variator.integrations.vllm.rows import ARGUMENT, AUTO
from llm_variator.measures.operations import Stack, prefill
from llm_variator.measures.results import write_result
from llm_variator.measures.timing import Case, interleaved, ratio
from llm_variator.model import VariatorModel
from llm_variator.old_cli import Parser, json_mapping, names, parse, positive_float, positive_int, run
from llm_variator.serve.__main__ import choice, parse_plugins
from llm_variator.serve.load import measure_load
from llm_variator.sources.corpora import EMBEDDED
from llm_variator.sources.models import load_config, load_model, plugin_folder

SEED = 0


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; raises VariatorError for wrong input."""
    started = time.perf_counter()
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    args = parse(build_parser(), words[:split])
    args.server_flags = words[split + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        figures = {"prefill": measure_prefill, "blocks": measure_blocks, "load": measure_load}[args.what](
            args, make_plugins(args, folder)
        )
    print(json.dumps(figures, indent=2))
    if args.json is not None:
        command = ["llm_variator.serve.measure", *words]
        write_result(args.json, figures, command=command, seed=SEED, started=started)


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command line."""
    parser = Parser(prog="python -m llm_variator.serve.measure", description=__doc__)
    kinds = parser.add_subparsers(dest="what", required=True, parser_class=Parser)
    texts = {
        "prefill": "wall time of long prompts",
        "blocks": "KV blocks and requests",
        "load": "rising arrivals over HTTP",
    }
    prefill_, blocks, load = (
        kinds.add_parser(kind, help=text, description=text) for kind, text in texts.items()
    )
    for part in (prefill_, blocks, load):
        add = part.add_argument
        add("--model", default="smollm2-135m", help="alias, local folder or hub id")
        add("--k", nargs="+", type=positive_int, default=[2, 4], help="ratios")
        add("--plugin", nargs="+", default=[], metavar="kN=PLUGIN", help="trained plugins of some ratios")
        add("--sites", type=names, default=("ffn", "kv"), help="of untrained plugins: ffn or ffn,kv")
        add("--dense-tail", type=positive_int, default=64, help="dense last tokens of untrained plugins")
        add("--dtype", default="float32", help="of the model, as vLLM calls it")
        add("--json", type=Path, help="write the figures to this file")
    for part in (prefill_, blocks):
        part.add_argument("--tokens", type=positive_int, default=4096, help="tokens of each prompt")
        part.add_argument("--block-size", type=positive_int, default=32, help="tokens in a KV block")
    prefill_.add_argument("--repetitions", type=positive_int, default=5, help="of every ratio")
    prefill_.add_argument("--compile", action="store_true", help="with vLLM's torch.compile; else eager")
    blocks.add_argument("--requests", type=positive_int, default=8, help="prompts at once")
    blocks.add_argument(
        "--pool", type=positive_int, help="blocks of the small pool; default: two dense prompts'"
    )
    add_load_flags(load)
    return parser


def add_load_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `load`."""
    add = parser.add_argument
    add("--url", help="of a running server; default: start one, for as long as it takes")
    add("--log", type=Path, help="file for the output of a server that is started")
    add("--policy", type=json_mapping, help="arguments of its LoadPolicy, as JSON")
    add("--choices", nargs="+", type=choice, default=[0, 2, 4, AUTO], help="fixed ratios and auto")
    add("--requests", type=positive_int, default=300, help="for each choice")
    add("--tokens", nargs="+", type=positive_int, default=[384, 640], help="shortest and longest prompt")
    add("--max-tokens", type=positive_int, default=8, help="generated tokens")
    add("--data", default=EMBEDDED, help="text the prompts are cut from, a source as in training")
    add("--peak", type=positive_float, default=2.0, help="peak arrivals over dense capacity")
    add(
        "--earlier",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="results of other choices: their dense capacity is used, their answers are compared with",
    )


# --- inside one process


def make_plugins(args: argparse.Namespace, folder: str) -> dict[str, str]:
    """The plugins that were given and, under `folder`, untrained ones of the other ratios, by name."""
    plugins = parse_plugins(args.plugin)
    if getattr(args, "url", None):
        return plugins  # the server has its own
    for k in args.k:
        if f"k{k}" not in plugins:
            config = VariatorConfig(k=k, sites=args.sites, dense_head=4, dense_tail=args.dense_tail)
            plugins[f"k{k}"] = str(Path(folder) / f"k{k}")
            VariatorModel(load_model(args.model), config).save_pretrained(plugins[f"k{k}"])
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


def measure_prefill(args: argparse.Namespace, plugins: dict[str, str]) -> dict[str, Any]:
    """Seconds from a prompt to its first token at each ratio, interleaved, and the median share of dense."""
    config = load_config(args.model)
    llm = engine(
        args,
        plugins,
        max_num_batched_tokens=args.tokens,
        max_num_seqs=1,
        enforce_eager=not args.compile,
        num_gpu_blocks_override=2 * (args.tokens + 64) // args.block_size,
    )
    ratios = [0, *args.k]
    prompts = random_prompts(config.vocab_size, args.tokens, (args.repetitions + 1) * len(ratios))
    fresh = partial(next, iter(prompts))

    def answering(k: int) -> Case:
        return Case(lambda prompt: generate(llm, [prompt], k, 1), prepare=fresh)

    seconds = interleaved({k: answering(k) for k in ratios}, args.repetitions)
    stack = Stack.of(config)
    dense = prefill(stack, args.tokens).total
    middle = {k: statistics.median(times) for k, times in seconds.items()}

    def bound(k: int) -> float:
        plugin = VariatorConfig.from_json(plugin_folder(plugins[f"k{k}"]) / CONFIG_FILE)
        return prefill(stack, args.tokens, plugin).total / dense

    return {
        "model": args.model,
        "vllm": vllm_version(),
        "tokens": args.tokens,
        "sites": list(args.sites),
        "plugin": args.plugin,
        "dense_tail": args.dense_tail,
        "dtype": args.dtype,
        "compiled": args.compile,
        "threads": torch.get_num_threads(),
        "seconds": {str(k): times for k, times in seconds.items()},
        "median_seconds": {str(k): value for k, value in middle.items()},
        "share_of_dense": {str(k): ratio(seconds[k], seconds[0]).median for k in args.k},
        "share_of_operations": {str(k): bound(k) for k in args.k},
    }


def measure_blocks(args: argparse.Namespace, plugins: dict[str, str]) -> dict[str, Any]:
    """Peak KV blocks of several long prompts, and how many fit at once into a small pool; exact counts."""
    config = load_config(args.model)
    prompts = random_prompts(config.vocab_size, args.tokens, args.requests)
    each = -(-(args.tokens + 64) // args.block_size)
    small = args.pool or 2 * each + 1
    figures: dict[str, Any] = {"model": args.model, "vllm": vllm_version(), "dense_tail": args.dense_tail}
    figures |= {"tokens": args.tokens, "requests": args.requests}
    figures |= {"block_size": args.block_size, "small_pool": small, "peak_blocks": {}, "concurrent": {}}
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
        if len(cache.coordinator.single_type_managers) > 1:
            raise VariatorError(
                "blocks are counted of one block table: give plugins whose KV cache has one ratio in all layers"
            )
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


if __name__ == "__main__":
    run(main)
