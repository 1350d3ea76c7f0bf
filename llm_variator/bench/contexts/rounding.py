"""Chunked prefill beside one pass: the same arithmetic, and how far rounding carries the two from the truth.

The truth is the same model in fp64. A chunk's products have other shapes than those of a whole prompt, and the
kernels chosen for them add in another order; what that does is measured on the base model alone as well, dense,
read by transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llm_variator.bench.contexts.setting import (
    Chunked,
    Documents,
    Figures,
    build_model,
    compressed_layers,
    stretches,
)
from llm_variator.cli import flag
from llm_variator.cli.values import PositiveInt
from llm_variator.config import VariatorConfig
from llm_variator.engine.cache.naming import cache_argument
from llm_variator.engine.cache.stores import whole
from llm_variator.errors import VariatorError
from llm_variator.model import VariatorModel

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Rounding(Chunked, Documents):
    """Errors of chunked and whole prefill against the same model in fp64."""

    context: PositiveInt = 700
    ratios: tuple[PositiveInt, ...] = flag((2, 3, 4, 8), "k of untrained plugins")

    def __post_init__(self) -> None:
        if self.quantize is not None:
            raise VariatorError("bench.contexts rounding needs the base in fp64: leave out --quantize")


def rounding(model: VariatorModel, settings: Rounding) -> Figures:
    """Greatest and root-mean-square error of keys and values over ragged rows: whole, and by chunk."""
    lengths = [settings.context, settings.context // 3, settings.context - 7, 1, settings.context // 2]
    rows = [row[0].tolist() for row in stretches(settings, *lengths)]
    exact = _exact(build_model(settings).double())
    figures = []
    for k in (None, *settings.ratios):
        if k is not None:
            for each in (model, exact):
                config = VariatorConfig(k=k, sites=("ffn", "kv"))
                each.add_plugin(f"k{k}", config).to(each.dtype)
        truth = _read(exact, k, rows)
        one_pass = _read(model, k, rows)
        figures.append({"k": k or DENSE, "greatest": _greatest(truth), "one_pass": _errors(one_pass, truth)})
        for chunk in settings.chunks:
            chunked = _read(model, k, rows, chunk)
            figures[-1][f"chunks_of_{chunk}"] = _errors(chunked, truth) | {
                "from_one_pass": _errors(chunked, one_pass)["greatest"],
                "from_one_pass_in_fp64": _errors(_read(exact, k, rows, chunk), truth)["greatest"],
            }
    return {"row_lengths": lengths, "errors": figures}


def _exact(model: VariatorModel) -> VariatorModel:
    """A model in fp64 whose norms are so too: transformers' RMSNorm works in fp32, whatever it gets."""

    def norm(module: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return F.rms_norm(inputs[0], module.weight.shape, module.weight, module.variance_epsilon)

    for module in model.base.modules():
        if isinstance(module, LlamaRMSNorm):
            module.register_forward_hook(norm)
    return model


def _read(
    model: VariatorModel, k: int | None, rows: list[list[int]], chunk: int | None = None
) -> list[Tensor]:
    """Keys and values of each row's own entries, layer by layer; without `k` by the base model alone."""
    if k is None:
        return [tensor for row in rows for tensor in _dense(model, row, chunk or len(row))]
    with model.use_plugin(f"k{k}"):
        context = model.compress(rows, prefill_chunk_size=chunk)
    found = []
    for layer in compressed_layers(context):
        keys, values = whole(layer.store)
        for row, own in enumerate(layer.columns.expand(len(keys), -1) >= 0):
            found += [keys[row][:, own], values[row][:, own]]
    return found


def _dense(model: VariatorModel, row: list[int], chunk: int) -> list[Tensor]:
    cache = DynamicCache(config=model.config)
    for part in torch.tensor([row], device=model.device).split(chunk, dim=1):
        model.base(part, logits_to_keep=1, **{cache_argument(model.base): cache})
    return [tensor for layer in cache.layers for tensor in whole(layer)]  # type: ignore[arg-type]


def _greatest(tensors: Sequence[Tensor]) -> float:
    return max(float(t.abs().max()) for t in tensors if t.numel())


def _errors(tensors: Sequence[Tensor], truth: Sequence[Tensor]) -> dict[str, float]:
    apart = [a.double() - b.double() for a, b in zip(tensors, truth, strict=True)]
    squares, count = sum(float(t.square().sum()) for t in apart), sum(t.numel() for t in apart)
    return {"greatest": _greatest(apart), "root_mean_square": (squares / count) ** 0.5}
