"""Reading a prompt into a cache, in passes of bounded width whose result is that of a single pass.

A pass ends where groups of every ratio end, or behind the last of them: what follows is dense. Rows of different
length have their groups in different columns, so they are read apart and stacked afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from llm_variator.engine.blocks import Place
from llm_variator.engine.cache import fork, stack
from llm_variator.engine.contexts.inputs import refuse_empty
from llm_variator.engine.plugin import CompressionPlugin
from llm_variator.engine.session import Session, first_dense, scope
from llm_variator.errors import VariatorError


class PrefillChunk(NamedTuple):
    """Tokens `start` to `end` of a prompt, read together; the first `head` and last `tail` of them stay dense."""

    start: int
    end: int
    head: int
    tail: int


def chunks(n: int, *, head: int, tail: int, step: int, chunk: int) -> Iterator[PrefillChunk]:
    """Cut a prompt of `n` tokens into chunks of at most `chunk` tokens without splitting a group.

    `step`: the least common multiple of all ratios; no chunk can be narrower than head + step, where groups are.
    """
    start = 0
    while n - start > chunk:
        first = head if start == 0 else 0
        if start + first < n - tail:
            room = max(step, (chunk - first) // step * step)
            part = PrefillChunk(start, min(start + first + room, n - tail), first, 0)
        else:
            part = PrefillChunk(start, start + chunk, first, chunk)
        yield part
        start = part.end
    if start < n:
        yield PrefillChunk(start, n, head if start == 0 else 0, min(tail, n - start))


@torch.no_grad()
def read(
    base: Any,
    plugin: CompressionPlugin | None,
    cache: Cache,
    ids: Tensor,
    mask: Tensor,
    *,
    chunk: int | None = None,
    unread: int = 0,
) -> bool:
    """Read a prompt segment into `cache`, in place.

    Rows of different length are read apart where the padding between cache and segment would change a result:
    in passes of bounded width, and before layers with a sliding window. Then each row's padding comes first in
    the cache: `inputs.pads_first` puts ids and mask in the same order.

    Args:
        base: the model with the hooks.
        plugin: compresses the segment; None: it stays dense.
        cache: what comes before the segment.
        ids: (rows, n) tokens of the segment, padded on the left.
        mask: (rows, columns of the cache + n).
        chunk: tokens in one pass at most, as far as groups allow; None: any number.
        unread: leave so many last tokens (at most the dense tail) for somebody else to read.

    Returns:
        Whether rows were read apart.

    Raises:
        VariatorError: a row has no token, padding lies between tokens, or `unread` exceeds the dense tail.
    """
    past, width = mask.shape[1] - ids.shape[1], ids.shape[1]
    new = mask[:, past:].bool()
    pads = (width - new.sum(1)).tolist()
    refuse_empty(width, new)
    if not bool((new == (torch.arange(width, device=new.device) >= width - new.sum(1, keepdim=True))).all()):
        raise VariatorError("attention_mask must have its padding at one side of the prompt, not inside it")
    if plugin is not None and unread > plugin.plan.tail:
        raise VariatorError("reading a prompt in parts needs a plugin with dense_tail of at least 1")
    if not past and width - min(pads) <= unread:
        return False  # nothing to read
    kinds = sorted(set(pads))
    if kinds == [0] or not (chunk is not None or (past and slides(cache))):
        _read(base, plugin, cache, ids, mask, past, chunk, unread)
        return False
    parts, order = [], []
    for pad in kinds:
        rows = torch.tensor([row for row, own in enumerate(pads) if own == pad], device=ids.device)
        part = fork(cache)
        part.batch_select_indices(rows)
        seen = torch.cat((mask[rows, :past], mask[rows, past + pad :]), dim=1)
        _read(base, plugin, part, ids[rows, pad:], seen, past, chunk, unread)
        parts.append(part)
        order.append(rows)
    cache.layers = stack(parts, order)
    cache.unread = max(part.unread for part in parts)  # type: ignore[attr-defined]
    return True


def slides(cache: Cache) -> bool:
    """Whether some layer keeps a sliding window of columns only."""
    return any(getattr(layer, "is_sliding", False) for layer in cache.layers)


def _read(
    base: Any,
    plugin: CompressionPlugin | None,
    cache: Cache,
    ids: Tensor,
    mask: Tensor,
    past: int,
    chunk: int | None,
    unread: int,
) -> None:
    n = ids.shape[1] - unread
    head, tail, step, place = 0, n, 1, Place(0, 0)
    if plugin is not None:
        head, tail = first_dense(cache, plugin.plan), plugin.plan.tail - unread
        step = math.lcm(*(site.k for site in plugin.sites.values()))
        place = Place(head, plugin.plan.tail, 0, ids.shape[1])
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    padded = not bool(mask.all())
    for part in chunks(n, head=head, tail=tail, step=step, chunk=chunk or n):
        own = place._replace(done=part.start, left=place.left - part.start)
        with scope(Session(plugin, edges=(part.head, part.tail), place=own)) as session:
            base(
                input_ids=ids[:, part.start : part.end],
                attention_mask=mask[:, : past + part.end] if padded else None,
                position_ids=positions[:, past + part.start : past + part.end],
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        assert session is not None
        session.finish()
    if n and plugin is not None and plugin.selects:
        cache.unread = unread  # type: ignore[attr-defined]
