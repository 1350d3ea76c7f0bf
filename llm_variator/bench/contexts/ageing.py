"""Decode-time compression: what a long answer holds and costs."""

from __future__ import annotations

import argparse
import dataclasses

import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from llm_variator.bench.contexts.setting import Figures, stretches
from llm_variator.model import VariatorModel


def decode(model: VariatorModel, args: argparse.Namespace) -> Figures:
    """The same text after the same prompt, token by token: with blocks merged, without, and dense throughout."""
    (text,) = stretches(args, args.context + args.new_tokens + 1)
    config = model.plugins["plugin"]
    intact = model.add_plugin("intact", dataclasses.replace(config, decode_block=None)).to(model.dtype)
    intact.load_state_dict(model.plugin("plugin").state_dict())
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
    head, tail = config.ends
    tokens, window = args.context + args.new_tokens, tail + args.decode_block
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
