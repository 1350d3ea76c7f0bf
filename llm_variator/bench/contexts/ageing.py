"""Decode-time compression: what a long answer holds and costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from llm_variator.bench.contexts.setting import Answers, Figures, stretches
from llm_variator.cli import flag
from llm_variator.cli.values import PositiveInt
from llm_variator.config import VariatorConfig
from llm_variator.engine.cache.report import KVCacheReport
from llm_variator.engine.plan import kv_heads
from llm_variator.model import VariatorModel


@dataclass(frozen=True, kw_only=True)
class Decode(Answers):
    """A text read token by token as if generated: entries held, cross-entropy against dense."""

    context: PositiveInt = 512
    new_tokens: PositiveInt = 2000
    repeats: PositiveInt = 1
    decode_block: PositiveInt = flag(64, "tokens compressed at a time")


def decode(model: VariatorModel, settings: Decode) -> Figures:
    """The same text after the same prompt, token by token: old blocks compressed, kept whole, and all of it dense."""
    (text,) = stretches(settings, settings.context + settings.new_tokens + 1)
    config = model.plugins["plugin"]
    intact = model.add_plugin("intact", replace(config, decode_block=None)).to(model.dtype)
    intact.load_state_dict(model.plugin("plugin").state_dict())
    figures: Figures = {
        "prompt_tokens": settings.context,
        "new_tokens": settings.new_tokens,
        "decode_block": settings.decode_block,
    }
    reports: dict[str, KVCacheReport] = {}
    for label, name in (("ageing", "plugin"), ("decoding_intact", "intact"), ("dense", None)):
        with model.use_plugin(name):
            nats, cache = _continued(model, text, settings.context)
        report = reports[label] = model.kv_cache_report(cache)
        entries = [layer.entries for layer in report.layers]
        figures[label] = {
            "cross_entropy": nats,
            "entries": sorted(set(entries)),
            "mean_entries": sum(entries) / len(entries),
            "bytes": report.bytes,
            "index_bytes": sum(layer.index_bytes for layer in report.layers),
        }
    limits = bounds(model, config, settings.context + settings.new_tokens)
    figures["within"] = all(
        layer.entries <= bound for layer, bound in zip(reports["ageing"].layers, limits, strict=True)
    )
    window = _window(config)
    if not config.selects:
        figures["k"] = (
            config.k if isinstance(config.k, int) else config.k.get("kv", config.k.get("attention", 1))
        )
    return figures | {"window": window, "bound": max(limits), "mean_bound": sum(limits) / len(limits)}


def bounds(model: VariatorModel, config: VariatorConfig, tokens: int) -> list[float]:
    """Entries of each layer, of a head in the mean, that `tokens` of one turn may take."""
    head, window = config.ends[0], _window(config)
    heads, found = kv_heads(model.config), []
    for layer in range(model.config.num_hidden_layers):
        ratios = config.head_ratios(layer, heads) or (
            config.ratio("kv", layer) or config.ratio("attention", layer) or 1,
        )
        rest = max(0, tokens - head - window)
        found.append(head + window + sum(rest / k + (k > 1) for k in ratios) / len(ratios))
    return found


def _window(config: VariatorConfig) -> int:
    """Dense tokens at the end, at most."""
    tail, step = config.ends[1], config.decode_block
    assert step is not None
    return (max(tail, config.block) if config.selects else tail) + step


def _continued(model: VariatorModel, text: Tensor, prompt: int) -> tuple[float, DynamicCache]:
    """Mean nats of the tokens behind the prompt, each read on its own."""
    cache = DynamicCache(config=model.config)
    logits = model(text[:, :prompt], cache=cache, logits_to_keep=1).logits[:, -1]
    total = 0.0
    for place in range(prompt, text.shape[1] - 1):
        total += float(F.cross_entropy(logits.float(), text[:, place]))
        logits = model(text[:, place : place + 1], cache=cache).logits[:, -1]
    return total / (text.shape[1] - 1 - prompt), cache
