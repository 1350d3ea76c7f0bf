"""How far merging takes a decoder's predictions of the text after a prompt from the dense model's."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_variator.config import VariatorConfig
from llm_variator.measures.conditions import WithPlugin
from llm_variator.measures.store import Store, digest
from llm_variator.model import VariatorModel
from llm_variator.train.least_squares import LeastSquares


@dataclasses.dataclass(frozen=True)
class Harm:
    """What merging does to the predictions of the text after a prompt, per token."""

    divergence: float
    """Kullback-Leibler divergence of the predictions from the dense model's, in nats."""
    cross_entropy: float
    """Of the true text, in nats."""


class Probe:
    """Measures plugins that need no training against the dense model's predictions.

    Keeps the dense log-probabilities of all windows: windows x continuation x vocabulary numbers.
    """

    def __init__(
        self,
        model: VariatorModel,
        windows: Tensor,
        context: int,
        batch_size: int,
        store: Store,
        fitting: Tensor | None = None,
    ) -> None:
        """Set up.

        Args:
            model: measured with and without plugins.
            windows: (rows, tokens), of which `context` prompt tokens, then the text whose predictions are compared.
            context: prompt tokens.
            batch_size: windows in one pass.
            store: where measurements are kept.
            fitting: (rows, tokens) over which least squares set adapters before they are measured.
        """
        self.model, self.windows, self.context, self._store = model, windows, context, store
        self._batch_size = batch_size
        self._fitting = windows[:0] if fitting is None else fitting
        self._least_squares: LeastSquares | None = None
        with model.disable_plugin():
            self._dense = list(self._predictions())
        self.dense_cross_entropy = self._cross_entropy(self._dense)

    def harm(self, config: VariatorConfig) -> Harm:
        """Of a plugin with this configuration, untrained but for least squares where there is text to fit."""
        self.model.add_plugin("probe", config)
        try:
            about: dict[str, Any] = {"windows": self.windows.tolist(), "context": self.context}
            if self._fits(config):
                about["fitting"] = digest(self._fitting.tolist())
            condition = WithPlugin("", "probe", self.model.plugins["probe"])
            return self._store.get(condition, about, self._measure, Harm)
        finally:
            self.model.delete_plugin("probe")

    def _fits(self, config: VariatorConfig) -> bool:
        return len(self._fitting) > 0 and "ffn" in config.sites

    def _measure(self) -> Harm:
        with self.model.use_plugin("probe"):
            if self._fits(self.model.plugins["probe"]):
                if self._least_squares is None:
                    batches = self._fitting.to(self.model.device, torch.long).split(self._batch_size)
                    self._least_squares = LeastSquares(
                        self.model, [{"input_ids": batch} for batch in batches]
                    )
                self._least_squares.fit()
            ours = list(self._predictions())
        pairs = zip(ours, self._dense, strict=True)
        nats = [F.kl_div(own, dense, log_target=True, reduction="sum").double() for own, dense in pairs]
        tokens = len(self.windows) * (self.windows.shape[1] - self.context)
        return Harm((sum(nats) / tokens).item(), self._cross_entropy(ours))  # type: ignore[union-attr]

    @torch.inference_mode()
    def _predictions(self) -> Any:
        """Log-probabilities (t, vocabulary) of what follows, window by window."""
        for start in range(0, len(self.windows), self._batch_size):
            batch = self.windows[start : start + self._batch_size].to(self.model.device, torch.long)
            after = batch.shape[1] - self.context
            output = self.model(batch, prompt_length=self.context, logits_to_keep=after + 1, use_cache=False)
            for row in output.logits:
                yield row[:-1].float().log_softmax(-1)

    def _cross_entropy(self, predictions: Sequence[Tensor]) -> float:
        targets = self.windows[:, self.context :].to(self.model.device, torch.long)
        pairs = zip(predictions, targets, strict=True)
        return sum(F.nll_loss(row, target).item() for row, target in pairs) / len(self.windows)


def open_probe(
    model: VariatorModel,
    windows: Tensor,
    context: int,
    batch_size: int,
    work: Path,
    fitting: Tensor | None = None,
) -> Probe:
    """A `Probe` whose measurements are kept in the folder `work`, and found again."""
    return Probe(model, windows, context, batch_size, Store.of(model, work, work), fitting)
