"""Quality of a compressed prompt: how well the model predicts the text that follows it.

Three conditions are compared over the same tokens: the prompt compressed, the prompt dense (plugin off),
and no context. Every token of the continuation is scored in each; without context the model still sees the
last prompt token, which stands for the beginning-of-text token that not every model has.
"""

from __future__ import annotations

import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_variator.errors import VariatorError
from llm_variator.model import VariatorModel


def reference_conditions(
    model: VariatorModel, input_ids: Tensor, prompt_length: int, *, batch_size: int = 4
) -> dict[str, float]:
    """`dense` and `no_context`, each in mean nats per token: what no plugin can change."""
    found = reference_nats(model, input_ids, prompt_length, batch_size=batch_size)
    return {name: statistics.fmean(nats) for name, nats in found.items()}


def reference_nats(
    model: VariatorModel, input_ids: Tensor, prompt_length: int, *, batch_size: int = 4
) -> dict[str, list[float]]:
    """The same of each row."""
    with model.disable_plugin():
        return {
            "dense": continuation_nats(model, input_ids, prompt_length, batch_size=batch_size),
            "no_context": continuation_nats(
                model, input_ids[:, prompt_length - 1 :], prompt_length=1, batch_size=batch_size
            ),
        }


def continuation_cross_entropy(
    model: VariatorModel, input_ids: Tensor, prompt_length: int, *, batch_size: int = 4
) -> float:
    """The mean over the rows of `continuation_nats`: nats per token."""
    return statistics.fmean(continuation_nats(model, input_ids, prompt_length, batch_size=batch_size))


def token_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) fp32 negative log-likelihood of `targets` (n,), in nats, from `logits` (n, vocabulary).

    Raises:
        VariatorError: predictions are no numbers.
    """
    nats = F.cross_entropy(logits.float(), targets, reduction="none")
    if not nats.isfinite().all():
        raise VariatorError(
            f"predictions are no numbers (NaN, in {str(logits.dtype).removeprefix('torch.')}): weights or activations "
            "overflow, or training diverged; measure in bfloat16 or float32, or train at a lower --learning-rate"
        )
    return nats


@torch.no_grad()  # not inference mode: FSDP keeps what it gathers
def continuation_nats(
    model: VariatorModel, input_ids: Tensor, prompt_length: int, *, batch_size: int = 4
) -> list[float]:
    """Of each row the mean negative log-likelihood, in nats per token, of what follows its prompt (teacher forcing).

    The prompt is treated as the active plugin treats it: compressed, or dense with the plugin off.

    Args:
        model: the model, with the plugin to measure active.
        input_ids: (rows, tokens), prompt and continuation of each row, without padding.
        prompt_length: number of prompt tokens in each row, at least 1 and fewer than tokens.
        batch_size: rows in one forward pass. Logits exist for one batch's continuations only, and in
            float32 for one row at a time.

    Raises:
        VariatorError: there are no rows, or `prompt_length` leaves no prompt or no continuation.
    """
    rows, length = input_ids.shape
    if rows == 0:
        raise VariatorError("no text to score: give at least one row of tokens")
    if not 1 <= prompt_length < length:
        raise VariatorError(
            f"prompt_length must be between 1 and {length - 1} for rows of {length} tokens, "
            f"got {prompt_length}"
        )
    continuation = length - prompt_length
    device = next(model.parameters()).device
    found: list[float] = []
    was_training = model.training
    model.eval()
    try:
        for batch in input_ids.split(batch_size):
            batch = batch.to(device=device, dtype=torch.long)
            output = model(
                batch, prompt_length=prompt_length, logits_to_keep=continuation + 1, use_cache=False
            )
            for logits, tokens in zip(output.logits, batch, strict=True):
                targets = tokens[prompt_length:]
                found.append(token_nats(logits[:-1], targets).sum().double().item() / continuation)
    finally:
        model.train(was_training)
    return found
