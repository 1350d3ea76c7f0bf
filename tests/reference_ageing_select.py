"""The plain form of decode-time compression with the compressor "select": `reference_select` with tokens that age.

Independent of the code under test: one mask per KV head, filled in token by token, as the rules read. A window of
dense tokens is behind the prompt; `step` of its oldest are reduced before a token that would be the newest of
`near` + `step` others in it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import reference_select as plain
import torch
from reference_select import Read, Segment, Select
from torch import Tensor


def reduced(scores: Sequence[float], positions: Sequence[int], ratio: int, block: int) -> list[int]:
    """Of tokens that stand side by side the best of each block; the last block may be short."""
    kept: list[int] = []
    for start in range(0, len(positions), block):
        own = positions[start : start + block]
        kept += sorted(plain.best(scores, own, math.ceil(len(own) / ratio)))
    return kept


def head_mask(
    h: Tensor,
    index: int,
    g: int,
    segments: Sequence[Segment],
    *,
    slides: bool,
    select: Select,
    head: int,
    step: int,
) -> tuple[Tensor, list[int]]:
    """As `reference_select.head_mask`; of every token there is a score. `head`: of the sequence."""
    n = len(h)
    if slides or max(select.ratios[index]) == 1:
        return torch.ones(n, n, dtype=torch.bool).tril(), list(range(n))
    mask = torch.zeros(n, n, dtype=torch.bool)
    weight, bias, ratio = select.weights[index], select.biases[index], select.ratios[index][g]
    scores = [plain.score(row, weight[:, g], bias[:, g]) for row in h.detach()]
    rounded = [float(torch.tensor(score).half()) for score in scores]
    near = max(select.tail, select.block)
    memory: list[int] = []
    window: list[int] = []
    start = 0
    for segment in segments:
        end, rule = start + segment.tokens, (segment.tokens, segment.head, select.tail, select.block)
        if segment.select is not None and not plain.stays_dense(*rule):
            memory += reduced(rounded, window, ratio, select.block)
            seen = plain.seen_while_reading(scores[start:end], ratio, *rule)
            for query in range(start, end):
                mask[query, memory] = True
                for key in range(start, end):
                    mask[query, key] = seen[query - start][key - start]
            left = [start + key for key in plain.kept_after(scores[start:end], ratio, *rule)]
            window = list(range(end - select.tail, end))
            memory += [key for key in left if key not in window]
        else:
            for query in range(start, end):
                if len(window) - near >= step:
                    memory += reduced(rounded, window[:step], ratio, select.block)
                    window = window[step:]
                (memory if query < head else window).append(query)
                mask[query, memory] = True
                mask[query, window] = True
        start = end
    return mask, [*memory, *window]


@torch.no_grad()
def read(model, ids: Tensor, segments: Sequence[Segment]) -> Read:
    """(1, n) tokens in `segments`, with the active plugin of a wrapped model."""
    config = model.plugin().config
    layers, groups = model.base.config.num_hidden_layers, model.base.config.num_key_value_heads
    select = plain.of_plugin(model.plugin(), layers, groups)
    rule = functools.partial(head_mask, select=select, head=config.dense_head, step=config.decode_block)
    return plain.read(model.base, ids, segments, head_mask=rule)
