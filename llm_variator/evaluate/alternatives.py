"""What a plugin competes with at equal cost, none of it trained: dropping prompt tokens, skipping late layers.

Both keep the prompt's first `head` and last `tail` tokens as they are, as plugins do: the attention sinks, and
what the next tokens need most.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from llm_variator.engine.cache.naming import cache_argument
from llm_variator.engine.groups import Split, split
from llm_variator.engine.hooks import architecture_of
from llm_variator.errors import VariatorError
from llm_variator.measures.conditions import Dense, Prompt, read_with
from llm_variator.measures.operations import Cost, Stack, prefill
from llm_variator.model import VariatorModel


@dataclasses.dataclass(frozen=True)
class Drop:
    """Of every `k` tokens between head and tail only the last is read; what is read keeps its position."""

    k: int
    head: int
    tail: int

    @property
    def label(self) -> str:
        """With the ratio."""
        return f"drop:{self.k}"

    def columns(self, n: int) -> Tensor:
        """(kept,) the places of a prompt of `n` tokens that are read."""
        head, groups, tail = split(n, self.k, self.head, self.tail)
        ends = head + self.k * torch.arange(1, groups + 1) - 1
        return torch.cat((torch.arange(head), ends, torch.arange(n - tail, n)))

    def read(self, model: VariatorModel, ids: Tensor) -> Prompt:
        """The tokens that are left, through all layers."""
        columns = self.columns(ids.shape[1]).to(ids.device)
        with model.disable_plugin():
            prompt = read_with(model, ids[:, columns], position_ids=columns[None])
        return Prompt(prompt.cache, prompt.logits, ids.shape[1])

    def cost(self, stack: Stack, n: int, *, causal: bool = True) -> Cost:
        """That of a shorter prompt."""
        return prefill(stack, len(self.columns(n)), causal=causal)


@dataclasses.dataclass(frozen=True)
class LateSkip:
    """From layer `first` on, tokens between head and tail give only keys and values, all from one hidden state.

    It is the one that enters layer `first`; each later layer applies its own norm and projections to it, as in
    SwiftKV (arXiv 2410.03960), which retrains those projections. Here nothing is trained. All entries stay.
    """

    first: int
    head: int
    tail: int

    @property
    def label(self) -> str:
        """With the layer."""
        return f"late-skip:{self.first}"

    def _split(self, n: int) -> Split:
        return split(n, 1, self.head, max(1, self.tail))  # the last token's logits are read

    def read(self, model: VariatorModel, ids: Tensor) -> Prompt:
        """All tokens through the early layers, head and tail through the late ones.

        Raises:
            VariatorError: the model has no such layer, or one of these layers has a sliding window.
        """
        part = self._split(ids.shape[1])
        if not part.groups:
            return Dense().read(model, ids)
        with model.disable_plugin(), self._attached(model, part):
            return read_with(model, ids)

    @contextlib.contextmanager
    def _attached(self, model: VariatorModel, part: Split) -> Iterator[None]:
        base: Any = model.base
        architecture = architecture_of(base)
        blocks = architecture.blocks(base)
        check_layer(self.first, len(blocks))
        if any(architecture.slides(base, index) for index in range(self.first, len(blocks))):
            raise VariatorError(
                f"late-skip:{self.first} needs full attention from there on; {base.config.model_type!r} has "
                "layers with a sliding window"
            )
        skipping = _Skipping(part, self.first, blocks[self.first].get_submodule(architecture.attention))
        handles = [
            block.register_forward_pre_hook(skipping.enter, with_kwargs=True)
            for block in list(blocks)[self.first :]
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def cost(self, stack: Stack, n: int, *, causal: bool = True) -> Cost:
        """FFNs, queries and outputs of head and tail alone in the late layers, keys and values of all tokens."""
        head, skipped, tail = self._split(n)
        left = n - skipped
        seen = head * (head + 1) // 2 + tail * (n - tail) + tail * (tail + 1) // 2 if causal else left * n
        early = prefill(dataclasses.replace(stack, layers=self.first), n, causal=causal)
        late = Cost(
            ffn=2 * stack.ffn_weights * left,
            projections=2 * stack.query_weights * left + 2 * stack.key_value_weights * n,
            scores=2 * 2 * stack.attention_width * seen,
            cache_entries=n,
        )
        return sum((late for _ in range(stack.layers - self.first)), early)


def check_layer(first: int, layers: int) -> None:
    """Raise unless a model of `layers` layers can skip from layer `first` on."""
    if not 0 < first < layers:
        raise VariatorError(
            f"late-skip:{first}: choose a layer from 1 to {layers - 1}, the model has {layers}"
        )


class _Skipping:
    """What the late layers of one pass share. The cache gets the skipped tokens first, then head and tail."""

    def __init__(self, part: Split, first: int, attention: nn.Module) -> None:
        self.part, self.first = part, first
        self.rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        self.skipped: Tensor | None = None
        self.mask: Tensor | None = None

    def enter(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Pre-hook of a late layer: give its cache the skipped tokens, and let head and tail enter."""
        attention = block.self_attn
        layer = attention.layer_idx
        (hidden, *rest), positions = args, kwargs["position_embeddings"]
        if layer == self.first:
            hidden, self.skipped = self._parts(hidden)
            self.mask = self._make_mask(hidden)
        assert self.skipped is not None
        angles = [self._parts(table) for table in positions]  # cosines, sines
        normed = block.input_layernorm(self.skipped)
        heads = (*normed.shape[:-1], -1, attention.head_dim)
        key = attention.k_proj(normed).view(heads)
        if hasattr(attention, "k_norm"):
            key = attention.k_norm(key)
        key, value = key.transpose(1, 2), attention.v_proj(normed).view(heads).transpose(1, 2)
        key = self.rotate(key, key, *(skipped for _, skipped in angles))[1]
        kwargs[cache_argument(block)].update(key, value, layer)
        own = tuple(kept for kept, _ in angles)
        return (hidden, *rest), {**kwargs, "attention_mask": self.mask, "position_embeddings": own}

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, n, d) -> head and tail (b, left, d), and the skipped tokens between them."""
        head, middle, tail = x.split(tuple(self.part), dim=1)
        return torch.cat((head, tail), dim=1), middle

    def _make_mask(self, hidden: Tensor) -> Tensor:
        """(1, 1, left, n) additive: columns in the cache's order, skipped tokens, head, tail."""
        head, skipped, tail = self.part
        order = torch.arange(head + skipped + tail, device=hidden.device)
        kept, middle = self._parts(order[None, :, None])
        columns = torch.cat((middle, kept), dim=1)[0, :, 0]
        hidden_from = columns[None] > kept[0]
        mask = torch.zeros(hidden_from.shape, dtype=hidden.dtype, device=hidden.device)
        return mask.masked_fill_(hidden_from, torch.finfo(hidden.dtype).min)[None, None]


def parse(text: str, config: PreTrainedConfig, head: int, tail: int) -> Drop | LateSkip:
    """`drop:2` -> `Drop`, `late-skip:15` -> `LateSkip`; `late-skip` alone begins in the middle of the model.

    Raises:
        VariatorError: another name, or a number that does not fit the model.
    """
    name, _, number = text.partition(":")
    if name not in ("drop", "late-skip") or not (number.isdecimal() or not number):
        raise VariatorError(f"unknown alternative {text!r}; known are drop:K, late-skip:LAYER and mean:K")
    if name == "drop":
        k = int(number or 2)
        if k < 2:
            raise VariatorError(f"{text}: drop needs a ratio of at least 2")
        return Drop(k, head, tail)
    layers = int(config.num_hidden_layers)
    first = int(number or layers // 2)
    check_layer(first, layers)
    return LateSkip(first, head, tail)
