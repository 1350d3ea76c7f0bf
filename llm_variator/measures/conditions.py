"""How a prompt can be read: dense, not at all, or compressed by a plugin. `alternatives` has the other ways.

A `Condition` reads prompts of equal length into a KV cache. Whatever comes after the prompt is dense in every
condition, so that conditions differ in nothing but what they know of the prompt and what knowing it cost.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from llm_variator.config import VariatorConfig
from llm_variator.engine.cache.report import KVCacheReport
from llm_variator.measures.operations import Cost, Stack, prefill
from llm_variator.model import VariatorModel


@dataclasses.dataclass
class Prompt:
    """A prompt that has been read.

    Attributes:
        cache: its keys and values.
        logits: (rows, vocabulary) after its last token.
        tokens: its length: the position of the token that follows.
    """

    cache: Cache
    logits: Tensor
    tokens: int

    def clone(self) -> Prompt:
        """The same prompt again, to be continued in another way."""
        return Prompt(copy.deepcopy(self.cache), self.logits, self.tokens)

    def entries(self) -> float:
        """Keys held for one row, summed over the layers; where heads hold unlike numbers, their mean."""
        return sum(layer.entries for layer in KVCacheReport.of(self.cache).layers)

    def bytes(self) -> float:
        """Bytes of keys and values held for one row, all layers."""
        return KVCacheReport.of(self.cache).bytes / len(self.logits)


class Condition(Protocol):
    """One way to read a prompt."""

    @property
    def label(self) -> str:
        """Its name in tables and files."""
        ...

    def read(self, model: VariatorModel, ids: Tensor) -> Prompt:
        """Read prompts `ids` (rows, n), none padded."""
        ...

    def cost(self, stack: Stack, n: int, *, causal: bool = True) -> Cost:
        """Operations of reading a prompt of `n` tokens, and the entries it leaves; as in `operations.prefill`."""
        ...


@dataclasses.dataclass(frozen=True)
class Dense:
    """The base model."""

    label: str = "dense"

    def read(self, model: VariatorModel, ids: Tensor) -> Prompt:
        """All tokens through all layers."""
        with model.disable_plugin():
            return read_with(model, ids)

    def cost(self, stack: Stack, n: int, *, causal: bool = True) -> Cost:
        """Of the base model."""
        return prefill(stack, n, causal=causal)


@dataclasses.dataclass(frozen=True)
class NoContext:
    """The last prompt token alone: it stands for the beginning-of-text token that not every model has."""

    label: str = "no context"

    def read(self, model: VariatorModel, ids: Tensor) -> Prompt:
        """One token at position 0."""
        return Dense().read(model, ids[:, -1:])

    def cost(self, stack: Stack, n: int, *, causal: bool = True) -> Cost:
        """Of one token."""
        return prefill(stack, 1, causal=causal)


@dataclasses.dataclass(frozen=True)
class WithPlugin:
    """A plugin that the model holds, trained or not."""

    label: str
    name: str
    """In the model."""
    config: VariatorConfig
    """As the model resolved it."""
    digest: str = ""
    """Of its weights' file; empty where it has none."""

    def read(self, model: VariatorModel, ids: Tensor) -> Prompt:
        """Compressed by the plugin."""
        with model.use_plugin(self.name):
            return read_with(model, ids)

    def cost(self, stack: Stack, n: int, *, causal: bool = True) -> Cost:
        """With the plugin's own operations."""
        return prefill(stack, n, self.config, causal=causal)


def mean_merge(k: int, head: int, tail: int) -> VariatorConfig:
    """Merge and copy without anything learned, around FFNs and before keys and values of every layer."""
    return VariatorConfig(
        k=k, sites=("ffn", "kv"), compressor="mean", decompressor="copy", dense_head=head, dense_tail=tail
    )


def read_with(model: VariatorModel, ids: Tensor, **kwargs: Any) -> Prompt:
    """One forward pass over `ids` (rows, n), by default with positions 0 to n - 1, into a new cache."""
    cache = DynamicCache(config=model.config)
    output = model(ids, cache=cache, use_cache=True, logits_to_keep=1, **kwargs)
    return Prompt(cache, output.logits[:, -1], ids.shape[1])


def follow(model: VariatorModel, prompt: Prompt, ids: Tensor) -> Tensor:
    """Read `ids` (rows, t) densely after `prompt`, which grows by them: logits (rows, t, vocabulary)."""
    positions = torch.arange(prompt.tokens, prompt.tokens + ids.shape[1], device=ids.device)
    with model.disable_plugin():
        output = model(ids, cache=prompt.cache, use_cache=True, position_ids=positions[None])
    prompt.tokens += ids.shape[1]
    prompt.logits = output.logits[:, -1]
    logits: Tensor = output.logits
    return logits


def greedy(model: VariatorModel, prompt: Prompt, tokens: int, stop: frozenset[int] = frozenset()) -> Tensor:
    """The likeliest continuation of `prompt`, which grows by it: (rows, tokens).

    With `stop`, of one row: generation ends after the first token in it.
    """
    chosen = [prompt.logits.argmax(-1, keepdim=True)]
    while len(chosen) < tokens and not (stop and int(chosen[-1]) in stop):
        follow(model, prompt, chosen[-1])
        chosen.append(prompt.logits.argmax(-1, keepdim=True))
    return torch.cat(chosen, dim=1)
