"""`bench train`: a training step beside its parts. `bench memory`: what training a plugin has to hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llm_variator.bench.setting import Batches, Plotted, Setting, Settings
from llm_variator.cli.values import PositiveInt
from llm_variator.errors import VariatorError
from llm_variator.measures.timing import Case, bar, ratio, timed
from llm_variator.sources.models import load_config, load_model
from llm_variator.train.learners import PluginLearner
from llm_variator.train.objective import Objective

TEACHER, FORWARD, BACKWARD, STEP, PARTS = (
    "teacher forward",
    "student forward",
    "student backward",
    "training step",
    "sum of the parts",
)


@dataclass(frozen=True, kw_only=True)
class Train(Batches, Plotted, Settings):
    """A training step beside its parts.

    of dense: here, over the teacher's forward pass. bound: the three parts, each timed alone, over the same; of bound:
    the parts' time over the step's (1: the step costs nothing more). A step is the paper's loss of one batch, its
    gradients, and Adam.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.one_plugin()


def train_rows(setting: Setting[Train]) -> list[dict[str, Any]]:
    """A step of distillation by the plugin, and its parts."""
    settings = setting.settings
    name = setting.names[0]
    total = 4 * len(settings.tokens) * len(settings.batch_sizes) * (settings.repetitions + 1)
    with bar(total, "train") as advance:

        def measure(tokens: int, batch: int) -> list[dict[str, Any]]:
            seconds = setting.interleaved(_training_cases(setting, name, batch, tokens), advance)
            parts = zip(seconds[TEACHER], seconds[FORWARD], seconds[BACKWARD], strict=True)
            seconds[PARTS] = [sum(three) for three in parts]
            bound = ratio(seconds[PARTS], seconds[TEACHER]).median
            rows = []
            for label, values in seconds.items():
                row = {"case": label, "tokens": tokens, "batch": batch, **timed(seconds, label, TEACHER)}
                if label in setting.peaks:
                    row["peak_gib"] = setting.peaks[label]
                if label == STEP:
                    row |= {"bound": bound, "of_bound": ratio(seconds[PARTS], values).median}
                rows.append(row)
            return rows

        return setting.each_size(measure)


def _training_cases(setting: Setting[Settings], name: str, batch: int, tokens: int) -> dict[str, Case]:
    model = setting.model
    model.set_plugin(name)
    model.train()
    learner = PluginLearner(model)
    objective = Objective(learner, "mse")
    inputs: dict[str, Any] = {"input_ids": setting.ids(batch, tokens)}
    options: dict[str, Any] = {}
    if model.is_decoder:
        inputs["prompt_length"] = tokens
        options = {"use_cache": False, "logits_to_keep": 1}
    elif setting.base.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = setting.ids(batch, 2)
    optimizer = torch.optim.AdamW(model.plugin(name).parameters(), lr=1e-4)
    bare = {key: value for key, value in inputs.items() if key != "prompt_length"}

    def forward() -> Tensor:
        with _last_states(setting) as states:
            model(**inputs, **options)
        return states[0].float().square().mean()

    def teach(_: object) -> None:
        with torch.no_grad(), learner.teaching() as teacher:
            teacher(**bare, **options)

    def backward(loss: Tensor) -> None:
        loss.backward()
        optimizer.zero_grad()

    def step(_: object) -> None:
        objective(model, inputs).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {
        TEACHER: Case(teach),
        FORWARD: Case(lambda _: forward()),
        BACKWARD: Case(backward, prepare=forward),
        STEP: Case(step),
    }


class _last_states:  # noqa: N801 (a context manager, read like a function)
    """Collects what the last stack of the model returns."""

    def __init__(self, setting: Setting[Settings]) -> None:
        host = setting.base
        self.stack = host.get_decoder() if host.can_generate() else host.base_model
        self.states: list[Tensor] = []

    def __enter__(self) -> list[Tensor]:
        self.handle = self.stack.register_forward_hook(
            lambda module, args, output: self.states.append(output.last_hidden_state)
        )
        return self.states

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


# --- memory

GIB = 2**30
NF4_BITS = (
    4 + 8 / 64 + 32 / (64 * 256)
)  # a code per weight, an 8-bit scale per 64, an fp32 scale per 256 of those
ADAM_BYTES = 16  # fp32: the weight, its gradient and two moments


@dataclass(frozen=True, kw_only=True)
class Memory(Batches, Settings):
    """What training a plugin holds.

    Training one plugin on a frozen base. Activations: what autograd keeps, counted as unique storages in real passes
    of models of two and three layers of this width; the difference is a layer's. Base: matrices of the layers in NF4
    with double quantisation (4.127 bits per weight), everything else in the given dtype. Plugin: 16 bytes per
    parameter (fp32 weight, gradient, two moments). Not included: kernels' scratch space, the CUDA context,
    fragmentation.
    """

    tokens: tuple[PositiveInt, ...] = (1024,)


def memory_rows(settings: Memory) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The estimate part by part, for each length and batch size, and the numbers behind it."""
    whole: Any = load_config(settings.model)
    layers = int(whole.num_hidden_layers)
    meta = load_model(settings.model, random_init=True, device="meta", dtype=settings.dtype)
    width = meta.dtype.itemsize
    weights = _base_bytes(meta, width)
    rows: list[dict[str, Any]] = []
    numbers: dict[str, Any] = {"layers": layers, "base_bytes": weights, "activations": {}}
    shallow = [_shallow(settings, count) for count in (2, 3)]
    name = shallow[0].names[0]
    per_layer = [sum(p.numel() for p in s.model.plugin(name).parameters()) for s in shallow]
    plugin = ADAM_BYTES * (per_layer[0] + (layers - 2) * (per_layer[1] - per_layer[0]))
    numbers["plugin_bytes"] = plugin
    for tokens in settings.tokens:
        for batch in settings.batch_sizes:
            two, three = (kept_bytes(setting, name, batch, tokens) for setting in shallow)
            kept = two + (layers - 2) * (three - two)
            parts = {
                f"base, NF4, {layers} layers": weights["layers"],
                "base, embeddings and head": weights["rest"],
                f"plugin {name}, gradients, Adam": plugin,
                f"activations, {layers} layers": kept,
            }
            numbers["activations"][f"{batch}x{tokens}"] = {
                "two_layers": two,
                "three_layers": three,
                "all": kept,
            }
            parts["all of it"] = sum(parts.values())
            rows += [
                {"case": part, "tokens": tokens, "batch": batch, "gib": size / GIB}
                for part, size in parts.items()
            ]
    return rows, numbers


def _shallow(settings: Memory, layers: int) -> Setting[Memory]:
    return Setting(replace(settings, num_layers=layers, random_init=True))


def _base_bytes(model: Any, width: int) -> dict[str, int]:
    """Bytes of the base with its layers' matrices in NF4."""
    layers = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    )
    rest = sum(parameter.numel() for parameter in model.parameters()) - layers
    return {"layers": int(layers * NF4_BITS / 8), "rest": rest * width}


def kept_bytes(setting: Setting[Settings], name: str, batch: int, tokens: int) -> int:
    """Bytes that autograd keeps between a student's forward pass and its backward pass, weights left out."""
    model = setting.model
    model.set_plugin(name)
    model.train()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, int] = {}
    alive: list[Tensor] = []  # a freed storage's address would be used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    inputs: Mapping[str, Any] = {"input_ids": setting.ids(batch, tokens), "prompt_length": tokens}
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        _last_states(setting) as states,
    ):
        model(**inputs, use_cache=False, logits_to_keep=1)
        states[0].float().square().mean()
    return sum(storages.values())


def check_memory_flags(settings: Memory) -> None:
    """Raise where the estimate is not defined."""
    if settings.num_layers is not None:
        raise VariatorError(
            "bench memory counts the whole model from two and three layers: leave out --num-layers"
        )
    if settings.quantize is not None:
        raise VariatorError("bench memory counts a base in NF4 as it is: leave out --quantize")
    if load_config(settings.model).is_encoder_decoder or len(settings.plugins) != 1:
        raise VariatorError("bench memory takes a decoder and one plugin in --plugins")
    if unlike := [plugin for plugin in settings.measured() if plugin.keep is not None or plugin.saved]:
        raise VariatorError(
            f"bench memory counts a layer as what three have more than two, and with {unlike[0]} no layer need be "
            "like the next: leave it out, and read the peak of bench train on a GPU"
        )
