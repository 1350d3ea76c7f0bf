"""Decode-time compression: what a long answer holds and costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from llm_variator.bench.contexts.setting import Answers, Figures, stretches
from llm_variator.cli import flag
from llm_variator.cli.values import PositiveInt
from llm_variator.model import VariatorModel


@dataclass(frozen=True, kw_only=True)
class Decode(Answers):
    """A text read token by token as if generated: entries held, cross-entropy against dense."""

    context: PositiveInt = 512
    new_tokens: PositiveInt = 2000
    repeats: PositiveInt = 1
    decode_block: PositiveInt = flag(64, "tokens merged at a time")


def decode(model: VariatorModel, settings: Decode) -> Figures:
    """The same text after the same prompt, token by token: with blocks merged, without, and dense throughout."""
    (text,) = stretches(settings, settings.context + settings.new_tokens + 1)
    config = model.plugins["plugin"]
    intact = model.add_plugin("intact", replace(config, decode_block=None)).to(model.dtype)
    intact.load_state_dict(model.plugin("plugin").state_dict())
    figures: Figures = {
        "prompt_tokens": settings.context,
        "new_tokens": settings.new_tokens,
        "decode_block": settings.decode_block,
    }
    for label, name in (("ageing", "plugin"), ("decoding_intact", "intact"), ("dense", None)):
        with model.use_plugin(name):
            nats, cache = _continued(model, text, settings.context)
        report = model.kv_cache_report(cache)
        figures[label] = {
            "cross_entropy": nats,
            "entries": sorted({layer.entries for layer in report.layers}),
            "bytes": report.bytes,
        }
    kv = config.k if isinstance(config.k, int) else config.k.get("kv", config.k.get("attention", 1))
    head, tail = config.ends
    tokens, window = settings.context + settings.new_tokens, tail + settings.decode_block
    bound = head + window + (tokens - head - window) / kv + 1
    return figures | {
        "k": kv,
        "window": window,
        "bound": bound,
        "within": figures["ageing"]["entries"][-1] <= bound,
    }


def _continued(model: VariatorModel, text: Tensor, prompt: int) -> tuple[float, DynamicCache]:
    """Mean nats of the tokens behind the prompt, each read on its own."""
    cache = DynamicCache(config=model.config)
    logits = model(text[:, :prompt], cache=cache, logits_to_keep=1).logits[:, -1]
    total = 0.0
    for place in range(prompt, text.shape[1] - 1):
        total += float(F.cross_entropy(logits.float(), text[:, place]))
        logits = model(text[:, place : place + 1], cache=cache).logits[:, -1]
    return total / (text.shape[1] - 1 - prompt), cache
