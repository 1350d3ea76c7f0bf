"""Memory that a prefill needs beyond weights and cache: whole, and in chunks."""

from __future__ import annotations

import resource
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from llm_variator.bench.contexts.setting import Chunked, Figures, Settings, in_another_process
from llm_variator.cli import flag
from llm_variator.cli.values import Natural, PositiveInt
from llm_variator.model import VariatorModel

# glibc then gives freed tensors back at once: the resident size is what is in use, not what was
_GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True, kw_only=True)
class Prefill(Chunked, Settings):
    """Peak memory of activations, whole and in chunks."""

    lengths: tuple[PositiveInt, ...] = flag((1024, 4096, 8192), "tokens of a prompt")
    memory_of: tuple[Natural, Natural] | None = flag(
        None, "one prefill, in this process", metavar=("TOKENS", "CHUNK"), hidden=True
    )


def prefill(model: VariatorModel, settings: Prefill) -> Figures:
    """Peak memory of activations for every length and chunk, each in a process of its own."""
    memory = [
        in_another_process(replace(settings, memory_of=(tokens, chunk)), environment=_GIVE_BACK)
        for tokens in settings.lengths
        for chunk in (0, *settings.chunks)
    ]
    return {"memory": memory}


def memory_of(model: VariatorModel, settings: Prefill) -> Figures:
    """Peak memory of one prefill, less what was there before and what the cache keeps. Its own process."""
    assert settings.memory_of is not None
    tokens, chunk = settings.memory_of
    generator = torch.Generator().manual_seed(settings.seed)
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
