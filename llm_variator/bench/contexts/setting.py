"""What every measurement shares: the model with its plugin, stretches of text, and a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llm_variator.cli import flag, flags, spelled
from llm_variator.cli.values import PositiveInt
from llm_variator.config import VariatorConfig
from llm_variator.engine.cache import CompressedLayer
from llm_variator.engine.contexts import CompressedContext
from llm_variator.engine.plan import kv_heads
from llm_variator.measures.loading import load_variator
from llm_variator.measures.timing import Case, fair_head, interleaved
from llm_variator.model import VariatorModel
from llm_variator.sources.corpora import EMBEDDED, read_windows
from llm_variator.sources.models import load_tokenizer

Figures = dict[str, Any]
GREEDY: dict[str, Any] = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


@dataclass(frozen=True, kw_only=True)
class Settings(flags.Stored, flags.BaseModel):
    """What is measured."""

    model: str = "smollm2-135m"
    dtype: str = flag("float32", "of base model and plugin")
    plugin: str = flag(
        "smollm2-135m/k2", "shipped name, folder or hub id; with --random-init an untrained one"
    )
    untrained: Literal["merges", "keeps"] = flag(
        "merges",
        "what the plugin of --random-init does: merge tokens, or keep keys and values by random scores",
    )
    data: str = flag(EMBEDDED, "text, named as in llm_variator.train", metavar="SOURCE")
    data_dir: Path | None = flag(None, "folder of local data sets (default: $VARIATOR_DATA)", metavar="DIR")

    @classmethod
    def command(cls) -> str:
        """The measurement's name."""
        return cls.__name__.lower()


@dataclass(frozen=True, kw_only=True)
class Documents(Settings):
    """Sizes."""

    context: PositiveInt = flag(4096, "tokens of a document")


@dataclass(frozen=True, kw_only=True)
class Answers(Documents):
    """Answers."""

    new_tokens: PositiveInt = flag(32, "tokens generated after it")
    repeats: PositiveInt = flag(3, "timed runs; the least is taken")


@dataclass(frozen=True, kw_only=True)
class Chunked:
    """Chunks."""

    chunks: tuple[PositiveInt, ...] = flag((64, 100, 256), "tokens read at a time")


def build_model(settings: Settings) -> VariatorModel:
    """The model with the plugin active, under the name "plugin"."""
    torch.manual_seed(settings.seed)
    model = load_variator(settings)
    decode_block = getattr(settings, "decode_block", None)
    if settings.random_init:
        untrained(model, "plugin", keeps=settings.untrained == "keeps", decode_block=decode_block)
    else:
        model.load_plugin(settings.plugin, "plugin", decode_block=decode_block)
    model.set_plugin("plugin")
    return model


def untrained(model: VariatorModel, name: str, *, keeps: bool, decode_block: int | None = None) -> None:
    """Add a plugin that merges every two tokens, or one whose heads keep a half, a quarter and an eighth in turn."""
    if not keeps:
        merging = VariatorConfig(k=2, sites=("ffn", "kv"), decode_block=decode_block)
        model.add_plugin(name, merging).to(model.dtype)
        return
    heads = range(kv_heads(model.config))
    config = VariatorConfig(
        sites=("kv",),
        compressor="select",
        k_per_head=[[2 << head % 3 for head in heads]] * model.config.num_hidden_layers,
        block=16,
        decode_block=decode_block,
    )
    plugin = model.add_plugin(name, config).to(model.dtype)
    for own in plugin.selects.values():
        torch.nn.init.normal_(own.score.weight)


def stretches(settings: Settings, *lengths: int) -> list[Tensor]:
    """Consecutive pieces (1, length) of the data."""
    (windows,) = read_windows(
        settings.data, load_tokenizer(settings.model), seq_length=sum(lengths), data_dir=settings.data_dir
    )[:1]
    return [part[None].long().to(settings.device) for part in windows.split(list(lengths))]


def dense_prefill(model: VariatorModel, ids: Tensor, repeats: int) -> float:
    """Least seconds of reading `ids` (1, tokens) with the base model alone."""
    case = Case(lambda _: model(ids, use_cache=True, logits_to_keep=1), inside=model.disable_plugin)
    with fair_head(model.base):
        return min(interleaved({"dense": case}, repeats, warmups=0, device=model.device)["dense"])


def compressed_layers(context: CompressedContext) -> list[CompressedLayer]:
    """The layers of a context that hold entries; the others have a sliding window."""
    return [layer for layer in context.cache.layers if isinstance(layer, CompressedLayer)]


def words(settings: Settings) -> list[str]:
    """The command line that gives these settings."""
    found: list[object] = [settings.command()]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            found.append(spelled(field.name))
            found += [] if value is True else value if isinstance(value, tuple) else [value]
    return list(map(str, found))


def in_another_process(settings: Settings, *, environment: Mapping[str, str] | None = None) -> Any:
    """What this program prints, as JSON, when it is run anew with these settings."""
    done = subprocess.run(
        [sys.executable, "-m", "llm_variator.bench.contexts", *words(settings)],
        env=os.environ | dict(environment or {}),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])
