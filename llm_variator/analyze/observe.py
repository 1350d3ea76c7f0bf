"""What a plugin's layers do while a prompt is read: merge weights, and how well the FFN's output is restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from llm_variator.analyze.activations import read
from llm_variator.engine.groups import split
from llm_variator.engine.hooks import architecture_of, host_of
from llm_variator.model import VariatorModel


class Moments:
    """Sums over observations of vectors of one length, in double precision."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0

    def add(self, rows: Tensor) -> None:
        """Rows (observations, length)."""
        rows = rows.double().cpu()
        self.count += len(rows)
        self._sum = self._sum + rows.sum(0)
        self._squares = self._squares + rows.square().sum(0)

    @property
    def mean(self) -> list[float]:
        """Of each place."""
        assert isinstance(self._sum, Tensor)
        return list((self._sum / self.count).tolist())

    @property
    def deviation(self) -> list[float]:
        """Standard deviation of each place over the observations."""
        assert isinstance(self._sum, Tensor)
        assert isinstance(self._squares, Tensor)
        variance = self._squares / self.count - (self._sum / self.count).square()
        return list(variance.clamp(min=0).sqrt().tolist())


def relative_error(ours: Tensor, true: Tensor) -> Tensor:
    """Length of the difference over the length of the truth, of each vector (..., d): (...)."""
    return (ours - true).norm(dim=-1) / true.norm(dim=-1).clamp(min=1e-12)


class Observer:
    """Sums over everything read inside `watching`; the plugin watched is the active one.

    Attributes, by (site, layer):
        weights: the merge weights by position in the group.
        wins: how often the last position has the greatest weight; of one number.
        restored: of site "ffn", the relative error of the restored outputs against the frozen FFN on every token, by
            position in the group.
        copied: the same, had the merged vector's output been copied to every token.
    """

    def __init__(self, model: VariatorModel) -> None:
        self.model = model
        self.weights: dict[tuple[str, int], Moments] = {}
        self.wins: dict[tuple[str, int], Moments] = {}
        self.restored: dict[int, Moments] = {}
        self.copied: dict[int, Moments] = {}
        self._whole: dict[tuple[str, int], Tensor | None] = {}
        base = host_of(model.base)
        architecture = architecture_of(base)
        self.blocks = list(architecture.blocks(base))
        self._ffn = [
            [block.get_submodule(path) for path in (architecture.ffn, architecture.ffn_end) if path]
            for block in self.blocks
        ]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Observe what runs inside the block."""
        with contextlib.ExitStack() as hooks:
            for (site, layer), layers in self.model.plugin().sites.items():
                hooks.enter_context(layers.compressor.register_forward_hook(self._merged(site, layer)))
                if site == "ffn":
                    hooks.enter_context(layers.decompressor.register_forward_hook(self._unmerged(layer)))
            yield

    def _merged(self, site: str, layer: int) -> Any:
        def hook(module: Any, args: tuple[Tensor, Tensor | None], _output: Tensor) -> None:
            # (..., k, d); a short group has other positions, and zeros in place of tokens
            groups, members = args
            whole = None if members is None else members.expand(groups.shape[:-1]).all(-1)
            self._whole[site, layer] = whole
            if len(weights := _of(whole, module.weights(groups).float())):
                self.weights.setdefault((site, layer), Moments()).add(weights)
                last = weights[:, -1:] > weights[:, :-1].max(-1, keepdim=True).values
                self.wins.setdefault((site, layer), Moments()).add(last)

        return hook

    def _unmerged(self, layer: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, Tensor], output: Tensor) -> None:
            merged, groups = args  # (..., d), (..., k, d)
            true = groups
            for part in self._ffn[layer]:
                true = part.forward(true)  # past the hooks: the frozen FFN on every token
            for sums, ours in ((self.restored, output), (self.copied, merged.unsqueeze(-2))):
                error = _of(self._whole["ffn", layer], relative_error(ours.float(), true.float()))
                if len(error):
                    sums.setdefault(layer, Moments()).add(error)

        return hook


def _of(whole: Tensor | None, x: Tensor) -> Tensor:
    """(groups, k) of x (..., k), of the whole groups alone."""
    return x.flatten(0, -2) if whole is None else x[whole]


def merged_span(model: VariatorModel, tokens: int) -> range:
    """Positions of a prompt of `tokens` that some layer merges; empty where it holds no group."""
    plugin = model.plugin()
    k = min(site.k for site in plugin.sites.values())
    part = split(tokens, k, plugin.plan.head, plugin.plan.tail, ragged=not model.is_decoder)
    return range(part.head, tokens - part.tail)


@torch.inference_mode()
def drift(model: VariatorModel, windows: Tensor, batch_size: int) -> dict[str, list[float]]:
    """How far every layer's output is from the dense model's, as a mean relative error over tokens.

    Errors pile up from layer to layer: this is the state that the next layer reads, not the fault of one layer.

    Args:
        model: with the plugin to measure active.
        windows: (rows, tokens), all prompt.
        batch_size: rows in one forward pass.

    Returns:
        Per layer, for the tokens inside the first and last dense part (`dense`) and for those in groups (`merged`).
    """
    observer = Observer(model)
    span = merged_span(model, windows.shape[1])
    sums: dict[str, list[Moments]] = {
        name: [Moments() for _ in observer.blocks] for name in ("merged", "dense")
    }
    for batch in windows.split(batch_size):
        with model.disable_plugin():
            true = _states(model, observer.blocks, batch)
        ours = _states(model, observer.blocks, batch)
        for layer, (own, dense) in enumerate(zip(ours, true, strict=True)):
            error = relative_error(own, dense)
            sums["merged"][layer].add(error[:, span.start : span.stop].reshape(-1, 1))
            edges = torch.cat((error[:, : span.start], error[:, span.stop :]), dim=1)
            sums["dense"][layer].add(edges.reshape(-1, 1))
    return {
        name: [each.mean[0] for each in layers]
        for name, layers in sums.items()
        if all(e.count for e in layers)
    }


def _states(model: VariatorModel, blocks: list[nn.Module], batch: Tensor) -> list[Tensor]:
    """Output (rows, tokens, d) of every layer."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).float())

    with contextlib.ExitStack() as hooks:
        for block in blocks:
            hooks.enter_context(block.register_forward_hook(keep))
        read(model, batch)
    return found
