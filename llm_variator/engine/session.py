"""What the hooks of one call know: which plugin runs, over which tokens. One session per call and thread."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import Cache

from llm_variator.engine.blocks import Place, Region, Rows, entries, reduces
from llm_variator.engine.cache import CompressedLayer, SelectedLayer
from llm_variator.engine.groups import Segment
from llm_variator.engine.plan import Plan
from llm_variator.engine.plugin import CompressionPlugin, SelectLayers
from llm_variator.engine.window import Rule, Window
from llm_variator.errors import VariatorError


class Hooks(Protocol):
    """Hooks that can be off."""

    def hold(self) -> None:
        """On, until a `release` for each `hold`."""
        ...

    def release(self) -> None:
        """Undo one `hold`."""
        ...


@dataclasses.dataclass
class Session:
    """State of one `VariatorModel.forward` or `generate`, from its first layer to its last token."""

    plugin: CompressionPlugin | None
    """None: the base model, going on from a cache that a plugin compressed."""
    prompts: int | list[int] | None = None
    """Prompt tokens of every row, or of each; None: every token of the first pass is prompt."""
    edges: tuple[int, int] | None = None
    """Dense tokens at both ends of the next passes, where they are parts of one prompt; None: as configured."""
    place: Place | None = None
    """Where the next pass begins in its prompt then."""
    generating: bool = False
    """Inside `generate`: after the first pass all tokens are continuation."""
    mask: Tensor | None = None
    """(rows, tokens), the one that `generate` was given."""
    drafts: bool = False
    """Passes of `generate` may read several tokens of a continuation, the first of them behind `prompts`."""
    skip_unread: bool = True
    """Leave out what nobody reads of the last layer."""
    passes: int = 0
    """Passes that began."""
    proven: int = 0
    """Passes that ended with `Pass.prove`."""
    now: Pass | None = None
    """The pass that runs, or ran last; None before the first."""
    cross: tuple[Tensor, Tensor, Tensor | None] | None = None
    """Site "cross": the encoder's states, the same merged, and their mask; for all steps of a decoder."""
    hooks: Hooks | None = None
    """Those this session needs; on in every `scope` of it."""

    @property
    def cache(self) -> Cache | None:
        """The cache that the last pass read and filled."""
        return None if self.now is None else self.now.cache

    def end_pass(self) -> None:
        """Prove the pass that ends.

        Raises:
            VariatorError: see `Pass.prove`.
        """
        if self.now is not None:
            self.now.prove()
            self.proven += 1

    def finish(self) -> None:
        """After a call that runs the base at least once.

        Raises:
            VariatorError: its passes did not reach the hooks.
        """
        if not self.passes:
            raise broken("no pass reached the layers that the plugin is attached to")
        if self.proven != self.passes:
            raise broken(f"{self.proven} of {self.passes} passes ended with a proof that they compressed")

    def needs(self, hooks: Hooks) -> None:
        """Have `hooks` on from now to the end of the `scope` that runs."""
        if self.hooks is None:
            hooks.hold()
            self.hooks = hooks


class Pass:
    """One pass over the layers: what is compressed in it, what its hooks leave for each other, what they did.

    A pass whose hooks did not do what its plan says has computed something else, most likely the dense model:
    `prove` raises then. All of it are integers that Python knows, so it costs nothing beside a layer.
    """

    def __init__(
        self,
        plugin: CompressionPlugin | None,
        segment: Segment | None,
        cache: Cache | None = None,
        reads: int | None = None,
        places: list[Place] | None = None,
        *,
        ends_prompts: bool = False,
    ) -> None:
        """`segment`: the tokens; None where each row has one, which is always dense.

        `reads`: the last columns whose logits are returned, where nothing else is read; None: all.
        `places`: of the prompts in this pass, one for all rows or of each, for a plugin that keeps keys and values.
        `ends_prompts`: its tokens are the last of prompts whose parts were read before.
        """
        dense = [False]
        if places is not None and plugin is not None and plugin.config.decode_block is not None:
            # a prompt that stays dense ages like what is generated
            dense = [not reduces(place, plugin.config.block, place.left) for place in places]
            places = [
                place._replace(done=0, left=0) if own else place
                for place, own in zip(places, dense, strict=True)
            ]
        self.places, self.ends_prompts = places, ends_prompts
        selects = plugin is not None and bool(plugin.selects) and segment is not None
        self.rows = Rows(segment, dense) if selects and segment is not None else None
        """For a plugin that keeps keys and values, in a pass with a prompt."""
        self._regions: dict[int, Region] = {}
        self.plugin, self.segment, self.cache, self.reads = plugin, segment, cache, reads
        self.narrow: int | None = None
        """The columns read, while the last layer runs on these alone."""
        self.narrowed: int | None = None
        """The layer that ran on the columns read alone."""
        self.whole: Tensor | None = None
        """What the last layer's first norm reads, while the rest of the layer gets fewer columns."""
        self.query_width = 0
        """Queries that the last layer's attention expects then."""
        self.ffn: dict[int, Any] = {}
        """layer -> what the hook before its FFN leaves for the one behind."""
        self.attention: dict[int, Any] = {}
        """layer -> its attention's call, while that runs."""
        self.biases: dict[Any, Tensor] = {}
        """Position biases of entries, which all layers share."""
        self.merged: list[tuple[str, int]] = []
        """(site, layer) that went from groups to tokens, or to keys and values."""
        self.attended = 0
        """Layers that attended to entries."""
        self._held = self._layers_held()

    def region(self, block: int) -> Region:
        """The prompt tokens of this pass, for heads that keep keys and values in blocks of this size."""
        if block not in self._regions:
            assert self.rows is not None
            assert self.places is not None
            rows = self.rows
            self._regions[block] = Region(self.places, rows.prompts, block, rows.prompt_columns.device)
        return self._regions[block]

    def rule(self, site: SelectLayers) -> Rule | None:
        """How the tokens behind a prompt age in one layer; None: they stay dense."""
        assert self.plugin is not None
        plan, step = self.plugin.plan, self.plugin.config.decode_block
        if step is None:
            return None
        return Rule(site.block, step, max(plan.tail, site.block), plan.head, site.serial)

    def _layers_held(self) -> dict[int, _Held]:
        """Layer -> the part of the cache it fills, and the entries there now, without what ageing took away."""
        layers = self.cache.layers if self.cache is not None else ()
        return {
            index: (
                _Held(layer, _all_counts(layer), layer.window, layer.tokens, layer.aged, layer.has_fillers)
                if isinstance(layer, SelectedLayer)
                else _Held(layer, (layer.entries + layer.aged,))
            )
            for index, layer in enumerate(layers)
            if isinstance(layer, (CompressedLayer, SelectedLayer))
        }

    def prove(self) -> None:
        """After the pass.

        Raises:
            VariatorError: a site did not merge, or a layer holds other entries than it should.
        """
        plugin, segment = self.plugin, self.segment
        if plugin is not None and segment is not None:
            merged = set(self.merged)
            for (site, layer), own in plugin.sites.items():
                if site == "cross" or (site == "ffn" and layer == self.narrowed):
                    continue
                ran = (site, layer) in merged
                if ran != segment.grouping(own.k).has_groups:
                    raise broken(
                        f"site {site!r} of layer {layer} {'merged' if ran else 'did not merge'} the prompt's groups"
                    )
            for layer in plugin.selects:
                if ("kv", layer) not in merged:
                    raise broken(f"site 'kv' of layer {layer} did not choose which keys to keep")
        for layer, old in self._held.items():
            held, before = old.layer, old.counts
            if isinstance(held, SelectedLayer):
                self._prove_counts(layer, held, old)
                continue
            new = 1
            if segment is not None:
                reader = (plugin.at("attention", layer) or plugin.at("kv", layer)) if plugin else None
                new = segment.grouping(reader.k if reader else 1).entries
            if held.entries + held.aged != before[0] + new:
                wanted = before[0] + new - held.aged
                raise broken(f"layer {layer} holds {held.entries} entries of the KV cache, expected {wanted}")
        expected = len(self._held)
        if self.cache is None and plugin is not None and segment is not None:
            expected = len(plugin.cache_layers)
        if self.attended != expected:
            raise broken(f"{self.attended} layers attended to compressed keys, expected {expected}")

    def _prove_counts(self, layer: int, held: SelectedLayer, old: _Held) -> None:
        """Raise unless every head of a layer that keeps keys holds as many as it should."""
        site = self.plugin.selects.get(layer) if self.plugin else None
        if self.ends_prompts and site is not None:
            if held.open is not None:
                raise broken(f"layer {layer} did not reduce the prompt")
            return
        rule = self.rule(site) if site is not None else None
        if (rule is None) != (held.window is None):
            raise broken(f"layer {layer} {'forgot' if rule else 'remembers'} which of its tokens are to age")
        if rule is not None and held.window is not None:
            self._prove_window(layer, rule, held, held.window, old)
        for head, (count, before) in enumerate(zip(_all_counts(held), old.counts, strict=True)):
            if self.segment is None or site is None:
                reader = (
                    (self.plugin.at("attention", layer) or self.plugin.at("kv", layer))
                    if self.plugin
                    else None
                )
                new = 1 if self.segment is None else self.segment.grouping(reader.k if reader else 1).entries
            else:
                assert self.places is not None
                assert self.rows is not None
                k, block = site.ratios[head], site.block
                new = self.rows.rest_columns.shape[1] + max(
                    entries(place, k, block, read) - entries(place, k, block)
                    for place, read in zip(self.places, self.rows.prompts, strict=True)
                )
            if count != before + new:
                aged = held.aged[head]
                raise broken(
                    f"head {head} of layer {layer} holds {count - aged} keys, expected {before + new - aged}"
                )

    def _prove_window(self, layer: int, rule: Rule, held: SelectedLayer, window: Window, old: _Held) -> None:
        """Raise unless of every row as much has aged as should have."""
        rows = len(window.lengths)
        if old.window is not None and old.window.rule == rule:
            lengths = old.window.lengths
        else:
            lengths = (0 if old.tokens else -rule.head,) * rows
        places, reads, news = self.places or [Place(0, 0)], [1], [0]
        if self.rows is not None:
            reads, news = self.rows.rests, self.rows.prompts
        each = [x * rows if len(x) < rows else x for x in (places, reads, news)]
        expected, removed = [], set()
        for length, place, read, new in zip(lengths, *each, strict=True):
            closed = 0
            if place.left:
                closed = max(0, length) if not place.done else 0
                length = place.tail if place.left == new else 0
            steps = rule.steps(length, read)
            expected.append(rule.after(length, read))
            removed.add((closed, steps * rule.step))
        if window.lengths != tuple(expected):
            raise broken(
                f"layer {layer} has {window.lengths} tokens that are to age in its rows, expected {tuple(expected)}"
            )
        if old.fillers or held.has_fillers or len(removed) > 1:
            return  # entries of shorter rows are filled up
        for one in held.classes:
            taken = sum(count - rule.kept(count, one.k) for count in next(iter(removed)))
            for head in one.heads:
                if held.aged[head] - old.aged[head] != taken:
                    raise broken(
                        f"in head {head} of layer {layer} {held.aged[head] - old.aged[head]} keys aged away, "
                        f"expected {taken}"
                    )


class _Held(NamedTuple):
    """What a layer of the cache holds before a pass."""

    layer: CompressedLayer | SelectedLayer
    counts: tuple[int, ...]
    """Entries, with those that ageing has taken away; of each head where these differ."""
    window: Window | None = None
    tokens: int = 0
    aged: tuple[int, ...] = ()
    fillers: bool = False


def _all_counts(layer: SelectedLayer) -> tuple[int, ...]:
    return tuple(count + aged for count, aged in zip(layer.counts, layer.aged, strict=True))


def broken(what: str) -> VariatorError:
    """The error of a pass that was not compressed as planned; `what` names the layer."""
    return VariatorError(
        f"{what}: this pass was not compressed as planned, and its result would be wrong. Something has changed the "
        "base's modules or hooks: call unload() and attach a new VariatorModel; if that fails, transformers runs this "
        "model in a way not known here"
    )


_session: ContextVar[Session | None] = ContextVar("variator_session", default=None)

# What `current` returns while torch.compile traces `traced`. Never read by running code, so threads do not matter.
_OUTSIDE: Any = object()
_traced: Any = _OUTSIDE


def current() -> Session | None:
    """The session of the running call, None outside of one: then every hook steps aside."""
    if torch.compiler.is_compiling() and _traced is not _OUTSIDE:
        return _traced
    return _session.get()


def current_pass() -> Pass | None:
    """The pass of the running session; None outside of one."""
    session = current()
    return None if session is None else session.now


def traced(session: Session | None, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`call` for torch.compile to trace: it cannot follow a ContextVar, but an argument.

    The hooks read the session through a global that is written and read inside the trace alone, so compiled code
    gets it from its caller at every call, under guards. A trace of somebody else's finds the ContextVar instead,
    where it breaks off: slower, but never without the plugin.
    """
    global _traced
    _traced = session
    output = call(*args, **kwargs)
    _traced = _OUTSIDE
    return output


@contextlib.contextmanager
def scope(session: Session | None) -> Iterator[Session | None]:
    """Make `session` current inside the block, in this thread only. Blocks of one session do not nest."""
    if session is not None and session.hooks is not None:  # layers computed once more in a backward pass
        session.hooks.hold()
    token = _session.set(session)
    try:
        yield session
    finally:
        _session.reset(token)
        if session is not None and session.hooks is not None:
            session.hooks.release()


def outside(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`call` outside of any session, also where it is made inside of one: by a logits processor in `generate`."""
    if torch.compiler.is_compiling() or _session.get() is None:
        return call(*args, **kwargs)
    with scope(None):
        return call(*args, **kwargs)


def first_dense(cache: Cache | None, plan: Plan) -> int:
    """Dense tokens at the beginning of a prompt that comes after `cache`."""
    if cache is None or not cache.get_seq_length():
        return plan.head
    return int(ends_before_last_token(cache))


def ends_before_last_token(cache: Cache) -> bool:
    """Whether the next token was generated but never read: it belongs to the continuation, and stays dense."""
    length = int(cache.get_seq_length())
    return length > 0 and getattr(cache, "answered", None) == length


def answered(cache: Any) -> None:
    """Note that `cache` holds all of an answer but its last token: true until it grows or is cropped."""
    cache.answered = int(cache.get_seq_length())
