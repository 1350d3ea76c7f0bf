"""Attention of a whole prompt over its groups against the masked softmax written out."""

from __future__ import annotations

import pytest
import torch
from reference import entries

from llm_variator.engine.groups import Segment
from llm_variator.engine.hooks.kernels import group_causal_attention


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
