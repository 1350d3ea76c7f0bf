"""What a run is judged by while it trains and at its end."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llm_variator.errors import VariatorError
from llm_variator.measures.metrics import continuation_cross_entropy, reference_conditions
from llm_variator.sources.tasks.examples import Example
from llm_variator.sources.tasks.forms import TaskForm, predict_all
from llm_variator.sources.tasks.scoring import score
from llm_variator.train.learners import Learner
from llm_variator.train.objective import Objective


class Judge(Protocol):
    """Figures of a learner on held-out data."""

    figure: str
    """The one by which runs are compared."""
    higher_is_better: bool

    def __call__(self, learner: Learner) -> dict[str, float]:
        """Measure now."""
        ...


class ContinuationJudge:
    """A decoder's cross-entropy of held-out continuations: prompt compressed, dense and absent."""

    figure = "compressed"
    higher_is_better = False

    def __init__(self, windows: Tensor, *, continuation: int, batch_size: int) -> None:
        """`windows` (rows, tokens), of which the last `continuation` tokens are scored."""
        self._windows = windows
        self._prompt = windows.shape[1] - continuation
        self._batch_size = batch_size
        self._references: dict[str, float] | None = None

    def __call__(self, learner: Learner) -> dict[str, float]:
        """Nats per token: `compressed`, `dense`, `no_context`."""
        arguments: Any = (learner.model, self._windows, self._prompt)
        if self._references is None:  # the plugin cannot change them
            self._references = reference_conditions(*arguments, batch_size=self._batch_size)
        compressed = continuation_cross_entropy(*arguments, batch_size=self._batch_size)
        return {"compressed": compressed, **self._references}


class LossJudge:
    """The distillation loss on held-out batches.

    Before a task is chosen it is all there is to measure, and afterwards less noisy than the task's figure.
    """

    figure = "distillation_loss"
    higher_is_better = False

    def __init__(
        self,
        objective: Objective,
        batches: Sequence[dict[str, Tensor]],
        counts: Sequence[int] | None = None,
    ) -> None:
        """`batches`: as the training ones; `counts`: over how much each one's loss is a mean (default: its rows)."""
        self._objective = objective
        self._batches = batches
        self._counts = counts or [len(next(iter(batch.values()))) for batch in batches]

    def __call__(self, learner: Learner) -> dict[str, float]:
        """Mean over all batches; raises VariatorError where a loss is no number."""
        model = learner.model
        device = next(model.parameters()).device
        was_training = model.training
        model.eval()
        try:
            with torch.no_grad():
                losses = [
                    self._objective(model, {name: value.to(device) for name, value in batch.items()}).item()
                    for batch in self._batches
                ]
        finally:
            model.train(was_training)
        if not all(map(math.isfinite, losses)):
            raise VariatorError(
                "the loss on held-out examples is no number: train with a lower --learning-rate, or "
                "with --dtype float32"
            )
        counts = self._counts
        return {self.figure: sum(map(operator.mul, losses, counts)) / sum(counts)}


class TaskJudge:
    """The task's metrics, in percent; the first of `task.metrics` decides."""

    higher_is_better = True

    def __init__(self, form: TaskForm, examples: Sequence[Example], *, batch_size: int) -> None:
        """`examples`: of one task, not trained on."""
        self._task = examples[0].task
        self.figure = self._task.metrics[0]
        self._form = form
        self._examples = examples
        self._batch_size = batch_size

    def __call__(self, learner: Learner) -> dict[str, float]:
        """Predict all examples and score them."""
        predictions = predict_all(self._form, learner.model, self._examples, batch_size=self._batch_size)
        return score(self._task, predictions, self._examples)
