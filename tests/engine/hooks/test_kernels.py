"""Attention of a whole prompt over its groups against the masked softmax written out."""

from __future__ import annotations

import pytest
import torch
from reference import entries

from llm_variator.engine.blocks import Place, Region
from llm_variator.engine.groups import Segment
from llm_variator.engine.hooks.kernels import _causal_end, _folded, group_causal_attention


def masked_softmax(query, key, value, sees, scale):
    scores = (query @ key.transpose(-1, -2)) * scale
    return scores.masked_fill(~sees, float("-inf")).softmax(-1) @ value


@pytest.mark.parametrize(
    ("k", "n", "head", "tail"), [(2, 37, 0, 1), (3, 40, 2, 5), (2, 1000, 4, 1), (4, 1700, 0, 9)]
)
def test_equals_the_masked_form(k, n, head, tail):
    """Short prompts go through one call, long ones in blocks: with gradients in both."""
    torch.manual_seed(0)
    parts = entries(n, n, k, head, tail)
    ends = torch.tensor([entry.positions[-1] for entry in parts])
    group_end = torch.tensor([entry.positions[-1] for entry in parts for _ in entry.positions])
    query = torch.randn(2, 4, n, 8, dtype=torch.double, requires_grad=True)
    key, value = (torch.randn(2, 2, len(parts), 8, dtype=torch.double, requires_grad=True) for _ in range(2))
    wide = [tensor.repeat_interleave(2, dim=1) for tensor in (key, value)]
    expected = masked_softmax(query, *wide, ends <= group_end[:, None], 0.3).transpose(1, 2)
    grouping = Segment(n, n, head=head, tail=tail, device=torch.device("cpu")).grouping(k)
    actual = group_causal_attention(query, key, value, grouping, 0.3)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    weight = torch.randn_like(expected)
    inputs = (query, key, value)
    for ours, theirs in zip(
        torch.autograd.grad(actual, inputs, weight),
        torch.autograd.grad(expected, inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_heads_as_rows_are_the_same_attention(kv_heads):
    """What a GPU gets where a mask meets grouped heads."""
    torch.manual_seed(0)
    query = torch.randn(2, 6, 5, 8, dtype=torch.double)
    key, value = (torch.randn(2, kv_heads, 19, 8, dtype=torch.double) for _ in range(2))
    mask = torch.ones(5, 19, dtype=torch.bool).tril(14)
    wide = [tensor.repeat_interleave(6 // kv_heads, dim=1) for tensor in (key, value)]
    expected = masked_softmax(query, *wide, mask, 0.3)
    torch.testing.assert_close(_folded(query, key, value, mask, 0.3), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(_causal_end(query, key, value, 0.3), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_begins_where_a_gpu_can_read_it(dtype):
    """Sixteen numbers or a multiple from the beginning of memory, in every row; the values are those of a CPU."""
    regions = [Region([Place(4, 1, 0, 900)], [900], 64, torch.device("cpu")) for _ in range(2)]
    regions[1].alignment = 16
    for keys in (133, 197, 140, 600, 133, 601):  # growing, smaller again, other remainders
        for wanted, found in (
            [region.causal(3, 100, keys, dtype) for region in regions],
            [region.near_and_far(2, 70, keys, 132, 1, 16, dtype) for region in regions]
            if keys > 150
            else (None, None),
        ):
            if wanted is None:
                continue
            assert torch.equal(found, wanted)
            assert found.storage_offset() % 16 == 0
            assert found.stride() == (found.stride(0), 1)
            assert found.stride(0) % 16 == 0
