"""Compression while decoding: tokens that a dense window has left behind are merged like those of a prompt.

A layer keeps what it read for its last dense entries (`Recent`). Once `decode_block` of them are older than the
last `dense_tail` tokens, whole groups are merged, and the model's own attention module makes their keys and values.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llm_variator.engine.cache import CompressedLayer
from llm_variator.engine.cache.naming import cache_argument
from llm_variator.engine.cache.recent import Recent
from llm_variator.engine.groups import Grouping
from llm_variator.engine.plan import Plan
from llm_variator.engine.plugin import SiteLayers
from llm_variator.engine.session import scope


def age(
    attention: nn.Module,
    held: CompressedLayer,
    site: SiteLayers | None,
    plan: Plan | None,
    grouping: Grouping | None,
) -> None:
    """Before a pass, merge what is old enough in `held`; `grouping` of the pass: new groups end the window."""
    block = plan.config.decode_block if plan else None
    if site is None or plan is None or block is None:
        held.recent = None  # tokens come that nobody remembers
        return
    if held.recent is None:
        return
    known = len(held.recent)
    ended = grouping is not None and grouping.has_groups
    if ended or known - plan.tail >= block:
        groups = (known if ended else known - plan.tail) // site.k
        if groups and site.k > 1:
            old = held.recent.first(groups * site.k)
            keys, values = _entries(attention, site, old)
            held.merge(keys, values, site.k)
    if ended:
        held.recent = None


def remember(
    held: CompressedLayer,
    plan: Plan,
    grouping: Grouping | None,
    hidden: Tensor,
    position: tuple[Tensor, ...],
) -> None:
    """After a pass whose tokens are all in `held`: keep what the layer read for the dense ones at its end."""
    count = 1 if grouping is None else grouping.trailing
    if grouping is not None and not grouping.has_groups:  # the head of a sequence stays dense for ever
        before = held.tokens - hidden.shape[1]
        count = max(0, count - max(0, plan.head - before))
    new = Recent(hidden, position).last(count)
    if held.recent is not None and count == hidden.shape[1]:
        new = held.recent + new
    held.recent = new if len(new) else None


def _entries(attention: Any, site: SiteLayers, old: Recent) -> tuple[Tensor, Tensor]:
    """Keys and values (b, kv_heads, groups, head_dim) of merged tokens, each at its group's last position."""
    merged = site.compressor(old.hidden.unflatten(1, (-1, site.k)))
    catch = _Catch()
    with scope(None):  # the module as it is, without our hooks; what it returns is of no use
        attention(
            hidden_states=merged,
            position_embeddings=old.ends(site.k),
            attention_mask=None,
            **{cache_argument(attention): catch},
        )
    return catch.entries


class _Catch:
    """Stands in for a cache to get the keys and values a layer would store."""

    entries: tuple[Tensor, Tensor]

    def get_seq_length(self, layer: int = 0) -> int:
        return 0

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.entries = key, value
        return key, value
