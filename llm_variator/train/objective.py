"""The training objective of every stage: L = L_d + lambda * L_t (paper equation 1 and appendix B)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llm_variator.engine.hooks import host_of
from llm_variator.sources.tasks.forms import IGNORED, takes_prompt_length
from llm_variator.train.learners import Learner
from llm_variator.train.losses import LOSSES, Outputs, States


class Objective:
    """Distillation from the learner's teacher, plus the task's own loss with a weight.

    With `distillation` None the task's loss stands alone: that is fine-tuning.
    """

    def __init__(
        self,
        learner: Learner,
        distillation: str | None,
        *,
        kl_weight: float = 1.0,
        task_weight: float = 0.0,
        continuation: int | None = None,
    ) -> None:
        """Set up the loss.

        Args:
            learner: the model that learns, and its teacher.
            distillation: a key of `LOSSES`, or None.
            kl_weight: of the KL term, where the loss has one.
            task_weight: lambda; above 0 the batches need `labels`.
            continuation: compare and compute the logits of so many last tokens only; None: of those that
                predict `labels`.
        """
        self._learner = learner
        self._loss = None if distillation is None else LOSSES[distillation]
        self._kl_weight = kl_weight
        self._task_weight = task_weight
        self._continuation = continuation

    def __call__(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """The loss of one batch; `model` is the learner's model, or the wrapper that trains it."""
        bare = self._learner.model
        batch = forward_arguments(bare, batch)
        if self._loss is None:
            loss: Tensor = model(**batch).loss
            return loss
        inputs = dict(batch)
        if not self._task_weight:  # the models would compute a loss that nobody reads
            inputs.pop("labels", None)
        if not takes_prompt_length(bare):  # dropout's noise would hide what is to be learned from the teacher
            bare.eval()
        with torch.no_grad(), self._learner.teaching() as teacher:
            theirs, _ = self._outputs(teacher, teacher, batch, inputs)
        ours, task_loss = self._outputs(model, bare, batch, inputs)
        loss = self._loss.function(ours, theirs, self._kl_weight)
        return loss + self._task_weight * task_loss if self._task_weight else loss

    def _outputs(
        self, model: nn.Module, bare: Any, batch: dict[str, Any], inputs: dict[str, Any]
    ) -> tuple[Outputs, Any]:
        assert self._loss is not None
        options: dict[str, Any] = {}
        stacks = stacks_of(bare)
        if len(stacks) == 1 and bare.can_generate():
            options["use_cache"] = False
            if not self._task_weight:
                if self._continuation is not None and self._loss.needs_logits:
                    options["logits_to_keep"] = self._continuation
                elif not self._loss.needs_logits:
                    options["logits_to_keep"] = 1  # the least a forward pass can be asked for
        with _last_hidden_states(stacks) as collected:
            output = model(**inputs, **options)
        masks = [batch.get("attention_mask"), batch.get("decoder_attention_mask")]
        hidden = tuple(States(value, mask) for value, mask in zip(collected, masks, strict=False))
        logits, mask = None, None
        if self._loss.needs_logits:
            logits, mask = _predicting(output.logits, batch.get("labels"), decoder_only=bool(options))
        return Outputs(hidden, logits, mask), getattr(output, "loss", None)


def forward_arguments(model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """What `model` takes of a batch: only plugins on a decoder are told where the prompt ends."""
    if takes_prompt_length(model):
        return batch
    return {name: value for name, value in batch.items() if name != "prompt_length"}


def stacks_of(model: Any) -> list[nn.Module]:
    """The modules whose last hidden states are compared: T5's encoder and decoder, or the one stack."""
    host = host_of(getattr(model, "base", model))
    if host.config.is_encoder_decoder:
        return [host.get_encoder(), host.get_decoder()]
    return [host.get_decoder() if host.can_generate() else host.base_model]


def _predicting(logits: Tensor, labels: Tensor | None, *, decoder_only: bool) -> tuple[Tensor, Tensor | None]:
    """Logits (rows, tokens, classes) and which of them predict a label."""
    if logits.dim() == 2:  # a classifier's
        return logits[:, None], None
    if labels is None:
        return logits, None
    counts = labels != IGNORED
    if decoder_only:  # the logits of one token predict the next
        counts = torch.cat([counts[:, 1:], torch.zeros_like(counts[:, :1])], dim=1)
    return logits, counts


@contextmanager
def _last_hidden_states(stacks: list[nn.Module]) -> Iterator[list[Tensor]]:
    """Collect the last hidden states of each stack, after its final norm, from the pass that makes the logits.

    `output_hidden_states` would keep those of every layer.
    """
    collected: list[Tensor] = []

    def collect(module: nn.Module, args: Any, output: Any) -> None:
        collected.append(output.last_hidden_state)

    with ExitStack() as handles:
        for stack in stacks:
            handle = stack.register_forward_hook(collect)
            handles.callback(handle.remove)
        yield collected
