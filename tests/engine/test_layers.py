"""The two layers against the paper's equations in fp64, and the paper's counts."""

from __future__ import annotations

import pytest
import torch
from conftest import randomise

from llm_variator.engine.layers import HiddenCompressor, HiddenDecompressor


def test_compressor_is_the_equation():
    layer = HiddenCompressor(6, 3).double()
    randomise(layer, 1.0)
    h = torch.randn(4, 5, 3, 6, dtype=torch.float64)
    for b in range(4):
        for i in range(5):
            concat = torch.cat([h[b, i, j] for j in range(3)])
            a = torch.softmax(layer.weight @ concat + layer.bias, 0)
            expected = sum(a[j] * h[b, i, j] for j in range(3))
            torch.testing.assert_close(layer(h)[b, i], expected)
            torch.testing.assert_close(layer.weights(h)[b, i], a)


@pytest.mark.parametrize("mean", [False, True])
def test_a_short_group_has_zeros_and_no_weight_where_members_are_missing(mean):
    layer = HiddenCompressor(6, 3, mean=mean).double()
    randomise(layer, 1.0)
    h = torch.randn(4, 3, 6, dtype=torch.float64)
    h[1, 2] = h[2, 1:] = 0
    members = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
    for i, size in enumerate((3, 2, 1, 3)):
        scores = torch.zeros(3) if mean else layer.weight @ h[i].flatten() + layer.bias
        a = torch.exp(scores[:size]) / torch.exp(scores[:size]).sum()
        expected = sum(a[j] * h[i, j] for j in range(size))
        torch.testing.assert_close(layer(h, members)[i], expected)
        torch.testing.assert_close(layer.weights(h, members)[i, :size], a.double())
        assert not layer.weights(h, members)[i, size:].any()


@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_decompressor_is_the_equation(activation):
    """On the concatenation, as printed, though the layer never builds it."""
    layer = HiddenDecompressor(6, 4, activation=activation).double()
    randomise(layer, 1.0)
    g, h = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 3, 6, dtype=torch.float64)
    for i in range(5):
        for j in range(3):
            inner = layer.down.weight @ torch.cat((g[i], h[i, j])) + layer.down.bias
            inner = inner.tanh() if activation == "tanh" else inner
            expected = g[i] + layer.up.weight @ inner + layer.up.bias
            torch.testing.assert_close(layer(g, h)[i, j], expected)


def test_layers_start_as_mean_and_copy():
    h, g = torch.randn(5, 4, 6), torch.randn(5, 6)
    torch.testing.assert_close(HiddenCompressor(6, 4)(h), h.mean(-2))
    torch.testing.assert_close(HiddenCompressor(6, 4, mean=True)(h), h.mean(-2))
    torch.testing.assert_close(HiddenDecompressor(6, 2)(g, h), g[:, None].expand(5, 4, 6))
    torch.testing.assert_close(HiddenDecompressor(6, 2, copy=True)(g, h), g[:, None].expand(5, 4, 6))


def test_parameter_counts_of_the_paper():
    """Section 3.4: k²d + k and 3rd + r + d; for k=4, r=64, d=768 they are 3.4 % of an FFN's 8d²."""
    k, r, d = 4, 64, 768
    compressor = sum(p.numel() for p in HiddenCompressor(d, k).parameters())
    decompressor = sum(p.numel() for p in HiddenDecompressor(d, r).parameters())
    assert compressor == k * k * d + k
    assert decompressor == 3 * r * d + r + d
    assert round((compressor + decompressor) / (8 * d * d), 3) == 0.034
    assert not list(HiddenCompressor(d, k, mean=True).parameters())
    assert not list(HiddenDecompressor(d, r, copy=True).parameters())


def test_master_weights_may_be_finer_than_the_model():
    h, g = torch.randn(5, 4, 6).bfloat16(), torch.randn(5, 6).bfloat16()
    merge, restore = HiddenCompressor(6, 4), HiddenDecompressor(6, 2)
    assert merge(h).dtype == restore(g, h).dtype == torch.bfloat16
    (merge(h).sum() + restore(g, h).sum()).backward()
    assert restore.up.weight.grad.dtype == torch.float32


def unlike_factors(activation: str = "identity") -> HiddenDecompressor:
    """As least squares leave them: what is read by weights that float16 does not hold, and written by tiny ones."""
    layer = HiddenDecompressor(6, 4, activation=activation)
    with torch.no_grad():
        layer.down.weight.normal_(0, 1e5)
        layer.down.bias.normal_(0, 1e5)
        layer.up.weight.normal_(0, 1e-5)
        layer.down.weight[2], layer.down.bias[2] = 0, 0  # units that say nothing
        layer.up.weight[:, 3] = 0
    return layer


def test_balanced_factors_say_exactly_the_same():
    layer = unlike_factors()
    before = {name: value.clone() for name, value in layer.named_parameters()}
    layer.balance()
    for unit in (0, 1):
        scale = float(before["down.bias"][unit] / layer.down.bias[unit])
        assert scale.hex().startswith("0x1.0000000000000p")
        assert torch.equal(before["down.weight"][unit], layer.down.weight[unit] * scale)
        assert torch.equal(before["up.weight"][:, unit] * scale, layer.up.weight[:, unit])
        rows = max(layer.down.weight[unit].abs().max(), layer.down.bias[unit].abs())
        assert 0.5 <= rows / layer.up.weight[:, unit].abs().max() <= 2
    assert torch.equal(layer.up.weight[:, 2], before["up.weight"][:, 2])
    assert layer.up.weight[:, 3].eq(0).all()
    assert layer.down.weight[3].abs().max() < 2


@pytest.mark.parametrize("cast", [lambda layer: layer.half(), lambda layer: layer.to(torch.float16)])
def test_float16_holds_large_factors(cast):
    layer = unlike_factors()
    h, g = torch.randn(5, 4, 6), torch.randn(5, 6)
    joined = torch.cat((g[:, None].expand(5, 4, 6), h), dim=-1).double()
    down, up = layer.down.double(), layer.up.double()
    expected = g[:, None] + (joined @ down.weight.T + down.bias) @ up.weight.T + up.bias
    layer.down.float(), layer.up.float()
    half = cast(torch.nn.ModuleList([layer]))[0]
    assert all(value.isfinite().all() for value in half.parameters())
    torch.testing.assert_close(half(g.half(), h.half()).double(), expected, rtol=2e-2, atol=2e-2)


def test_factors_around_an_activation_stay_as_they_are():
    layer = unlike_factors("tanh")
    before = layer.down.weight.clone()
    layer.balance()
    assert torch.equal(layer.down.weight, before)


@pytest.mark.parametrize("activation", ["identity", "tanh"])
def test_groups_may_be_views_of_longer_rows(activation):
    """Between a dense head and tail: the same as each group alone."""
    k, dim = 3, 8
    compressor = HiddenCompressor(dim, k).double()
    decompressor = HiddenDecompressor(dim, 4, activation=activation).double()
    for layer in (compressor, decompressor):
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter)
    rows = torch.randn(2, 4 + 5 * k + 2, dim, dtype=torch.double)
    groups = rows[:, 4:-2].unflatten(1, (5, k))
    assert not groups.is_contiguous()
    merged = compressor(groups)
    restored = decompressor(merged, groups)
    for row in range(2):
        for group in range(5):
            alone = groups[row, group].clone()
            torch.testing.assert_close(merged[row, group], compressor(alone), atol=1e-12, rtol=0)
            ours = decompressor(merged[row, group], alone)
            torch.testing.assert_close(restored[row, group], ours, atol=1e-12, rtol=0)
