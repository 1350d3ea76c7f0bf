"""A start by least squares for the layers that restore tokens: W_1 and W_2 in closed form, from some thousand tokens.

Not in the paper, whose plugins learn by gradient steps alone. With the identity as activation a restored token is
linear in what its layer reads, o = g° + W_2 W_1 (g°, h), so the best map of rank r from (g°, h) to what g° lacks is a
reduced-rank regression (Izenman 1975). Layers are fitted in order, each on what those before it really give and
towards the teacher's residual stream behind it: so each also repairs what was lost before. Merge weights stay.

Errors count as they do at the model's end: per token divided by the size of the teacher's last residual stream, as
the final norm divides, and per channel times that norm's gain.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from llm_variator.architectures import Architecture, architecture_of
from llm_variator.errors import VariatorError
from llm_variator.groups import Grouping
from llm_variator.layers import HiddenDecompressor
from llm_variator.model import VariatorModel
from llm_variator.plugin import CompressionPlugin
from llm_variator.session import Session, current, scope

# Added to the variance of every feature, as a share of it, where there are as many features as tokens; less with more
# tokens. What few tokens do not determine stays small.
RIDGE = 0.1

Batch = dict[str, Any]
Sample = tuple[Tensor, Tensor, Tensor]
"""Of N grouped tokens: features (g°, h) (N, 2d), what g° lacks (N, d), weights (N, 1)."""


def fit_restoration(
    model: VariatorModel, batches: Sequence[Batch], progress: Callable[[str], None] = lambda name: None
) -> None:
    """Set the restoring layers of the active plugin by least squares over the grouped tokens of `batches`.

    Takes about three passes of the base over all of them, and keeps the teacher's residual stream behind every layer:
    (tokens, layers, d) numbers, twice.

    In models that normalise what a layer's FFN gives before they add it (BERT, Gemma 3) there is no such sum to aim
    at: FFNs are fitted to what they give for each token by itself, and attention keeps its start.

    Args:
        model: with the plugin active.
        batches: what its `forward` takes, on its device.
        progress: called with the name of each fitted layer.

    Raises:
        VariatorError: the plugin restores nothing, or not linearly.
    """
    plugin = model.plugin()
    restoring = restoring_sites(plugin)
    stack = _Stack(model)
    with torch.no_grad():
        taught = [stack.taught(batch) for batch in batches]
        gain = _gain(taught)
        with stack.passes(batches, taught, restoring) as passes:
            for site, layer in restoring:
                if site == "attention" and not taught[0].adds_up:
                    continue
                moments = _Moments()
                for one in passes:
                    moments.add(*one.reach(site, layer))
                moments.solve(plugin.sites[site, layer].decompressor, gain)
                progress(f"{site} {layer}")


def restoring_sites(plugin: CompressionPlugin) -> list[tuple[str, int]]:
    """(site, layer) of the adapters that least squares set, in the order in which the model runs them.

    Raises:
        VariatorError: there is none, or they are not linear.
    """
    found = [
        (site, layer)
        for site, layer in sorted(plugin.sites, key=lambda place: (place[1], place[0]))  # attention, then ffn
        if site in ("attention", "ffn") and not plugin.sites[site, layer].decompressor.copy
    ]
    if not found:
        raise VariatorError(
            "least squares set what restores tokens, and this plugin restores none: give it site ffn or attention "
            "and --decompressor adapter, or start without --init"
        )
    if plugin.config.activation != "identity":
        raise VariatorError("least squares set linear adapters: leave --activation at identity")
    return found


class _Stop(Exception):  # noqa: N818 (no error)
    """Ends a pass where nothing more is needed of it."""


@dataclasses.dataclass
class _Taught:
    """What the teacher computes for one batch; residual streams are (rows, tokens, d)."""

    after: list[Tensor]
    """Residual stream behind every layer."""
    between: list[Tensor]
    """... and behind its attention."""
    output: Tensor
    """What the stack gives, behind its final norm."""
    adds_up: bool
    """Whether layers add what their sites give to the stream as it is."""
    mask: Tensor | None
    """(rows, tokens), 0 for padding."""


class _Stack:
    """Passes over the layers of a model, with what happens inside them."""

    def __init__(self, model: VariatorModel) -> None:
        self._model = model
        host: Any = getattr(model.base, "get_base_model", lambda: model.base)()
        self._family: Architecture = architecture_of(host)
        self._blocks = self._family.blocks(host)
        self._whole: nn.Module = host.get_decoder() if self._family.decoder else self._family.stack(host)

    def _end(self, site: str, layer: int) -> nn.Module:
        path = getattr(self._family, f"{site}_end") or getattr(self._family, site)
        return self._blocks[layer].get_submodule(path)

    def _ffn(self, layer: int, x: Tensor) -> Tensor:
        for path in filter(None, (self._family.ffn, self._family.ffn_end)):
            x = self._blocks[layer].get_submodule(path).forward(x)  # past the hooks
        return x

    def _pass(self, batch: Batch, hooks: Iterable[RemovableHandle]) -> None:
        with ExitStack() as stack:
            for handle in hooks:
                stack.callback(handle.remove)
            try:
                self._model(**batch)
            except _Stop:
                return
        raise AssertionError("the pass did not come to its end")

    def taught(self, batch: Batch) -> _Taught:
        """The pass without a plugin."""
        before: list[Tensor] = []
        sites: dict[str, list[Tensor]] = {"attention": [], "ffn": []}
        after: list[Tensor] = []
        output: list[Tensor] = []

        def stop(module: nn.Module, args: Any, result: Any) -> None:
            output.append(result[0])
            raise _Stop

        def hooks() -> Iterable[RemovableHandle]:
            for layer, block in enumerate(self._blocks):
                yield block.register_forward_pre_hook(
                    lambda module, args, kwargs: before.append(_read(args, kwargs)), with_kwargs=True
                )
                for site, kept in sites.items():
                    yield self._end(site, layer).register_forward_hook(_keep(kept))
                yield block.register_forward_hook(_keep(after))
            yield self._whole.register_forward_hook(stop)

        with self._model.disable_plugin():
            self._pass(batch, hooks())
        sums = before[0] + sites["attention"][0] + sites["ffn"][0]
        adds_up = torch.allclose(sums.float(), after[0].float(), rtol=0.05, atol=0.05 * float(after[0].std()))
        between = [stream - own for stream, own in zip(after, sites["ffn"], strict=True)]
        return _Taught(after, between, output[0], adds_up, batch.get("attention_mask"))

    @contextmanager
    def passes(
        self, batches: Sequence[Batch], taught: Sequence[_Taught], places: Sequence[tuple[str, int]]
    ) -> Iterator[list[_Pass]]:
        """A pass with the plugin over each batch, all waiting in front of the first of `places`, (site, layer)."""
        passes = [
            _Pass(partial(self._compressed, batch), teacher)
            for batch, teacher in zip(batches, taught, strict=True)
        ]
        handles = []
        for layer in {layer for _, layer in places}:
            sites = [site for site, place in places if place == layer]
            handles.append(
                self._blocks[layer].register_forward_pre_hook(self._wait(sites, layer), with_kwargs=True)
            )
        try:
            yield passes
        finally:
            for one in passes:
                one.stop()
            for handle in handles:
                handle.remove()

    def _compressed(self, batch: Batch) -> None:
        """A decoder's tokens are all grouped, but for the head: prompts with a dense tail would leave few."""
        plugin, more = self._model.plugin(), {}
        if self._model.is_decoder:
            batch = {name: value for name, value in batch.items() if name != "prompt_length"}
            more = {"use_cache": False}  # layers run more than once
        with scope(Session(plugin, edges=(plugin.config.dense_head or 0, 0), skip_unread=False)):
            self._model.base(**batch, **more)

    def _wait(self, sites: Sequence[str], layer: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (one := _running.get()) is not None:
                for site in sites:
                    one.offer(site, layer, partial(self._tried, site, layer, args, kwargs, one.teacher))

        return hook

    def _tried(
        self, site: str, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], teacher: _Taught
    ) -> Sample:
        """Run a layer for what one of its sites reads, gives and lacks."""
        own, block = self._model.plugin().sites[site, layer], self._blocks[layer]
        ended: list[Tensor] = []
        asked: list[Any] = []

        def restoring(module: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
            session = current()
            assert session is not None
            assert session.segment is not None
            asked.extend((*inputs, session.segment.grouping(own.k)))

        handles = [
            own.decompressor.register_forward_pre_hook(restoring),
            self._end(site, layer).register_forward_hook(_keep(ended)),
        ]
        try:
            result = _states(block.forward(*args, **kwargs))
        finally:
            for handle in handles:
                handle.remove()
        merged, groups, grouping = asked  # (..., d), (..., k, d)
        merged = merged.unsqueeze(-2).expand_as(groups)
        if not teacher.adds_up:
            wanted = self._ffn(layer, groups)
        elif site == "ffn":
            wanted, _ = _grouped(grouping, teacher.after[layer] - (result - ended[0]))
        else:
            wanted, _ = _grouped(grouping, teacher.between[layer] - _read(args, kwargs))
        size, members = _grouped(grouping, teacher.after[-1].double().square().mean(-1, keepdim=True))
        parts = (torch.cat((merged, groups), dim=-1), wanted - merged, 1 / size)
        if members is not None:
            members = members.expand(groups.shape[:-1])
            return tuple(part[members] for part in parts)  # type: ignore[return-value]
        return tuple(part.flatten(0, -2) for part in parts)  # type: ignore[return-value]


class _Pass:
    """A forward pass in a thread of its own, which waits in front of a layer until its sites are set.

    Only one thread runs at a time: the model's own code goes on from layer to layer, and nothing is computed again.
    """

    def __init__(self, run: Callable[[], Any], teacher: _Taught) -> None:
        self.teacher = teacher
        self._run = run
        self._go, self._there = threading.Semaphore(0), threading.Semaphore(0)
        self._place: tuple[str, int] | None = None
        self._sample: Sample | None = None
        self._stopped = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=copy_context().run, args=(self._work,), daemon=True)
        self._thread.start()

    def reach(self, site: str, layer: int) -> Sample:
        """Go on to a site, and try it as it is now."""
        while self._place != (site, layer):
            self._go.release()
            self._there.acquire()
            if self._error is not None:
                raise self._error
        assert self._sample is not None
        return self._sample

    def stop(self) -> None:
        """End the pass where it is."""
        self._stopped = True
        self._go.release()
        self._thread.join()

    def offer(self, site: str, layer: int, trying: Callable[[], Sample]) -> None:
        """In the pass: wait here, with what is known of the site."""
        _running.set(None)  # what is tried does not wait
        self._place, self._sample = (site, layer), trying()
        _running.set(self)
        self._there.release()
        self._go.acquire()
        if self._stopped:
            raise _Stop

    def _work(self) -> None:
        _running.set(self)
        self._go.acquire()
        try:
            with torch.no_grad():
                if not self._stopped:
                    self._run()
            raise AssertionError("the pass ended before the layer it was to reach")
        except _Stop:
            return
        except BaseException as error:
            self._error = error
            self._there.release()


_running: ContextVar[_Pass | None] = ContextVar("least_squares_pass", default=None)


def _keep(kept: list[Tensor]) -> Callable[..., None]:
    return lambda module, args, result: kept.append(_states(result))


def _states(result: Any) -> Tensor:
    states: Tensor = result[0] if isinstance(result, tuple) else result
    return states


def _read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def _grouped(grouping: Grouping, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The groups of x (rows, tokens, d) as (..., k, d), and which members are there (None: all)."""
    found: list[Any] = []

    def look(groups: Tensor, members: Tensor | None) -> Tensor:
        found.extend((groups, members))
        return groups[..., 0, :]

    grouping.compress(x, look)
    return found[0], found[1]


def _gain(taught: Sequence[_Taught]) -> Tensor:
    """(d,) what the final norm multiplies channels by, from what it gives for what it gets."""
    given = got = torch.zeros((), dtype=torch.double)
    for one in taught:
        x, y = one.after[-1].double(), one.output.double()
        if one.mask is not None:
            x, y = x[one.mask.bool()], y[one.mask.bool()]
        x = x / x.square().mean(-1, keepdim=True).sqrt()
        got = got + x.square().flatten(0, -2).sum(0).cpu()
        given = given + y.square().flatten(0, -2).sum(0).cpu()
    return (given / got.clamp(min=1e-12)).sqrt().clamp(min=1e-6)


class _Moments:
    """Weighted first and second moments of features and targets, on the CPU in fp64."""

    def __init__(self) -> None:
        self._sums: list[Any] = [0.0] * 5
        self._tokens = 0

    def add(self, features: Tensor, missing: Tensor, weights: Tensor) -> None:
        self._tokens += len(features)
        f, t, w = (x.double() for x in (features, missing, weights))
        new = (w.sum(), (f * w).sum(0), (t * w).sum(0), (f * w).T @ f, (f * w).T @ t)
        self._sums = [total + part.cpu() for total, part in zip(self._sums, new, strict=True)]

    def solve(self, decompressor: HiddenDecompressor, gain: Tensor) -> None:
        """Weighted ridge regression, then its best approximation of rank r where `gain` weighs the channels."""
        count, f, t, ff, ft = self._sums
        f, t = f / count, t / count
        ff, ft = ff / count - torch.outer(f, f), ft / count - torch.outer(f, t)
        variance = ff.diag().clamp(min=1e-12)
        ridge = RIDGE * len(variance) / self._tokens
        whole = torch.linalg.solve(ff + torch.diag(ridge * variance), ft) * gain  # (2d, d)
        _, directions = torch.linalg.eigh(whole.T @ ff @ whole)
        rank = min(decompressor.down.out_features, len(directions))
        directions = directions[:, -rank:]  # (d, rank), those that explain most
        down, up = whole @ directions, directions.T / gain
        with torch.no_grad():
            for weights in decompressor.parameters():
                weights.zero_()
            decompressor.down.weight[:rank].copy_(down.T)
            decompressor.up.weight[:, :rank].copy_(up.T)
            decompressor.up.bias.copy_(t - f @ down @ up)
