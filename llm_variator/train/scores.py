"""Scores of keys in closed form: how much later tokens will read a token's key, from what the attention reads.

Not in the paper. Of token i and KV head g the energy is the mean square, over later queries j, of a_h(j, i) |W_h v_i|,
summed over the query heads h that share g: a is the attention weight, W_h the output projection's part of head h.
For each future (see `futures`) the logarithm of its root is fitted linearly, from one pass over the contexts.

What a key is worth to the model as a whole is its effect: the mean, over later queries j, of the square of
sum over h of a_h(j, i) (g_hj . v_i), where g_hj is the loss's gradient at what head h puts out. Twice the divergence
that dropping the key costs, to second order, where the loss is that of tokens drawn from the model itself: then its
squared gradient is the Fisher information. Energies of layers cannot be compared, effects can.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llm_variator.engine.cache.naming import cache_argument
from llm_variator.engine.devices import execution_device, input_device
from llm_variator.engine.files import write_atomically
from llm_variator.engine.hooks import architecture_of, host_of
from llm_variator.engine.hooks.attention import OwnAttentionFunction
from llm_variator.engine.plan import kv_heads
from llm_variator.engine.plugin import CompressionPlugin
from llm_variator.engine.session import Session, scope
from llm_variator.errors import VariatorError
from llm_variator.train.futures import FUTURES, KINDS, Sample

RIDGE = 1e-3
"""Added to the mean square of every feature, as a share of the mean over features."""
LEAST = 1e-16
"""Energies below count as this: their logarithm says nothing."""

TOGETHER = "together"
TARGETS = (*FUTURES, TOGETHER)
"""What is fitted: the energies of each future, and their sum."""
_SUMS = ("counts", "grams", "cross")

_FUNCTION = "variator_watch"  # the name under which transformers finds `_attend`


class Watch:
    """Passes over a decoder that say what its attention layers read, and what reads their keys."""

    def __init__(self, base: PreTrainedModel, beside: CompressionPlugin | None = None) -> None:
        """Watch `base`, whose contexts are read with the plugin `beside` of a `VariatorModel` around it, or densely.

        Raises:
            VariatorError: it is no decoder, or every layer attends through a sliding window.
        """
        self._host, self._beside = host_of(base), beside
        family = architecture_of(self._host)
        if not family.decoder:
            raise VariatorError(
                f'compressor "select" is for decoders, {type(self._host).__name__} is none: choose weighted or mean'
            )
        blocks = family.blocks(self._host)
        self.layers = [layer for layer in range(len(blocks)) if not family.slides(self._host, layer)]
        """Those that attend to everything: the others keep their keys."""
        if not self.layers:
            raise VariatorError("every layer attends through a sliding window: there is no key to leave out")
        self.heads, self.dim = kv_heads(self._host.config), int(self._host.config.hidden_size)
        self._attention = {layer: blocks[layer].get_submodule(family.attention) for layer in self.layers}
        with torch.no_grad():
            self._norms = {
                layer: _value_norms(
                    attention.get_submodule(family.output),
                    int(attention.head_dim),  # type: ignore[arg-type]
                    self._host.dtype,
                )
                for layer, attention in self._attention.items()
            }
        self._reads: dict[int, Tensor] | None = None
        self._rows: slice | None = None
        self._energies: dict[int, Tensor] = {}

    @torch.no_grad()
    def features(self, context: Tensor, cache: DynamicCache | None = None) -> dict[int, Tensor]:
        """What the attention of each layer reads of a context (tokens,): (tokens, d) each."""
        self._reads = {}
        try:
            if self._beside is None:
                self._run(context, cache)
            else:
                with scope(session := Session(self._beside, skip_unread=False)):
                    self._run(context, cache)
                assert session.proven == 1
            return self._reads
        finally:
            self._reads = None

    @torch.no_grad()
    def read(self, sample: Sample) -> tuple[dict[int, Tensor], dict[str, dict[int, Tensor]]]:
        """Of the fitted tokens: features (rows, d) per layer, and per future and layer energies (rows, KV heads)."""
        cache = DynamicCache()
        features = self.features(sample.context, cache)
        energies = {}
        for name, future in sample.futures.items():
            self._rows, self._energies = sample.rows, {}
            try:
                self._run(future, cache)
                energies[name] = self._energies
            finally:
                self._rows = None
            cache.crop(-len(future))
        return {layer: x[sample.rows] for layer, x in features.items()}, energies

    def effects(self, sample: Sample, seed: int) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Of the fitted tokens: features (rows, d) per layer, and effects (rows, KV heads), means over the futures.

        `seed` of the tokens that are drawn.
        """
        cache = DynamicCache()
        features = self.features(sample.context, cache)
        found: dict[int, Tensor] = {}
        draw = torch.Generator().manual_seed(seed)
        for future in sample.futures.values():
            self._rows, self._energies = sample.rows, {}
            try:
                self._backward(future, cache, draw)
                for layer, own in self._energies.items():
                    own = own / (len(future) * len(sample.futures))
                    found[layer] = found[layer] + own if layer in found else own
            finally:
                self._rows = None
            cache.crop(-len(future))
            for held in cache.layers:
                assert isinstance(held, DynamicLayer)
                assert held.keys is not None
                assert held.values is not None
                held.keys, held.values = held.keys.detach(), held.values.detach()
        return {layer: x[sample.rows] for layer, x in features.items()}, found

    @contextmanager
    def attached(self) -> Iterator[Watch]:
        """While passes run: the model's own code, watched."""
        with ExitStack() as stack:
            for layer, attention in self._attention.items():
                own = OwnAttentionFunction(attention, _FUNCTION, _attend)
                stack.callback(own.remove)
                handle = attention.register_forward_pre_hook(self._keep(layer), with_kwargs=True)
                stack.callback(handle.remove)
            token = _running.set(self)
            stack.callback(lambda: _running.reset(token))
            yield self

    def _run(self, ids: Tensor, cache: DynamicCache | None) -> None:
        more = {cache_argument(self._host): cache} if cache is not None else {}
        ids = ids[None].to(input_device(self._host))
        self._host(input_ids=ids, use_cache=cache is not None, logits_to_keep=1, **more)

    @torch.enable_grad()
    def _backward(self, ids: Tensor, cache: DynamicCache, draw: torch.Generator) -> None:
        """Read `ids` after `cache`, and have the loss of drawn tokens ask every layer what its outputs are worth."""
        starts: list[Tensor] = []

        def begin(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            starts.append(out.detach().requires_grad_())
            return starts[-1]

        handle = self._host.get_input_embeddings().register_forward_hook(begin)
        try:
            ids = ids[None].to(input_device(self._host))
            logits = self._host(input_ids=ids, use_cache=True, **{cache_argument(self._host): cache}).logits[
                0
            ]
        finally:
            handle.remove()
        shares = logits.detach().float().softmax(-1).cpu()
        drawn = torch.multinomial(shares, 1, generator=draw)[:, 0].to(logits.device)
        torch.autograd.grad(F.cross_entropy(logits.float(), drawn, reduction="sum"), starts)

    def _keep(self, layer: int) -> Callable[..., None]:
        def hook(attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self._reads is not None:
                hidden = args[0] if args else kwargs["hidden_states"]
                self._reads[layer] = hidden[0]

        return hook

    def attended(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, out: Tensor, scaling: float
    ) -> None:
        """A layer attends: from query (1, H, q, e), the last tokens, to key and value (1, KV heads, n, e).

        `out` (1, q, H, e): what the heads put out.
        """
        rows = self._rows
        if rows is None or layer not in self._norms:
            return
        if out.requires_grad:
            parts = query[0].detach(), key[0].detach(), value[0, :, rows].detach()

            def ask(gradient: Tensor) -> None:
                self._energies[layer] = effects(*parts, gradient[0].transpose(0, 1), rows, scaling)

            out.register_hook(ask)
            return
        values = value[0, :, None, rows].float()  # (KV heads, 1, rows, e)
        norms = (values @ self._norms[layer].unflatten(0, (self.heads, -1)) * values).sum(-1)
        self._energies[layer] = energies(query[0], key[0], norms, rows, scaling)


def energies(query: Tensor, key: Tensor, norms: Tensor, rows: slice, scaling: float) -> Tensor:
    """Energies (rows, KV heads) of the keys in `rows`, which the queries of the last tokens read.

    Args:
        query: (H, q, e).
        key: (KV heads, n, e), those of the queries last.
        norms: (KV heads, H / KV heads, rows), |W_h v_i|².
        rows: of the keys.
        scaling: of the products.
    """
    found = []
    for log_share, weight in zip(_log_shares(query, key, rows, scaling), norms, strict=True):
        found.append(((2 * log_share).exp().mean(-2) * weight).sum(0))
    return torch.stack(found, dim=-1)


def effects(
    query: Tensor, key: Tensor, value: Tensor, gradient: Tensor, rows: slice, scaling: float
) -> Tensor:
    """Sums over queries of the squared effects (rows, KV heads) of the keys in `rows`.

    Args:
        query: (H, q, e).
        key: (KV heads, n, e), those of the queries last.
        value: (KV heads, rows, e).
        gradient: (H, q, e), of the loss at what the heads put out.
        rows: of the keys.
        scaling: of the products.
    """
    found = []
    groups = gradient.float().unflatten(0, (len(key), -1))
    for log_share, own, towards in zip(
        _log_shares(query, key, rows, scaling), value.float(), groups, strict=True
    ):
        found.append((log_share.exp() * (towards @ own.T)).sum(0).square().sum(0))
    return torch.stack(found, dim=-1)


def _log_shares(query: Tensor, key: Tensor, rows: slice, scaling: float) -> Iterator[Tensor]:
    """Of each KV head (H / KV heads, q, rows): the logarithm of the attention that its queries pay to `rows`."""
    heads, (count, n) = len(key), (query.shape[1], key.shape[1])
    later = torch.ones(count, n, dtype=torch.bool, device=key.device).triu(n - count + 1)
    for group, own in zip(query.float().unflatten(0, (heads, -1)), key.float(), strict=True):
        logits = (group @ own.T * scaling).masked_fill_(later, float("-inf"))  # (H / KV heads, q, n)
        yield logits[..., rows] - logits.logsumexp(-1, keepdim=True)


def _value_norms(output: nn.Module, head_dim: int, dtype: torch.dtype) -> Tensor:
    """W_hᵀ W_h (H, e, e) of every query head, with which |W_h v|² = vᵀ W_hᵀ W_h v; through the module itself."""
    device = execution_device(output)
    eye = torch.eye(int(output.in_features), dtype=dtype, device=device)  # type: ignore[arg-type]
    parts = (
        (output(eye) - output(torch.zeros_like(eye[:1]))).float().unflatten(0, (-1, head_dim))
    )  # (H, e, d)
    return parts @ parts.mT


_running: ContextVar[Watch | None] = ContextVar("watched_pass", default=None)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Transformers' attention function of the watched layers: the model's own."""
    implementation = module.config.variator_stock._attn_implementation
    eager: Any = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    stock = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager)
    result: tuple[Tensor, Tensor | None] = stock(module, query, key, value, attention_mask, **kwargs)
    if (watch := _running.get()) is not None:
        watch.attended(module.layer_idx, query, key, value, result[0], kwargs["scaling"])
    return result


class Moments:
    """Sums over fitted tokens: all that least squares need of features and targets, in fp64, whatever their number.

    Attributes:
        samples: how many are in.
        counts: (kinds, targets) of tokens.
        grams: (kinds, layers, d + 1, d + 1) of features, the last of which is 1.
        cross: (kinds, targets, layers, d + 1, KV heads) of features and targets.
    """

    def __init__(self, layers: int, dim: int, heads: int) -> None:
        kinds, wanted = len(KINDS), len(TARGETS)
        self.samples = 0
        self.counts = torch.zeros(kinds, wanted, dtype=torch.float64)
        self.grams = torch.zeros(kinds, layers, dim + 1, dim + 1, dtype=torch.float64)
        self.cross = torch.zeros(kinds, wanted, layers, dim + 1, heads, dtype=torch.float64)

    def add(
        self, kind: str, features: Mapping[int, Tensor], targets: Mapping[str, Mapping[int, Tensor]]
    ) -> None:
        """Tokens of one sample: features (rows, d) per layer, and `targets`."""
        k = KINDS.index(kind)
        self.samples += 1
        for name in targets:
            self.counts[k, TARGETS.index(name)] += len(next(iter(features.values())))
        for place, (layer, x) in enumerate(features.items()):
            x = torch.cat((x, torch.ones_like(x[:, :1])), dim=1).double()
            self.grams[k, place] += (x.T @ x).cpu()
            for name, target in targets.items():
                t, y = TARGETS.index(name), target[layer].double()
                self.cross[k, t, place] += (x.T @ y).cpu()

    def save(self, file: Path, record: str) -> None:
        """Write all sums into `file`, whole or not at all; `record` says what they are of."""
        tensors = {name: getattr(self, name) for name in _SUMS}
        metadata = {"samples": str(self.samples), "record": record}
        write_atomically(file, lambda path: save_file(tensors, path, metadata=metadata))

    def load(self, file: Path, records: Sequence[str]) -> None:
        """Go on from sums that were saved with one of the `records`.

        Raises:
            VariatorError: they are of something else, or not readable.
        """
        try:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata() or {}
                shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in _SUMS}
                if metadata.get("record") not in records or any(
                    shape != getattr(self, name).shape for name, shape in shapes.items()
                ):
                    raise VariatorError(
                        f"cannot resume: {file} is of another run; start anew in another --output"
                    )
                for name in _SUMS:
                    getattr(self, name).copy_(opened.get_tensor(name))
                self.samples = int(metadata["samples"])
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise VariatorError(f"cannot resume: {file} is not readable ({error}); start anew") from None

    def present(self) -> list[str]:
        """The targets that some sample has."""
        return [name for name, count in zip(TARGETS, self.counts.sum(0).tolist(), strict=True) if count]

    def tokens(self) -> float:
        """Tokens of all samples."""
        return float(self.counts[:, TARGETS.index(TOGETHER)].sum())

    def solve(self, target: str, ridge: float = RIDGE) -> Fit:
        """Ridge regression of one target, over the samples that have it; in the memory of one layer."""
        t = TARGETS.index(target)
        there = self.counts[:, t] > 0
        eye = torch.eye(self.grams.shape[-1], dtype=self.grams.dtype)
        eye[-1, -1] = 0  # the mean is free
        solutions = []
        for place in range(self.grams.shape[1]):
            gram, cross = self.grams[there, place].sum(0), self.cross[there, t, place].sum(0)
            gram += ridge * gram.diagonal()[:-1].mean() * eye
            solutions.append(torch.cholesky_solve(cross, torch.linalg.cholesky(gram)).mT)
        solution = torch.stack(solutions)
        return Fit(solution[..., :-1], solution[..., -1])


class Fit(NamedTuple):
    """A linear map per layer and KV head."""

    weight: Tensor
    """(layers, KV heads, d)."""
    bias: Tensor
    """(layers, KV heads)."""


class Explained:
    """The share of targets' variance that fits explain in samples they were not made of."""

    def __init__(self, fits: Mapping[str, Fit]) -> None:
        self._fits = fits
        self._sums: dict[str, list[Tensor | float]] = {name: [0.0] * 4 for name in fits}

    def add(self, features: Mapping[int, Tensor], targets: Mapping[str, Mapping[int, Tensor]]) -> None:
        """Tokens of one sample, as in `Moments.add`."""
        for name in self._fits.keys() & targets.keys():
            found = []
            for place, (layer, x) in enumerate(features.items()):
                y, fit = targets[name][layer].double().cpu(), self._fits[name]
                left = y - x.double().cpu() @ fit.weight[place].mT - fit.bias[place]
                found.append(
                    (torch.full_like(y[0], len(y)), y.sum(0), y.square().sum(0), left.square().sum(0))
                )
            new = [torch.stack(parts) for parts in zip(*found, strict=True)]
            self._sums[name] = [total + part for total, part in zip(self._sums[name], new, strict=True)]

    def shares(self) -> dict[str, Tensor]:
        """Of every target that a sample had, (layers, KV heads)."""
        found = {}
        for name, (count, total, squares, left) in self._sums.items():
            if isinstance(count, Tensor):
                found[name] = 1 - left / (squares - total**2 / count)
        return found


def targets(energies: Mapping[str, Mapping[int, Tensor]]) -> dict[str, dict[int, Tensor]]:
    """Log roots of the energies (rows, KV heads) of each future and layer, and of their sum over the futures."""
    layers = next(iter(energies.values())).keys()
    summed = {layer: torch.stack([own[layer] for own in energies.values()]).sum(0) for layer in layers}
    whole = {**energies, TOGETHER: summed}
    return {
        name: {layer: own[layer].double().clamp_min(LEAST).log() / 2 for layer in layers}
        for name, own in whole.items()
    }
