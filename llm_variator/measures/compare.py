"""One timed generation, and several side by side: what a plugin changes for one prompt.

Uses nothing but the public face of `VariatorModel`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from llm_variator.engine.cache import KVCacheReport
from llm_variator.engine.cache.naming import cache_of
from llm_variator.measures import tables
from llm_variator.measures.metrics import continuation_cross_entropy
from llm_variator.measures.timing import Case, fair_head, interleaved
from llm_variator.model import VariatorModel

DENSE = "none"
"""How the base model without a plugin is called in tables and files."""


@dataclass(frozen=True)
class Generation:
    """One continuation and what it took.

    Attributes:
        tokens: the generated ids, without the prompt.
        text: the same, decoded without special tokens.
        first_token_seconds: from the call to the first token.
        tokens_per_second: of the tokens after the first; None where there are none.
        cache: the KV cache at the end, prompt and generated tokens.
    """

    tokens: list[int]
    text: str
    first_token_seconds: float
    tokens_per_second: float | None
    cache: KVCacheReport


@dataclass(frozen=True)
class Comparison:
    """One row of `--compare`; ratios are to the dense model.

    Attributes:
        plugin: the plugin's name, or `DENSE`.
        first_token_seconds: median over the repetitions.
        first_token_ratio: that median over the dense model's.
        tokens_per_second: decoding speed; None where one token was generated.
        kv_bytes: KV cache of the prompt.
        kv_ratio: those bytes over the dense model's.
        cross_entropy: nats per token of the dense model's continuation after this plugin's prompt.
        same_tokens: tokens of the own greedy text equal to the dense model's before the first difference.
        tokens: the own greedy ids, without the prompt.
        text: the same, decoded without special tokens.
    """

    plugin: str
    first_token_seconds: float
    first_token_ratio: float
    tokens_per_second: float | None
    kv_bytes: int
    kv_ratio: float
    cross_entropy: float
    same_tokens: int
    tokens: list[int]
    text: str


class _Clock(BaseStreamer):
    """Notes when each token arrives, and hands it on to another streamer."""

    def __init__(self, inner: BaseStreamer | None = None) -> None:
        self.inner = inner
        self.arrivals: list[float] = []

    def put(self, value: Tensor) -> None:
        self.arrivals.append(time.perf_counter())
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        if self.inner is not None:
            self.inner.end()


def generate(
    model: VariatorModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    max_new_tokens: int,
    *,
    inner: BaseStreamer | None = None,
    **sampling: Any,
) -> Generation:
    """Continue one prompt (1, tokens) with the active plugin.

    Args:
        model: the model, with the plugin to use active.
        tokenizer: decodes the result.
        input_ids: (1, tokens), on the model's device.
        max_new_tokens: most tokens to generate.
        inner: a streamer that also gets the tokens.
        sampling: arguments of Hugging Face's `generate`; greedy without any.
    """
    clock = _Clock(inner)
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    started = time.perf_counter()
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        streamer=clock,
        return_dict_in_generate=True,
        **(sampling or {"do_sample": False}),
    )
    tokens = output.sequences[0, input_ids.shape[1] :].tolist()
    arrivals = clock.arrivals[1:]  # before them, the prompt itself
    decoding = arrivals[-1] - arrivals[0]
    return Generation(
        tokens=tokens,
        text=str(tokenizer.decode(tokens, skip_special_tokens=True)),
        first_token_seconds=arrivals[0] - started,
        tokens_per_second=(len(arrivals) - 1) / decoding if decoding > 0 else None,
        cache=model.kv_cache_report(cache_of(output)),
    )


def compare(
    model: VariatorModel,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: Tensor,
    *,
    max_new_tokens: int,
    repetitions: int,
) -> list[Comparison]:
    """The dense model, then every loaded plugin, on one prompt (1, tokens), greedily; first tokens in turns."""
    names = [None, *model.plugins]
    texts: dict[str | None, Generation] = {}
    firsts: dict[str | None, list[Generation]] = {name: [] for name in names}

    def first_token(name: str | None) -> Case:
        return Case(
            lambda _: generate(model, tokenizer, input_ids, 1),
            inside=lambda: model.use_plugin(name),
            after=firsts[name].append,
        )

    with fair_head(model.base):
        interleaved({name: first_token(name) for name in names}, repetitions, device=model.device)
    times = {name: [each.first_token_seconds for each in own[1:]] for name, own in firsts.items()}
    caches = {name: own[0].cache for name, own in firsts.items()}
    for name in names:
        with model.use_plugin(name):
            texts[name] = generate(model, tokenizer, input_ids, max_new_tokens)
    dense = texts[None]
    whole = torch.cat((input_ids, input_ids.new_tensor([dense.tokens])), dim=1)
    rows = []
    for name in names:
        first = statistics.median(times[name])
        with model.use_plugin(name):
            cross_entropy = continuation_cross_entropy(model, whole, input_ids.shape[1])
        rows.append(
            Comparison(
                plugin=name or DENSE,
                first_token_seconds=first,
                first_token_ratio=first / statistics.median(times[None]),
                tokens_per_second=texts[name].tokens_per_second,
                kv_bytes=caches[name].bytes,
                kv_ratio=caches[name].bytes / caches[None].bytes,
                cross_entropy=cross_entropy,
                same_tokens=common_prefix(texts[name].tokens, dense.tokens),
                tokens=texts[name].tokens,
                text=texts[name].text,
            )
        )
    return rows


def print_comparison(rows: Sequence[Comparison], prompt_tokens: int, max_new_tokens: int) -> None:
    """Print the table and the texts to stdout."""
    columns = (
        "plugin", "first\ntoken ms", "of\ndense", "tokens\nper s",
        "prompt\nKV MiB", "of\ndense", "nats per\ntoken", "same\ntokens",
    )  # fmt: skip
    cells = [
        (
            row.plugin,
            f"{row.first_token_seconds * 1e3:.0f}",
            f"{row.first_token_ratio:.2f}",
            "-" if row.tokens_per_second is None else f"{row.tokens_per_second:.1f}",
            f"{row.kv_bytes / 2**20:.2f}",
            f"{row.kv_ratio:.2f}",
            f"{row.cross_entropy:.3f}",
            str(row.same_tokens),
        )
        for row in rows
    ]
    tables.show(
        f"{prompt_tokens} prompt tokens, up to {max_new_tokens} generated greedily", columns, cells,
        note="nats per token: cross-entropy of the dense model's text after this prompt; "
        "same tokens: those equal to the dense model's before the first difference",
    )  # fmt: skip
    console = Console()
    for row in rows:
        console.print(Panel(Text(row.text), title=row.plugin, title_align="left"))


def common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """How many tokens are equal before the first difference."""
    pairs = zip(ours, theirs, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
