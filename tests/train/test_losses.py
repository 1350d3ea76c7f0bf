"""Losses against hand arithmetic and torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from llm_variator.train.losses import LOSSES, Outputs, continuation_kl, hidden_mse


def outputs(seed: int, rows: int = 2, tokens: int = 5, width: int = 3, continuation: int = 2, vocab: int = 7):
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, tokens, width, generator=draw)
    return Outputs(hidden, torch.randn(rows, continuation, vocab, generator=draw))


def test_mse_by_hand():
    student = Outputs(torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]))
    teacher = Outputs(torch.tensor([[[0.0, 0.0], [3.0, 1.0]]]))
    assert hidden_mse(student, teacher).item() == (1 + 4 + 9 + 1) / 4


def test_mse_ignores_padding():
    student, teacher = outputs(0), outputs(1)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    kept = [(student.hidden[i, m], teacher.hidden[i, m]) for i, m in enumerate(mask.bool())]
    ours, theirs = (torch.cat(side) for side in zip(*kept, strict=True))
    assert torch.isclose(hidden_mse(student, teacher, mask), torch.nn.functional.mse_loss(ours, theirs))


def test_kl_is_from_teacher_to_student():
    student, teacher = outputs(0), outputs(1)
    expected = kl_divergence(Categorical(logits=teacher.logits), Categorical(logits=student.logits))
    assert torch.isclose(continuation_kl(student, teacher), expected.mean())
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    assert torch.isclose(continuation_kl(student, teacher, mask), (expected.sum() - expected[0, 1]) / 3)


def test_table():
    student, teacher = outputs(0), outputs(1)
    mse, kl = hidden_mse(student, teacher), continuation_kl(student, teacher)
    assert LOSSES["mse"].function(student, teacher, None, 3.0) == mse
    assert torch.isclose(LOSSES["mse+kl"].function(student, teacher, None, 3.0), mse + 3 * kl)
    assert [loss.needs_logits for loss in LOSSES.values()] == [False, True]


@pytest.mark.parametrize("name", LOSSES)
def test_zero_at_the_teacher_and_gradient_elsewhere(name):
    student, teacher = outputs(0), outputs(1)
    assert LOSSES[name].function(student, student, None, 1.0).item() == pytest.approx(0, abs=1e-7)
    student.hidden.requires_grad_()
    student.logits.requires_grad_()
    LOSSES[name].function(student, teacher, None, 1.0).backward()
    assert student.hidden.grad.abs().sum() > 0
    assert (student.logits.grad is not None) == LOSSES[name].needs_logits


def test_bfloat16_is_summed_in_float32():
    student = Outputs(torch.full((1, 1, 4096), 1.0, dtype=torch.bfloat16))
    teacher = Outputs(torch.zeros(1, 1, 4096, dtype=torch.bfloat16))
    loss = hidden_mse(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == 1.0
