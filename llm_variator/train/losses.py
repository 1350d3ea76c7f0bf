"""Distillation losses (paper section 3.3): pull the compressed model towards the same model uncompressed."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Outputs(NamedTuple):
    """What a forward pass gives a loss."""

    hidden: Tensor
    """(rows, tokens, width), the last hidden states, after the final norm."""
    logits: Tensor | None = None
    """(rows, continuation, vocabulary), of the last `continuation` tokens."""


class Loss(NamedTuple):
    """A named loss: a function of (student, teacher, mask, kl_weight) and whether it reads logits."""

    function: Callable[[Outputs, Outputs, Tensor | None, float], Tensor]
    needs_logits: bool


def hidden_mse(
    student: Outputs, teacher: Outputs, mask: Tensor | None = None, kl_weight: float = 0.0
) -> Tensor:
    """Equation 1, L = ||O' - O||², read as a mean over every component of every real token, in float32.

    O and O' are the hidden states of prompt and continuation of `student` and `teacher`; `mask`
    (rows, tokens) is 0 for padding, None without padding; `kl_weight` is not used.
    """
    error = (student.hidden.float() - teacher.hidden.float()).square().mean(-1)
    return error.mean() if mask is None else (error * mask).sum() / mask.sum()


def continuation_kl(student: Outputs, teacher: Outputs, mask: Tensor | None = None) -> Tensor:
    """KL(teacher || student) of the next-token distributions, mean nats per real continuation token."""
    assert student.logits is not None, "ask the forward pass for logits"
    assert teacher.logits is not None
    ours = F.log_softmax(student.logits.float(), dim=-1)
    theirs = F.log_softmax(teacher.logits.float(), dim=-1)
    nats = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
    if mask is None:
        return nats.mean()
    mask = mask[:, -nats.shape[1] :]
    return (nats * mask).sum() / mask.sum()


def hidden_mse_and_kl(
    student: Outputs, teacher: Outputs, mask: Tensor | None = None, kl_weight: float = 1.0
) -> Tensor:
    """`hidden_mse` + kl_weight * `continuation_kl`: not in the paper, better for generation."""
    return hidden_mse(student, teacher, mask) + kl_weight * continuation_kl(student, teacher, mask)


LOSSES: dict[str, Loss] = {
    "mse": Loss(hidden_mse, needs_logits=False),
    "mse+kl": Loss(hidden_mse_and_kl, needs_logits=True),
}
