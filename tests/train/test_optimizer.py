"""AdamW in relative steps: against torch's own in the coordinates that it is said to walk in, and by hand."""

from __future__ import annotations

import copy
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import train
from torch.optim import AdamW

from llm_variator.train.optimizer import RelativeAdamW, sizes


def test_sizes_by_hand():
    weights = torch.tensor([[3.0, 4.0], [0.0, 0.0], [6.0, 8.0]])
    assert torch.allclose(sizes(weights), weights)  # one factor per row, one per column
    # squares 1, 1, 1, 9: means of rows 1 and 5, of columns 1 and 5, of all 3
    mixed = sizes(torch.tensor([[1.0, -1.0], [1.0, -3.0]]))
    assert torch.allclose(mixed.square(), torch.tensor([[1.0, 5.0], [5.0, 25.0]]) / 3)
    several = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(sizes(several), torch.stack([sizes(one) for one in several]))
    assert torch.equal(sizes(torch.tensor([-2.0, 0.5])), torch.tensor([2.0, 0.5]))
    assert torch.equal(sizes(torch.zeros(2, 3)), torch.ones(2, 3))


def problem(seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Weights of a map through a bottleneck, of channels that differ by six orders, with its inputs and outputs."""
    draw = torch.Generator().manual_seed(seed)
    channels = torch.logspace(-3, 3, 5, dtype=torch.float64)
    inputs = torch.randn(64, 5, generator=draw, dtype=torch.float64) * channels
    down = torch.randn(2, 5, generator=draw, dtype=torch.float64) / channels
    up, bias = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((3, 2), (3,)))
    wanted = inputs @ torch.randn(5, 3, generator=draw, dtype=torch.float64)
    return [down, up, bias, torch.zeros(3, dtype=torch.float64)], inputs, wanted


def loss_of(weights, inputs, wanted):
    down, up, bias, more = weights
    return (inputs @ down.T @ up.T + bias + more - wanted).square().mean()


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_it_is_adamw_of_weights_divided_by_their_sizes(weight_decay):
    start, inputs, wanted = problem()
    weights = [weight.clone().requires_grad_() for weight in start]
    scales = [sizes(weight) for weight in start]
    shares = [(weight / scale).requires_grad_() for weight, scale in zip(start, scales, strict=True)]
    options = dict(lr=0.05, weight_decay=weight_decay, eps=1e-30)
    ours, theirs = RelativeAdamW(weights, **options), AdamW(shares, **options)
    for step in range(30):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 30)
            optimizer.zero_grad()
        loss_of(weights, inputs, wanted).backward()
        loss_of(
            [share * scale for share, scale in zip(shares, scales, strict=True)], inputs, wanted
        ).backward()
        ours.step()
        theirs.step()
    for weight, share, scale in zip(weights, shares, scales, strict=True):
        assert torch.allclose(weight, share * scale, rtol=1e-9, atol=0)


def test_weights_without_a_gradient_stay():
    moved, left = (torch.ones(2, 2, requires_grad=True) for _ in range(2))
    optimizer = RelativeAdamW([moved, left], lr=0.1, weight_decay=0.1)
    moved.sum().backward()
    optimizer.step()
    assert torch.allclose(moved, torch.full((2, 2), 1 - 0.01 - 0.1))
    assert torch.equal(left, torch.ones(2, 2))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_outlive_a_step_that_fails(monkeypatch, error):
    weight = torch.tensor([[1.0, 2.0]], requires_grad=True)
    weight.grad = torch.ones_like(weight)

    def fails(self, closure=None):
        raise error

    optimizer = RelativeAdamW([weight], lr=0.1)
    monkeypatch.setattr(AdamW, "step", fails)
    with pytest.raises(error):
        optimizer.step()
    assert weight.tolist() == [[1.0, 2.0]]


def test_a_closure_sees_the_weights():
    weight = torch.full((2, 2), 3.0, requires_grad=True)
    optimizer = RelativeAdamW([weight], lr=0.1, weight_decay=0.0)

    def closure():
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 12
    assert torch.allclose(weight, torch.full((2, 2), 2.7))


def test_its_state_goes_on_exactly():
    start, inputs, wanted = problem()
    found = []
    for stops in (False, True):
        weights = [weight.clone().requires_grad_() for weight in start]
        optimizer = RelativeAdamW(weights, lr=0.05, weight_decay=0.0)
        for step in range(8):
            if stops and step == 4:
                state = copy.deepcopy(optimizer.state_dict())
                weights = [weight.detach().clone().requires_grad_() for weight in weights]
                optimizer = RelativeAdamW(weights, lr=0.05, weight_decay=0.0)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            loss_of(weights, inputs, wanted).backward()
            optimizer.step()
        found.append(weights)
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_a_run_in_relative_steps_resumes_exactly(tmp_path):
    settings = dict(init="least-squares", init_tokens=200, learning_rate=0.01, save_total_limit=9)
    plain = train(tmp_path / "plain", **settings)
    whole = train(tmp_path / "whole", "--relative-steps", **settings)
    assert whole["held_out_history"][0] == plain["held_out_history"][0]
    assert whole["held_out_history"][-1] != plain["held_out_history"][-1]
    half = tmp_path / "half"
    half.mkdir()
    for name in ("checkpoint-2", "start"):
        if (tmp_path / "whole" / name).exists():
            shutil.copytree(tmp_path / "whole" / name, half / name)
    shutil.copy(tmp_path / "whole" / "run.json", half)
    train(half, "--resume", "--relative-steps", **settings)
    ours, theirs = (load_file(tmp_path / name / "variator.safetensors") for name in ("half", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
