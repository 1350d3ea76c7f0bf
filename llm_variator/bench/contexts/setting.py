"""What every measurement shares: the model with its plugin, stretches of text, and a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llm_variator import old_cli as cli
from llm_variator.cache import CompressedLayer
from llm_variator.config import VariatorConfig
from llm_variator.contexts import CompressedContext
from llm_variator.corpora import read_windows
from llm_variator.loading import load_model, load_tokenizer
from llm_variator.model import VariatorModel

Figures = dict[str, Any]
GREEDY: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def build_model(args: argparse.Namespace) -> VariatorModel:
    """The model with the plugin active, under the name "plugin"."""
    torch.manual_seed(args.seed)
    model = VariatorModel(load_model(args.model, device=args.device, **cli.model_options(args)))
    decode_block = getattr(args, "decode_block", None)
    if args.random_init:
        config = VariatorConfig(k=2, sites=("ffn", "kv"), decode_block=decode_block)
        model.add_plugin("plugin", config).to(model.dtype)
    else:
        model.load_plugin(args.plugin, "plugin", decode_block=decode_block)
    model.set_plugin("plugin")
    return model


def stretches(args: argparse.Namespace, *lengths: int) -> list[Tensor]:
    """Consecutive pieces (1, length) of the data."""
    (windows,) = read_windows(
        args.data, load_tokenizer(args.model), seq_length=sum(lengths), data_dir=args.data_dir
    )[:1]
    return [part[None].long().to(args.device) for part in windows.split(list(lengths))]


def dense_prefill(model: VariatorModel, ids: Tensor, repeats: int) -> float:
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


def compressed_layers(context: CompressedContext) -> list[CompressedLayer]:
    """The layers of a context that hold entries; the others have a sliding window."""
    return [layer for layer in context.cache.layers if isinstance(layer, CompressedLayer)]


def in_another_process(
    args: argparse.Namespace, *flags: object, environment: Mapping[str, str] | None = None
) -> Any:
    """What this program prints, as JSON, when it is run anew with `flags` and the same model, plugin and data."""
    words = [args.command, "--model", args.model, "--plugin", args.plugin, "--dtype", args.dtype]
    words += ["--device", args.device, "--data", args.data, "--seed", args.seed, *flags]
    if args.data_dir is not None:
        words += ["--data-dir", args.data_dir]
    if args.random_init:
        words += ["--random-init", *(["--num-layers", args.num_layers] if args.num_layers else [])]
    done = subprocess.run(
        [sys.executable, "-m", "llm_variator.bench.contexts", *map(str, words)],
        env=os.environ | dict(environment or {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
