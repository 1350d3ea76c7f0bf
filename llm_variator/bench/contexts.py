"""`python -m llm_variator.bench.contexts`: saved, shared, chunked, ageing and paged contexts, measured."""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from llm_variator import cli
from llm_variator.cache import CompressedLayer
from llm_variator.config import VariatorConfig
from llm_variator.contexts import CompressedContext
from llm_variator.corpora import EMBEDDED, read_windows
from llm_variator.loading import load_model, load_tokenizer
from llm_variator.model import VariatorModel
from llm_variator.paging import KVPool
from llm_variator.results import write_result
from llm_variator.stores import SharedLayer, whole

Figures = dict[str, Any]
GREEDY: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def build_parser() -> cli.Parser:
    """Every sub-command and its flags."""
    parser = cli.Parser(prog="python -m llm_variator.bench.contexts", description="Measure contexts.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, **sizes: int) -> Any:
        add = commands.add_parser(name, help=text, description=text).add_argument
        add("--model", default="smollm2-135m", help="base model: alias, local folder or hub id")
        add("--plugin", default="smollm2-135m/k2", help="shipped name, folder or hub id")
        add("--data", default=EMBEDDED, metavar="SOURCE", help="text, named as in llm_variator.train")
        add("--data-dir", type=Path, help="folder of local data sets (default: $VARIATOR_DATA)")
        add("--device", default="cpu", help="cpu, cuda, ...")
        add(
            "--random-init",
            action="store_true",
            help="the model's shape with random weights, an untrained plugin",
        )
        add("--num-layers", type=cli.positive_int, help="with --random-init: this many layers")
        add("--dtype", default="float32", help="of base model and plugin")
        add("--seed", type=cli.natural, default=0, help="of random choices")
        add("--json", type=Path, metavar="FILE", help="store the figures with command, versions and machine")
        for size, value in sizes.items():
            add(f"--{size.replace('_', '-')}", type=cli.positive_int, default=value, help=_SIZES[size])
        return add

    command(
        "load",
        "save here, load and go on in another process; time of loading against a dense prefill",
        context=4096,
        question=16,
        new_tokens=32,
        repeats=3,
    )
    command(
        "questions",
        "questions on one context, against as many dense prefills; memory of the context",
        context=4096,
        question=16,
        new_tokens=8,
        questions=50,
        repeats=3,
    )
    add = command(
        "prefill", "chunked against unchunked: greatest difference; memory of activations", context=700
    )
    add("--ratios", type=cli.positive_int, nargs="+", default=[2, 3, 4, 8], help="k of untrained plugins")
    add("--chunks", type=cli.positive_int, nargs="+", default=[64, 100, 256], help="tokens read at a time")
    add("--lengths", type=cli.positive_int, nargs="+", default=[1024, 4096, 8192], help="for the memory")
    add("--memory-of", type=cli.natural, nargs=2, metavar=("TOKENS", "CHUNK"), help=argparse.SUPPRESS)
    add = command(
        "decode",
        "a text read token by token as if generated: entries held, cross-entropy against dense",
        context=512,
        new_tokens=2000,
        repeats=1,
    )
    add("--decode-block", type=cli.positive_int, default=64, help="tokens merged at a time")
    command(
        "pool",
        "sessions over shared documents in one pool, against contexts that share nothing",
        documents=10,
        sessions=100,
        operations=2000,
        context=64,
        blocks=60000,
        block_size=16,
    )
    return parser


_SIZES = {
    "context": "tokens of a document",
    "question": "tokens of a question",
    "new_tokens": "tokens generated after it",
    "repeats": "timed runs; the least is taken",
    "questions": "how many",
    "documents": "how many",
    "sessions": "most at a time",
    "operations": "random extends, forks, frees and questions",
    "blocks": "in the pool",
    "block_size": "entries in a block",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one measurement, print its figures and store them."""
    started = time.perf_counter()
    argv = list(sys.argv[1:] if argv is None else argv)
    args = cli.parse(build_parser(), argv)
    torch.manual_seed(args.seed)
    model = VariatorModel(load_model(args.model, device=args.device, **cli.model_options(args)))
    if args.command == "prefill" and args.memory_of:
        print(json.dumps(_memory(model, args)))
        return
    if args.random_init:
        args.plugin = "untrained k=2"
        model.add_plugin("plugin", VariatorConfig(k=2, sites=("ffn", "kv")))
    else:
        model.load_plugin(args.plugin, "plugin", decode_block=getattr(args, "decode_block", None))
    model.set_plugin("plugin")
    with torch.inference_mode():
        figures = _COMMANDS[args.command](model, args)
    figures = {"model": args.model, "plugin": args.plugin, "dtype": args.dtype, **figures}
    print(json.dumps(figures, indent=2))
    if args.json:
        command = ["llm_variator.bench.contexts", *argv]
        write_result(args.json, figures, command=command, seed=args.seed, started=started)


def load(model: VariatorModel, args: argparse.Namespace) -> Figures:
    """Uninterrupted, and saved and loaded by another process."""
    document, question = _text(args, args.context, args.question)
    options = dict(max_new_tokens=args.new_tokens, **GREEDY)
    context = model.compress(document)
    answer = model.generate(question, context=context, **options)
    dense = _dense_prefill(model, document, args.repeats)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "context.safetensors"
        context.save(file)
        settings = [args.model, args.plugin, args.dtype, args.device]
        program = (
            "import sys, time, json, torch\n"
            "from llm_variator import CompressedContext, VariatorModel\n"
            "from llm_variator.loading import load_model\n"
            "name, plugin, dtype, device, file, repeats, question, options = map(json.loads, sys.argv[1:])\n"
            "model = VariatorModel.from_pretrained(load_model(name, dtype=dtype, device=device), plugin)\n"
            "seconds = []\n"
            "for _ in range(repeats):\n"
            "    start = time.perf_counter()\n"
            "    context = CompressedContext.load(file, model)\n"
            "    seconds.append(time.perf_counter() - start)\n"
            "print(json.dumps([min(seconds), model.generate(question, context=context, **options).tolist()]))\n"
        )
        words = [*settings, str(file), args.repeats, question.tolist(), options]
        done = subprocess.run(
            [sys.executable, "-c", program, *map(json.dumps, words)],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        seconds, other = json.loads(done.stdout.splitlines()[-1])
        size = file.stat().st_size
    return {
        "tokens": args.context,
        "answers_equal": other == answer.tolist(),
        "dense_prefill_seconds": dense,
        "load_seconds": seconds,
        "load_over_prefill": seconds / dense,
        "file_bytes": size,
        "dense_bytes": context.report().dense_bytes,
    }


def questions(model: VariatorModel, args: argparse.Namespace) -> Figures:
    """One compression and all answers, one after the other and in one batch; dense prefills beside it."""
    pieces = _text(args, args.context, *[args.question] * args.questions)
    document, asked = pieces[0], pieces[1:]
    options = dict(max_new_tokens=args.new_tokens, **GREEDY)
    dense = _dense_prefill(model, document, args.repeats)
    start = time.perf_counter()
    context = model.compress(document)
    answers, forks = [], []
    for question in asked:
        answer, after = model.generate(question, context=context, return_context=True, **options)
        answers.append(answer)
        forks.append(after)
    apart = time.perf_counter() - start
    start = time.perf_counter()
    together = model.generate(torch.cat(asked), context=model.compress(document), **options)
    batch = time.perf_counter() - start
    stores = [layer.store for fork in forks for layer in _layers(fork)]
    firsts = [store.parts[0][0] for store in stores if isinstance(store, SharedLayer)]
    shared = {keys.data_ptr() for keys in firsts if isinstance(keys, Tensor)}
    report = context.report()
    return {
        "tokens": args.context,
        "questions": args.questions,
        "new_tokens": args.new_tokens,
        "dense_prefill_seconds": dense,
        "seconds_one_by_one": apart,
        "seconds_one_batch": batch,
        "one_by_one_over_dense_prefills": apart / (args.questions * dense),
        "one_batch_over_dense_prefills": batch / (args.questions * dense),
        "batch_equals_one_by_one": bool(torch.equal(together, torch.cat(answers))),
        "copies_of_the_context": len(shared) / len(report.layers),
        "context_bytes": report.bytes,
        "all_sessions_bytes": report.bytes
        + sum(each.bytes - each.shared_bytes for each in (fork.report() for fork in forks)),
        "dense_bytes_of_all_sessions": sum(fork.report().dense_bytes for fork in forks),
    }


def prefill(model: VariatorModel, args: argparse.Namespace) -> Figures:
    """Greatest difference of keys, values and next logits over ragged rows; peak memory beyond weights and cache."""
    lengths = [args.context, args.context // 3, args.context - 7, 1, args.context // 2]
    rows = [row[0].tolist() for row in _text(args, *lengths)]
    differences = []
    for k in args.ratios:
        model.add_plugin(f"k{k}", VariatorConfig(k=k, sites=("ffn", "kv")))
        with model.use_plugin(f"k{k}"):
            single = _entries(model.compress(rows))
            for chunk in args.chunks:
                parts = _entries(model.compress(rows, prefill_chunk_size=chunk))
                worst = max(
                    float((a - b).abs().max()) for a, b in zip(single, parts, strict=True) if a.numel()
                )
                differences.append({"k": k, "chunk": chunk, "greatest_difference": worst})
    memory = []
    for tokens in args.lengths:
        for chunk in (0, *args.chunks):
            flags = ["--memory-of", tokens, chunk, "--model", args.model, "--plugin", args.plugin]
            flags += ["--dtype", args.dtype, "--device", args.device]
            words = [sys.executable, "-m", "llm_variator.bench.contexts", "prefill", *map(str, flags)]
            done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=True)
            memory.append(json.loads(done.stdout.splitlines()[-1]))
    return {"row_lengths": lengths, "differences": differences, "memory": memory}


def _entries(context: CompressedContext) -> list[Tensor]:
    """Keys and values of each row's own entries, layer by layer."""
    found = []
    for layer in _layers(context):
        keys, values = whole(layer.store)
        for row, own in enumerate(layer.columns.expand(len(keys), -1) >= 0):
            found += [keys[row][:, own], values[row][:, own]]
    return found


def _layers(context: CompressedContext) -> list[CompressedLayer]:
    return [layer for layer in context.cache.layers if isinstance(layer, CompressedLayer)]


def _memory(model: VariatorModel, args: argparse.Namespace) -> Figures:
    """Peak memory of one prefill, less what was there before and what the cache keeps. Its own process."""
    tokens, chunk = args.memory_of
    model.load_plugin(args.plugin, "plugin")
    model.set_plugin("plugin")
    generator = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(10, model.config.vocab_size, (1, tokens), generator=generator)
    model.compress(ids[:, :64])
    before = _peak(model, reset=True)
    context = model.compress(ids, prefill_chunk_size=chunk or None)
    kept = context.report().bytes
    return {"tokens": tokens, "chunk": chunk or None, "activation_bytes": _peak(model) - before - kept}


def _peak(model: VariatorModel, *, reset: bool = False) -> int:
    """Peak bytes: on a GPU of tensors, on the CPU of the process (the greatest resident size so far)."""
    if model.device.type == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        return torch.cuda.max_memory_allocated()
    if reset:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            return _status("VmRSS")
        except OSError:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    try:
        return _status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise OSError(name)


def decode(model: VariatorModel, args: argparse.Namespace) -> Figures:
    """The same text after the same prompt, token by token: with blocks merged, without, and dense throughout."""
    (text,) = _text(args, args.context + args.new_tokens + 1)
    config = model.plugins["plugin"]
    model.load_plugin(args.plugin, "intact")
    figures: Figures = {
        "prompt_tokens": args.context,
        "new_tokens": args.new_tokens,
        "decode_block": args.decode_block,
    }
    for label, name in (("ageing", "plugin"), ("decoding_intact", "intact"), ("dense", None)):
        with model.use_plugin(name):
            nats, cache = _continued(model, text, args.context)
        report = model.kv_cache_report(cache)
        figures[label] = {
            "cross_entropy": nats,
            "entries": sorted({layer.entries for layer in report.layers}),
            "bytes": report.bytes,
        }
    kv = config.k if isinstance(config.k, int) else config.k.get("kv", config.k.get("attention", 1))
    assert config.dense_head is not None
    assert config.dense_tail is not None
    tokens, window = args.context + args.new_tokens, config.dense_tail + args.decode_block
    bound = config.dense_head + window + (tokens - config.dense_head - window) / kv + 1
    return figures | {
        "k": kv,
        "window": window,
        "bound": bound,
        "within": figures["ageing"]["entries"][-1] <= bound,
    }


def _continued(model: VariatorModel, text: Tensor, prompt: int) -> tuple[float, DynamicCache]:
    cache = DynamicCache(config=model.config)
    logits = model(text[:, :prompt], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    total = 0.0
    for place in range(prompt, text.shape[1] - 1):
        total += float(F.cross_entropy(logits.float(), text[:, place]))
        logits = model(text[:, place : place + 1], past_key_values=cache).logits[:, -1]
    return total / (text.shape[1] - 1 - prompt), cache


def pool(model: VariatorModel, args: argparse.Namespace) -> Figures:
    """Random order of extend, fork, free and question; every answer against contexts outside the pool."""
    rng, shared = random.Random(args.seed), KVPool(args.blocks, args.block_size)
    (text,) = _text(args, args.documents * args.context + 4096)
    documents = [text[:, i * args.context :][:, : args.context] for i in range(args.documents)]
    first = [(model.compress(row, pool=shared), model.compress(row)) for row in documents]
    sessions = [(paged.fork(), plain) for paged, plain in first]
    counts = {"extend": 0, "fork": 0, "free": 0, "ask": 0}
    wrong, peak = 0, shared.report()
    for _ in range(args.operations):
        paged, plain = session = rng.choice(sessions)
        action = rng.choice(sorted(counts))
        if action == "free" and len(sessions) <= args.documents:
            action = "fork"
        if action in ("fork", "extend") and len(sessions) >= args.sessions:
            action = "free"
        counts[action] += 1
        start = rng.randrange(text.shape[1] - 32)
        piece = text[:, start : start + rng.randint(1, 24)]
        if action == "extend":
            sessions.append((paged.extend(piece), plain.extend(piece)))
        elif action == "fork":
            sessions.append((paged.fork(), plain))
        elif action == "free":
            sessions = [each for each in sessions if each is not session]
            paged.free()
        else:
            answers = [
                model.generate(piece, context=context, max_new_tokens=4, **GREEDY) for context in session
            ]
            wrong += not torch.equal(*answers)
        peak = max(peak, shared.report(), key=lambda report: report.references)
    for context in [*(paged for paged, _ in first), *(paged for paged, _ in sessions)]:
        context.free()
    return {
        "operations": counts,
        "wrong_answers": wrong,
        "peak_blocks": peak.used,
        "peak_blocks_without_sharing": peak.references,
        "blocks_left_after_all_are_freed": shared.report().used,
    }


def _text(args: argparse.Namespace, *lengths: int) -> list[Tensor]:
    """Consecutive stretches (1, length) of the data."""
    (windows,) = read_windows(
        args.data, load_tokenizer(args.model), seq_length=sum(lengths), data_dir=args.data_dir
    )[:1]
    return [part[None].long().to(args.device) for part in windows.split(list(lengths))]


def _dense_prefill(model: VariatorModel, ids: Tensor, repeats: int) -> float:
    """Least seconds of reading `ids` (1, tokens) with the base model alone."""
    seconds = []
    with model.disable_plugin():
        for _ in range(repeats):
            start = time.perf_counter()
            model(ids, use_cache=True, logits_to_keep=1)
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return min(seconds)


_COMMANDS = {"load": load, "questions": questions, "prefill": prefill, "decode": decode, "pool": pool}

if __name__ == "__main__":
    cli.run(main)
