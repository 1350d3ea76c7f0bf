"""Losses against hand arithmetic and torch.distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from llm_variator.train.losses import LOSSES, Outputs, States, continuation_kl, hidden_mse

ROWS, TOKENS, WIDTH, CONTINUATION, VOCAB = 2, 5, 3, 2, 7


def outputs(seed: int, mask: torch.Tensor | None = None, predicts: torch.Tensor | None = None) -> Outputs:
    draw = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, TOKENS, WIDTH, generator=draw)
    logits = torch.randn(ROWS, CONTINUATION, VOCAB, generator=draw)
    return Outputs((States(hidden, mask),), logits, predicts)


def of(values: torch.Tensor) -> Outputs:
    return Outputs((States(values),))


def test_mse_by_hand():
    student = of(torch.tensor([[[1.0, 2.0], [0.0, 0.0]]]))
    teacher = of(torch.tensor([[[0.0, 0.0], [3.0, 1.0]]]))
    assert hidden_mse(student, teacher).item() == (1 + 4 + 9 + 1) / 4


def test_mse_of_two_stacks_adds_up():
    student = Outputs((States(torch.tensor([[[2.0]]])), States(torch.tensor([[[1.0], [0.0]]]))))
    teacher = Outputs((States(torch.tensor([[[0.0]]])), States(torch.tensor([[[0.0], [3.0]]]))))
    assert hidden_mse(student, teacher).item() == 4 + (1 + 9) / 2


def test_mse_ignores_padding():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    student, teacher = outputs(0, mask), outputs(1, mask)
    ours, theirs = (side.hidden[0].values[mask.bool()] for side in (student, teacher))
    assert torch.isclose(hidden_mse(student, teacher), torch.nn.functional.mse_loss(ours, theirs))


def test_kl_is_from_teacher_to_student():
    student, teacher = outputs(0), outputs(1)
    expected = kl_divergence(Categorical(logits=teacher.logits), Categorical(logits=student.logits))
    assert torch.isclose(continuation_kl(student, teacher), expected.mean())
    teacher = outputs(1, predicts=torch.tensor([[1, 0], [1, 1]]))
    assert torch.isclose(continuation_kl(student, teacher), (expected.sum() - expected[0, 1]) / 3)


def test_table():
    student, teacher = outputs(0), outputs(1)
    mse, kl = hidden_mse(student, teacher), continuation_kl(student, teacher)
    assert LOSSES["mse"].function(student, teacher, 3.0) == mse
    assert torch.isclose(LOSSES["mse+kl"].function(student, teacher, 3.0), mse + 3 * kl)
    assert [loss.needs_logits for loss in LOSSES.values()] == [False, True, True]


@pytest.mark.parametrize("name", LOSSES)
def test_zero_at_the_teacher_and_gradient_elsewhere(name):
    student, teacher = outputs(0), outputs(1)
    assert LOSSES[name].function(student, student, 1.0).item() == pytest.approx(0, abs=1e-7)
    student.hidden[0].values.requires_grad_()
    student.logits.requires_grad_()
    LOSSES[name].function(student, teacher, 1.0).backward()
    assert (student.hidden[0].values.grad is not None) == ("mse" in name)
    assert (student.logits.grad is not None) == LOSSES[name].needs_logits


def test_bfloat16_is_summed_in_float32():
    student = of(torch.full((1, 1, 4096), 1.0, dtype=torch.bfloat16))
    teacher = of(torch.zeros(1, 1, 4096, dtype=torch.bfloat16))
    loss = hidden_mse(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == 1.0
