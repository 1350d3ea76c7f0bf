"""Which neurons of an FFN are activated. A neuron is one input of the FFN's last projection.

ReLU models, as the paper (section 4.9): a neuron is activated where its value is not zero.

Other models (SiLU, GELU, gated or not) hardly ever produce a zero, and a small value with a large weight can do
more than a large one with a small weight. There a neuron counts as activated where the length of what it adds to
the FFN's output, |value| times the norm of its weights, reaches a threshold; each layer's threshold is the largest
with which leaving out everything below it changes the original model's FFN output by no more than a tolerated share
of its length (0.2), on average over tokens of the text. That is the definition of Zhang et al., ReLU² Wins (arXiv
2402.03804), "cumulative errors of tail truncation". With it "not activated" means what it means with ReLU: this
neuron was not needed here; and with a tolerance of 0 it is the paper's definition. A percentile of the values (as
CATS and TEAL choose theirs) would fix the share of activated neurons in advance, which is what Figure 5 measures.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from llm_variator.engine.groups import split
from llm_variator.engine.hooks import architecture_of, host_of
from llm_variator.model import VariatorModel

TOLERANCE = 0.2
_HALVINGS = 16


@dataclasses.dataclass(frozen=True)
class Definition:
    """When a neuron is activated."""

    name: str
    """`nonzero` or `threshold`."""
    activation: str
    """The model's activation function."""
    thresholds: tuple[float, ...] = ()
    """Per layer, of a neuron's contribution to the output."""
    tolerance: float | None = None

    def active(self, layer: int, values: Tensor, norms: Tensor) -> Tensor:
        """(..., neurons) bool, from the values of the neurons and `norms` (neurons,) of their weights."""
        if self.name == "nonzero":
            return values != 0
        return values.abs() * norms >= self.thresholds[layer]


def projections(model: VariatorModel) -> list[nn.Linear]:
    """The module of every layer that reads its neurons."""
    base = host_of(model.base)
    architecture = architecture_of(base)
    return [block.get_submodule(architecture.neurons) for block in architecture.blocks(base)]  # type: ignore[misc]


def weight_norms(model: VariatorModel) -> list[Tensor]:
    """Per layer (neurons,): the length of the vector that a neuron of value 1 adds to the output."""
    return [module.weight.float().norm(dim=0) for module in projections(model)]


@contextlib.contextmanager
def watching(model: VariatorModel, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `see(layer, values)` for every FFN that runs inside the block; values (rows, vectors, neurons)."""

    def hook(layer: int) -> Callable[[nn.Module, tuple[Tensor]], None]:
        return lambda _module, args: see(layer, args[0].float())

    with contextlib.ExitStack() as hooks:
        for layer, module in enumerate(projections(model)):
            hooks.enter_context(module.register_forward_pre_hook(hook(layer)))
        yield


@torch.inference_mode()
def read(model: VariatorModel, ids: Tensor) -> None:
    """Run the part of the model that reads a prompt, (rows, tokens), every layer whole."""
    ids = ids.to(model.device, torch.long)
    skipping, model.skip_unread = model.skip_unread, False
    try:
        if model.is_decoder:
            model(ids, use_cache=False, logits_to_keep=1)
        elif model.config.is_encoder_decoder:
            model(ids, decoder_input_ids=ids.new_zeros(len(ids), 1), use_cache=False)
        else:
            model(ids)
    finally:
        model.skip_unread = skipping


def define(model: VariatorModel, windows: Tensor, tolerance: float = TOLERANCE) -> Definition:
    """The definition that suits the model; thresholds from the original model on `windows` (rows, tokens)."""
    config = model.config
    activation = str(getattr(config, "dense_act_fn", None) or getattr(config, "hidden_act", None))
    if activation in ("None", ""):
        activation = str(config.hidden_activation)  # Gemma
    if activation == "relu":
        return Definition("nonzero", activation)
    seen: dict[int, list[Tensor]] = {}
    with model.disable_plugin(), watching(model, lambda layer, x: seen.setdefault(layer, []).append(x)):
        read(model, windows)
    modules, norms = projections(model), weight_norms(model)
    thresholds = [
        threshold(torch.cat(seen[layer]).flatten(0, -2), module.weight.float(), norms[layer], tolerance)
        for layer, module in enumerate(modules)
    ]
    return Definition("threshold", activation, tuple(thresholds), tolerance)


@torch.inference_mode()
def threshold(values: Tensor, weight: Tensor, norms: Tensor, tolerance: float) -> float:
    """The largest contribution below which all neurons together change the output by `tolerance` of its length.

    Args:
        values: (tokens, neurons).
        weight: (d, neurons) of the projection that reads them.
        norms: (neurons,) of its columns.
        tolerance: share of the output's length, averaged over tokens.
    """
    whole = (values @ weight.T).norm(dim=-1)
    contributions = values.abs() * norms
    low, high = 0.0, float(contributions.max())

    def change(level: float) -> float:
        left_out = torch.where(contributions < level, values, 0.0) @ weight.T
        return float((left_out.norm(dim=-1) / whole).mean())

    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if change(middle) <= tolerance else (low, middle)
    return low


def spans(model: VariatorModel, layer: int, tokens: int) -> tuple[int, int, int] | None:
    """Where the FFN of `layer` merges a prompt of `tokens`: dense first tokens, whole groups, ratio.

    None where it merges nothing. An encoder's short last group is left out.
    """
    plugin = model.plugin()
    site = plugin.at("ffn", layer)
    if site is None:
        return None
    part = split(tokens, site.k, plugin.plan.head, plugin.plan.tail)
    return (part.head, part.groups, site.k) if part.groups else None
