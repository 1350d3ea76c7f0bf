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
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llm_variator.engine.groups import Grouping
from llm_variator.engine.hooks import Architecture, architecture_of, host_of
from llm_variator.engine.layers import HiddenDecompressor
from llm_variator.engine.plugin import CompressionPlugin
from llm_variator.engine.session import Session, current_pass, scope
from llm_variator.errors import VariatorError
from llm_variator.model import VariatorModel
from llm_variator.train.refinement import Sample, refine

# Added to the variance of every feature, as a share of it, where there are as many features as tokens; less with more
# tokens. What few tokens do not determine stays small.
RIDGE = 0.1

Batch = dict[str, Any]


class LeastSquares:
    """Least squares over some batches, for one plugin of `model` after the other.

    In models that normalise what a layer's FFN gives before they add it (BERT, Gemma 3) there is no sum to aim at:
    FFNs are fitted to what they give for each token by itself, and attention keeps its start.
    """

    def __init__(self, model: VariatorModel, batches: Sequence[Batch]) -> None:
        """`batches`: what the model's `forward` takes, on its device. One pass of the base over all of them."""
        self._model, self._batches = model, batches
        self._stack = _Stack(model)
        with torch.no_grad():
            ends = [self._stack.read(batch) for batch in batches]
        self._sizes = [end.size for end in ends]
        self._gain, self._adds_up = _gain(ends), ends[0].adds_up

    @torch.no_grad()
    def fit(
        self, progress: Callable[[str, str], None] = lambda name, said: None, *, steps: int = 1000
    ) -> None:
        """Set the restoring layers of the active plugin, over the grouped tokens of the batches.

        Takes two passes over them, and the memory of a dozen residual streams, whatever the model's depth.

        Args:
            progress: is called with the name of each fitted layer, and what is to be said of its steps.
            steps: for adapters that are not linear, after the closed form (`refinement`).

        Raises:
            VariatorError: the plugin restores nothing.
        """
        plugin = self._model.plugin()
        is_linear = plugin.config.activation == "identity"
        restoring = restoring_sites(plugin)
        with self._stack.passes(self._batches, self._sizes, adds_up=self._adds_up) as passes:
            for site, layer in restoring:
                if site == "attention" and not self._adds_up:
                    continue
                moments, samples = _Moments(), []
                for one in passes:
                    if (sample := one.reach((layer, site))) is None:
                        continue
                    moments.add(*sample)
                    if not is_linear:
                        samples.append(sample)
                if not moments.tokens:
                    k = plugin.sites[site, layer].k
                    raise VariatorError(
                        f"least squares: no row has a group of {k} tokens for {site} {layer}; give longer examples, or "
                        "start without --init"
                    )
                decompressor, said = plugin.sites[site, layer].decompressor, ""
                moments.solve(decompressor, self._gain)
                if not is_linear:
                    before, after = refine(decompressor, samples, self._gain, steps=steps)
                    said = f"{before:.3f} left by the linear map, {after:.3f} after {steps} steps"
                if (
                    self._model.base.dtype == torch.float16
                ):  # in which the passes compute with finer weights too
                    decompressor.balance()
                progress(f"{site} {layer}", said)


def restoring_sites(plugin: CompressionPlugin) -> list[tuple[str, int]]:
    """(site, layer) of the adapters that least squares set, in the order in which the model runs them.

    Raises:
        VariatorError: there is none.
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
    return found


class _Stop(Exception):  # noqa: N818 (no error)
    """Ends a pass where nothing more is needed of it."""


@dataclasses.dataclass
class _End:
    """What the first pass finds out about one batch, without a plugin."""

    size: Tensor
    """(rows, tokens, 1) mean square of the last residual stream."""
    got: Tensor
    """(d,) squares of the channels that the final norm gets, each token divided by its size, summed over tokens."""
    given: Tensor
    """(d,) and of those it gives."""
    adds_up: bool
    """Whether layers add what their sites give to the stream as it is."""


class _Stack:
    """Passes over the layers of a model, with what happens inside them."""

    def __init__(self, model: VariatorModel) -> None:
        self._model = model
        host = host_of(model.base)
        self._family: Architecture = architecture_of(host)
        self._blocks = self._family.blocks(host)
        self._whole: nn.Module = host.get_decoder() if self._family.decoder else self._family.stack(host)

    def read(self, batch: Batch) -> _End:
        """The first pass."""
        seen: dict[str, Tensor] = {}
        first, last = self._blocks[0], self._blocks[-1]

        def stop(module: nn.Module, args: Any, result: Any) -> None:
            seen["output"] = result[0]
            raise _Stop

        with ExitStack() as stack:
            for handle in (
                first.register_forward_pre_hook(_keep_read(lambda: seen, "read"), with_kwargs=True),
                *(self._end(site, 0).register_forward_hook(_keep(lambda: seen, site)) for site in _SITES),
                first.register_forward_hook(_keep(lambda: seen, "first")),
                last.register_forward_hook(_keep(lambda: seen, "last")),
                self._whole.register_forward_hook(stop),
            ):
                stack.callback(handle.remove)
            with suppress(_Stop):
                self._dense(batch)
        x, y = seen["last"].double(), seen["output"].double()
        size = x.square().mean(-1, keepdim=True)
        got, given = x.square() / size, y.square()
        if (mask := batch.get("attention_mask")) is not None:
            got, given = got[mask.bool()], given[mask.bool()]
        sums, after = (seen["read"] + seen["attention"] + seen["ffn"]).float(), seen["first"].float()
        adds_up = torch.allclose(sums, after, rtol=0.05, atol=0.05 * float(after.std()))
        return _End(size, got.flatten(0, -2).sum(0).cpu(), given.flatten(0, -2).sum(0).cpu(), adds_up)

    @contextmanager
    def passes(
        self, batches: Sequence[Batch], sizes: Sequence[Tensor], *, adds_up: bool
    ) -> Iterator[list[_Compressed]]:
        """A pass with the plugin over each batch, beside one without it, both waiting at their start."""
        plugin = self._model.plugin()
        made: list[_Compressed] = []
        with ExitStack() as stack:
            for layer, block in enumerate(self._blocks):
                stack.callback(
                    block.register_forward_pre_hook(_keep_read(_seen, "read"), with_kwargs=True).remove
                )
                for site in _SITES:
                    stack.callback(self._end(site, layer).register_forward_hook(_keep(_seen, site)).remove)
                stack.callback(block.register_forward_hook(self._taught(layer)).remove)
            for (site, layer), own in plugin.sites.items():
                if site in _SITES and not own.decompressor.copy:
                    hook = self._restored(site, layer, own.k, adds_up=adds_up)
                    stack.callback(own.decompressor.register_forward_pre_hook(hook).remove)
            try:
                for batch, size in zip(batches, sizes, strict=True):
                    teacher = _ThreadedPass(partial(self._dense, batch))
                    made.append(_Compressed(partial(self._compressed, batch), teacher, size))
                yield made
            finally:
                for one in made:
                    one.stop()
                    one.teacher.stop()

    def _end(self, site: str, layer: int) -> nn.Module:
        path = getattr(self._family, f"{site}_end") or getattr(self._family, site)
        return self._blocks[layer].get_submodule(path)

    def _ffn(self, layer: int, x: Tensor) -> Tensor:
        for path in filter(None, (self._family.ffn, self._family.ffn_end)):
            x = self._blocks[layer].get_submodule(path).forward(x)  # past the hooks
        return x

    def _dense(self, batch: Batch) -> None:
        more = {}
        if self._model.is_decoder:
            batch = {name: value for name, value in batch.items() if name != "prompt_length"}
            more = {"use_cache": False}
        self._model.base(**batch, **more)

    def _compressed(self, batch: Batch) -> None:
        """A decoder's tokens are all grouped, but for the head: prompts with a dense tail would leave few."""
        plugin = self._model.plugin()
        with scope(Session(plugin, edges=(plugin.plan.head, 0), skip_unread=False)):
            self._dense(batch)

    def _taught(self, layer: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: Any, result: Any) -> None:
            one = _running.get()
            if one is not None and not isinstance(one, _Compressed):
                after, ffn = _states(result), one.seen["ffn"]
                one.seen.clear()
                one.offer(layer, lambda: {"ffn": after, "attention": after - ffn})

        return hook

    def _restored(self, site: str, layer: int, k: int, *, adds_up: bool) -> Callable[..., None]:
        """What a site reads, gives and lacks, where its tokens are about to be restored."""

        def hook(decompressor: nn.Module, inputs: tuple[Tensor, Tensor]) -> None:
            if not isinstance(one := _running.get(), _Compressed):
                return
            now = current_pass()
            assert now is not None
            assert now.segment is not None
            grouping = now.segment.grouping(k)

            def sample() -> Sample:
                merged, groups = inputs  # (..., d), (..., k, d)
                merged = merged.unsqueeze(-2).expand_as(groups)
                if adds_up:
                    stream = one.seen["read"]  # what the site's output is added to
                    if site == "ffn":
                        stream = stream + one.seen["attention"]
                    wanted, _ = _grouped(grouping, one.teacher.reach(layer)[site] - stream)
                else:
                    wanted = self._ffn(layer, groups)
                size, members = _grouped(grouping, one.size)
                parts = (torch.cat((merged, groups), dim=-1), wanted - merged, 1 / size)
                if members is None:
                    features, missing, weights = (part.flatten(0, -2) for part in parts)
                else:
                    features, missing, weights = (part[members.expand(groups.shape[:-1])] for part in parts)
                return features, missing, weights

            one.offer((layer, site), sample)

        return hook


class _ThreadedPass:
    """A forward pass in a thread of its own, which waits at one place after the other with what is known there.

    Places are passed in ascending order. Only one thread runs at a time: the model's own code goes on from layer to
    layer, and nothing is computed again. As many passes wait as there are batches, so what is known at a place is made
    of what the model holds there only when it is asked for.
    """

    def __init__(self, run: Callable[[], Any]) -> None:
        self.seen: dict[str, Tensor] = {}
        """What the running layer has read, and given so far."""
        self._run = run
        self._go, self._there = threading.Semaphore(0), threading.Semaphore(0)
        self._place: Any = None
        self._known: Callable[[], Any] | None = None
        self._stopped = self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=copy_context().run, args=(self._work,), daemon=True)
        self._thread.start()

    def reach(self, place: Any) -> Any:
        """Go on to a place, and say what is known there; None where the pass goes by without it."""
        while self._place != place:
            if self._ended or (self._place is not None and self._place > place):
                return None
            self._go.release()
            self._there.acquire()
            if self._error is not None:
                raise self._error
        assert self._known is not None
        return self._known()

    def stop(self) -> None:
        """End the pass where it is."""
        self._stopped = True
        self._go.release()
        self._thread.join()

    def offer(self, place: Any, known: Callable[[], Any]) -> None:
        """In the pass: wait here."""
        self._place, self._known = place, known
        self._there.release()
        self._go.acquire()
        self._place = self._known = None
        if self._stopped:
            raise _Stop

    def _work(self) -> None:
        _running.set(self)
        self._go.acquire()
        try:
            with torch.no_grad():
                if not self._stopped:
                    self._run()
        except _Stop:
            return
        except BaseException as error:
            self._error = error
        self._ended = True
        self._there.release()


class _Compressed(_ThreadedPass):
    """A pass with the plugin, beside its teacher's: `reach((layer, site))` is a `Sample`, where it has groups there."""

    def __init__(self, run: Callable[[], Any], teacher: _ThreadedPass, size: Tensor) -> None:
        self.teacher = teacher
        self.size = size
        super().__init__(run)


_SITES = ("attention", "ffn")
_running: ContextVar[_ThreadedPass | None] = ContextVar("least_squares_pass", default=None)


def _seen() -> dict[str, Tensor]:
    one = _running.get()
    return {} if one is None else one.seen


def _keep(seen: Callable[[], dict[str, Tensor]], name: str) -> Callable[..., None]:
    """A hook that keeps what a module gives."""

    def hook(module: nn.Module, args: Any, result: Any) -> None:
        seen()[name] = _states(result)

    return hook


def _keep_read(seen: Callable[[], dict[str, Tensor]], name: str) -> Callable[..., None]:
    """A pre-hook that keeps what a layer reads."""

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        here = seen()
        here.clear()
        here[name] = args[0] if args else kwargs["hidden_states"]

    return hook


def _states(result: Any) -> Tensor:
    states: Tensor = result[0] if isinstance(result, tuple) else result
    return states


def _grouped(grouping: Grouping, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The groups of x (rows, tokens, d) as (..., k, d), and which members are there (None: all)."""
    found: list[Any] = []

    def look(groups: Tensor, members: Tensor | None) -> Tensor:
        found.extend((groups, members))
        return groups[..., 0, :]

    grouping.compress(x, look)
    return found[0], found[1]


def _gain(ends: Sequence[_End]) -> Tensor:
    """(d,) what the final norm multiplies channels by, from what it gives for what it gets."""
    given, got = (torch.stack([getattr(end, name) for end in ends]).sum(0) for name in ("given", "got"))
    return (given / got.clamp(min=1e-12)).sqrt().clamp(min=1e-6)


class _Moments:
    """Weighted first and second moments of features and targets, on the CPU in fp64."""

    def __init__(self) -> None:
        self._sums: list[Any] = [0.0] * 5
        self.tokens = 0

    def add(self, features: Tensor, missing: Tensor, weights: Tensor) -> None:
        self.tokens += len(features)
        f, t, w = (x.double() for x in (features, missing, weights))
        new = (w.sum(), (f * w).sum(0), (t * w).sum(0), (f * w).T @ f, (f * w).T @ t)
        self._sums = [total + part.cpu() for total, part in zip(self._sums, new, strict=True)]

    def solve(self, decompressor: HiddenDecompressor, gain: Tensor) -> None:
        """Weighted ridge regression, then its best approximation of rank r where `gain` weighs the channels."""
        count, f, t, ff, ft = self._sums
        f, t = f / count, t / count
        ff, ft = ff / count - torch.outer(f, f), ft / count - torch.outer(f, t)
        variance = ff.diag().clamp(min=1e-12)
        ridge = RIDGE * len(variance) / self.tokens
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
