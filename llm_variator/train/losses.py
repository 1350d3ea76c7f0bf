"""Distillation losses (paper section 3.3): pull the compressed model towards the same model uncompressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class States(NamedTuple):
    """Last hidden states of one stack (encoder or decoder), after its final norm."""

    values: Tensor
    """(rows, tokens, width)."""
    mask: Tensor | None = None
    """(rows, tokens), 0 for padding; None without padding."""


class Outputs(NamedTuple):
    """What a forward pass gives a loss."""

    hidden: tuple[States, ...]
    """Of every stack: one, or T5's encoder and decoder."""
    logits: Tensor | None = None
    """(rows, tokens, classes): of the continuation, the answer or the label."""
    mask: Tensor | None = None
    """(rows, tokens), 0 for logits that predict nothing; None where all count."""


class Loss(NamedTuple):
    """A named loss: a function of (student, teacher, kl_weight) and whether it reads logits."""

    function: Callable[[Outputs, Outputs, float], Tensor]
    needs_logits: bool


def hidden_mse(student: Outputs, teacher: Outputs, kl_weight: float = 0.0) -> Tensor:
    """Equation 1, L = ||O' - O||², read as a mean over every component of every real token, in float32.

    O and O' are the last hidden states of `student` and `teacher`; with several stacks their means add up,
    as in the paper's released code. `kl_weight` is not used.
    """
    terms = [
        masked_mean((ours.values.float() - theirs.values.float()).square().mean(-1), theirs.mask)
        for ours, theirs in zip(student.hidden, teacher.hidden, strict=True)
    ]
    return sum(terms[1:], start=terms[0])


def continuation_kl(student: Outputs, teacher: Outputs) -> Tensor:
    """KL(teacher || student) of the predicted distributions, mean nats per token that counts."""
    assert student.logits is not None, "ask the forward pass for logits"
    assert teacher.logits is not None
    ours = F.log_softmax(student.logits.float(), dim=-1)
    theirs = F.log_softmax(teacher.logits.float(), dim=-1)
    return masked_mean(F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1), teacher.mask)


def hidden_mse_and_kl(student: Outputs, teacher: Outputs, kl_weight: float = 1.0) -> Tensor:
    """`hidden_mse` + kl_weight * `continuation_kl`: not in the paper, better for generation."""
    return hidden_mse(student, teacher) + kl_weight * continuation_kl(student, teacher)


def kl(student: Outputs, teacher: Outputs, kl_weight: float = 1.0) -> Tensor:
    """`continuation_kl` alone, for scores of keys: nothing else is asked of a prompt that stays as it is.

    `kl_weight` is not used.
    """
    return continuation_kl(student, teacher)


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `values` (rows, tokens) over the tokens whose `mask` is not 0."""
    return values.mean() if mask is None else (values * mask).sum() / mask.sum()


LOSSES: dict[str, Loss] = {
    "mse": Loss(hidden_mse, needs_logits=False),
    "kl": Loss(kl, needs_logits=True),
    "mse+kl": Loss(hidden_mse_and_kl, needs_logits=True),
}
