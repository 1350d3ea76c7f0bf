"""Chunked prefill: how far rounding carries its result from that of one pass, and the memory it saves."""

from __future__ import annotations

import argparse
import resource
from pathlib import Path

import torch
from torch import Tensor

from llm_variator.bench.contexts.setting import Figures, compressed_layers, in_another_process, stretches
from llm_variator.cache.stores import whole
from llm_variator.config import VariatorConfig
from llm_variator.contexts import CompressedContext
from llm_variator.model import VariatorModel


def prefill(model: VariatorModel, args: argparse.Namespace) -> Figures:
    """Greatest difference of keys and values over ragged rows; peak memory beyond weights and cache."""
    lengths = [args.context, args.context // 3, args.context - 7, 1, args.context // 2]
    rows = [row[0].tolist() for row in stretches(args, *lengths)]
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
    memory = [
        in_another_process(args, "--memory-of", tokens, chunk)
        for tokens in args.lengths
        for chunk in (0, *args.chunks)
    ]
    return {"row_lengths": lengths, "differences": differences, "memory": memory}


def _entries(context: CompressedContext) -> list[Tensor]:
    """Keys and values of each row's own entries, layer by layer."""
    found = []
    for layer in compressed_layers(context):
        keys, values = whole(layer.store)
        for row, own in enumerate(layer.columns.expand(len(keys), -1) >= 0):
            found += [keys[row][:, own], values[row][:, own]]
    return found


def memory_of(model: VariatorModel, args: argparse.Namespace) -> Figures:
    """Peak memory of one prefill, less what was there before and what the cache keeps. Its own process."""
    tokens, chunk = args.memory_of
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
