"""Where a plugin attaches: hooks on the modules that an `Architecture` names. No forward is copied.

FFN: a pre-hook merges the groups, the frozen FFN runs on the entries, a hook restores the tokens.
KV: the key and value projections run on the entries; their outputs are put back at the entries' columns, so
that the model's own code applies its norms and the position of each group's last token; then only the
entries' columns go to the cache and to attention.
Attention: the whole self-attention runs on the entries, then a hook restores the tokens.
Cross (T5): the decoder gets one merged encoder state per group, so that all of its layers read n/k of them.
Where a model adds the residual inside the module that ends a site (BERT), the tokens are restored before it.
Last layer of a decoder: what nobody reads is left out, see `last_layer`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llm_variator.engine.cache.naming import cache_argument
from llm_variator.engine.hooks.attention import (
    ATTENTION_FUNCTION,
    OwnAttentionFunction,
    attention_forward,
    hook_attention,
)
from llm_variator.engine.hooks.ffn import hook_ffn
from llm_variator.engine.hooks.hook import ATTACHED, Hook, Mark, strip
from llm_variator.engine.hooks.last_layer import hook_last_layer
from llm_variator.engine.hooks.passes import begin_answer, begin_encoding, begin_pass, end_pass
from llm_variator.engine.hooks.switch import HookPart, HookSwitch, Hung
from llm_variator.engine.rotary import hook_rotary
from llm_variator.errors import VariatorError


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family of models as paths of real modules; a path that does not resolve fails when attaching."""

    model_types: tuple[str, ...]
    layers: str
    """From the reader (of a decoder without its head) to the list of layers; the rest are paths from one layer."""
    ffn: str
    attention: str
    key: str
    """From the attention, like `value`."""
    value: str
    query: str = ""
    """From the attention, like `output`. Of decoders, for their last layer."""
    output: str = ""
    norm: str = ""
    """From a layer: what its attention reads goes through this first."""
    neurons: str = ""
    """From a layer: the projection of its FFN that reads the neurons' activations."""
    ffn_end: str = ""
    """Where the FFN's output appears, if not in `ffn`."""
    attention_end: str = ""
    """Where the attention's output appears, if not in `attention`."""
    reader: str = ""
    """From the model (an encoder's without its head) to the module that reads the tokens to compress."""
    answers: str = ""
    """From an encoder (without its head) to the decoder that reads it, where a model has one."""
    decoder: bool = True

    def stack(self, base: PreTrainedModel) -> nn.Module:
        """The module of `base` that reads the tokens to compress."""
        return (base if self.decoder else base.base_model).get_submodule(self.reader)

    def layers_path(self, base: PreTrainedModel) -> str:
        """From `stack` to the list of layers: a decoder's head, where it has one, lies between."""
        headed = self.decoder and base.base_model is not base
        return f"{base.base_model_prefix}.{self.layers}" if headed else self.layers

    def blocks(self, base: PreTrainedModel) -> nn.ModuleList:
        """The layers of `base`."""
        return self.stack(base).get_submodule(self.layers_path(base))  # type: ignore[return-value]

    def answering(self, base: PreTrainedModel) -> nn.Module | None:
        """The decoder of `base` that reads what its encoder read; None where there is none."""
        return getattr(base.base_model, self.answers, None) if self.answers else None

    def check(self, base: PreTrainedModel) -> None:
        """Raise naming the module that `base` lacks, or the setting that does not suit."""
        kind = type(base).__name__
        try:
            blocks = self.blocks(base)
        except AttributeError:
            raise VariatorError(f"{kind} has no {self.layers_path(base)!r}: load it whole") from None
        paths = [self.ffn, self.neurons, self.ffn_end, self.attention, self.attention_end]
        inner = filter(None, (self.key, self.value, self.query, self.output))
        paths += [self.norm, *(f"{self.attention}.{projection}" for projection in inner)]
        for path in filter(None, paths):
            for index, block in enumerate(blocks):
                try:
                    block.get_submodule(path)
                except AttributeError:
                    raise VariatorError(f"{kind}: layer {index} has no {path!r}") from None
            cache_argument(block.get_submodule(self.attention))
        if self.decoder:
            cache_argument(base)
        if not self.decoder and getattr(base.config, "is_decoder", False):
            raise VariatorError(f"{kind} with is_decoder=True is not supported: load it as an encoder")
        if self.decoder and getattr(base.config, "use_bidirectional_attention", False):
            raise VariatorError(
                f"{kind} with use_bidirectional_attention reads what comes later, as an encoder does: such models have "
                "no plugins"
            )
        if getattr(base.config, "chunk_size_feed_forward", 0):
            raise VariatorError(
                "chunk_size_feed_forward cuts the sequence inside the FFN: set it to 0 in the model's config"
            )

    def slides(self, base: PreTrainedModel, layer: int) -> bool:
        """Whether `layer` attends through a sliding window: its cache is short already and stays dense."""
        kinds = getattr(base.config, "layer_types", None)
        if kinds is not None:
            return kinds[layer] != "full_attention"
        return getattr(base.config, "sliding_window", None) is not None

    def attach(self, base: PreTrainedModel) -> list[Any]:
        """Put the hooks on every layer of `base`; calling `remove()` on each of the handles undoes it."""
        strip(base)
        count = len(self.blocks(base))
        switch = HookSwitch(lambda: self._hang(base, count))
        stack = self.stack(base)
        if self.decoder:
            begin: Any = partial(begin_pass, cache_name=cache_argument(base))
        else:
            begin = partial(begin_encoding, names=list(inspect.signature(type(stack).forward).parameters)[1:])
        starts = [stack.register_forward_pre_hook(Hook(switch.before(begin)), with_kwargs=True)]
        if (reader := self.answering(base)) is not None:
            answer = partial(begin_answer, cache_name=cache_argument(reader))
            starts.append(reader.register_forward_pre_hook(Hook(answer), with_kwargs=True))
        setattr(base, ATTACHED, Mark())
        return [*map(HookPart, starts), switch]  # no weak references: garbage collection clears them first

    def _hang(self, base: PreTrainedModel, count: int) -> Hung:
        """Hooks on the `count` layers that `base` has now.

        Raises:
            VariatorError: it has other modules than when the plugins were made.
        """
        self.check(base)
        stack, blocks = self.stack(base), self.blocks(base)
        if len(blocks) != count:
            raise VariatorError(
                f"the base has {len(blocks)} layers now and had {count} when it was wrapped: wrap it anew"
            )
        hung = Hung([stack.register_forward_hook(Hook(end_pass)), *hook_rotary(stack, Hook)], [], [])
        links = dict.fromkeys(_links(base if self.decoder else base.base_model, self.reader))
        links |= dict.fromkeys(_links(stack, self.layers_path(base)))
        for index, block in enumerate(blocks):
            links[blocks, str(index), block] = None
            inner = (self.key, self.value, self.query, self.output)
            paths = [self.ffn, self.ffn_end, self.attention, self.attention_end, self.norm]
            for path in [*paths, *(f"{self.attention}.{own}" for own in inner if own)]:
                links |= dict.fromkeys(_links(block, path))
            ffn, attention = block.get_submodule(self.ffn), block.get_submodule(self.attention)
            hung.handles.extend(hook_ffn(ffn, block.get_submodule(self.ffn_end or self.ffn), index))
            slides, last = self.slides(base, index), self.decoder and index == count - 1
            if not slides:
                projections = [attention.get_submodule(path) for path in (self.key, self.value)]
                end = block.get_submodule(self.attention_end or self.attention)
                hung.handles.extend(hook_attention(attention, projections, end, index, causal=self.decoder))
            if last or not slides:
                hung.others.append(OwnAttentionFunction(attention, ATTENTION_FUNCTION, attention_forward))
            if last:
                query, output = (attention.get_submodule(path) for path in (self.query, self.output))
                norm = block.get_submodule(self.norm)
                hung.handles.extend(hook_last_layer(block, norm, query, output, attention, index))
        hung.links.extend(links)
        return hung


def _links(module: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, module) of every step from `module` along `path`."""
    for name in filter(None, path.split(".")):
        child = module.get_submodule(name)
        if name in module._modules:  # a wrapper (FSDP) passes on what is inside
            yield module, name, child
        module = child
