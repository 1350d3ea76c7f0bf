"""The last layer of a decoder computes only what is read.

Whoever reads the logits of the last columns alone (`generate`, or `logits_to_keep`) needs of every other column
no more than the last layer's keys and values. Queries, attention output and FFN of those columns are left out:
the rest of the layer, whose residual gets the columns read, is the same arithmetic on fewer rows.

The first norm of the layer still gets all columns, for keys and values. Where the model's own code counts on
tensors of full length, between its projections, the rows in front are there and hold nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llm_variator.engine.hooks.hook import Hook, own_implementation
from llm_variator.engine.session import Pass, current_pass

_SITES = ("ffn", "kv", "attention")


def hook_last_layer(
    block: nn.Module, norm: nn.Module, query: nn.Module, output: nn.Module, attention: Any, layer: int
) -> list[RemovableHandle]:
    """Leave out what nobody reads of `block`, the last layer, with its first norm and its projections."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        now = current_pass()
        if now is None or now.reads is None or not args:
            return None
        if not _only_dense_columns_read(now, args[0].shape[1], layer):
            return None
        if not _masks_can_be_cut(attention, kwargs.get("attention_mask"), now.reads):
            return None
        now.narrow, now.narrowed, now.whole = now.reads, layer, args[0]
        return (_last(args[0], now.narrow), *args[1:]), kwargs

    def before_norm(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        now = current_pass()
        if now is None or (whole := now.whole) is None:
            return None
        now.whole = None
        return (whole,)

    def before_query(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        now = current_pass()
        if now is None or now.narrow is None:
            return None
        now.query_width = args[0].shape[1]
        return (_last(args[0], now.narrow),)

    def after_query(module: nn.Module, args: tuple[Tensor], result: Tensor) -> Tensor | None:
        now = current_pass()
        if now is None or now.narrow is None:
            return None
        return at_the_end(result, now.query_width)

    def before_output(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        now = current_pass()
        return None if now is None or now.narrow is None else (_last(args[0], now.narrow),)

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        if (now := current_pass()) is not None:
            now.narrow = None

    return [
        block.register_forward_pre_hook(Hook(before), with_kwargs=True),
        block.register_forward_hook(Hook(after)),
        norm.register_forward_pre_hook(Hook(before_norm)),
        query.register_forward_pre_hook(Hook(before_query)),
        query.register_forward_hook(Hook(after_query)),
        output.register_forward_pre_hook(Hook(before_output)),
    ]


def _last(x: Tensor, rows: int) -> Tensor:
    """(b, n, ...) -> (b, rows, ...), copied: torch multiplies a view of one row with a slow batched product."""
    return x[:, -rows:].clone(memory_format=torch.contiguous_format)


def at_the_end(rows: Tensor, width: int) -> Tensor:
    """(b, r, ...) -> (b, width, ...): zeros in front."""
    out = rows.new_zeros(rows.shape[0], width, *rows.shape[2:])
    out[:, -rows.shape[1] :] = rows
    return out


def _only_dense_columns_read(now: Pass, width: int, layer: int) -> bool:
    """Whether fewer columns than `width` are read, and this layer merges none of them."""
    reads, segment, plugin = now.reads, now.segment, now.plugin
    if reads is None or segment is None or reads >= width:
        return False
    sites = [plugin.at(site, layer) for site in _SITES] if plugin else []
    return all(segment.grouping(site.k).trailing >= reads for site in sites if site is not None)


def _masks_can_be_cut(attention: Any, mask: Any, reads: int) -> bool:
    """Whether the model's own attention takes the mask of its last queries: kernels with other masks may not."""
    if own_implementation(attention) in ("sdpa", "eager"):
        return mask is None or (isinstance(mask, Tensor) and mask.ndim == 4)
    return mask is None and reads == 1
