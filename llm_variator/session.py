"""What the hooks of one call know: which plugin runs, over which tokens. One session per call and thread."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache

from llm_variator.cache import adopt, is_compressed
from llm_variator.config import VariatorConfig
from llm_variator.errors import VariatorError
from llm_variator.groups import FILLER, Segment
from llm_variator.plugin import CompressionPlugin


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
    generating: bool = False
    """Inside `generate`: after the first pass all tokens are continuation."""
    passes: int = 0
    segment: Segment | None = None
    """Tokens of the current pass; None where each row has one token, which is always dense."""
    cache: Cache | None = None
    skip_unread: bool = True
    """Leave out what nobody reads of the last layer."""
    reads: int | None = None
    """Last columns whose logits the current pass returns, where nothing else is read; None: all."""
    narrow: int | None = None
    """The same, while the last layer runs on these columns alone."""
    merged: int = 0
    """Sites that merged groups in the current pass: what proves that compiled code compresses."""
    stash: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """What a layer's first hook leaves for its later ones."""
    hooks: Hooks | None = None
    """Those this session needs; on in every `scope` of it."""

    def needs(self, hooks: Hooks) -> None:
        """Have `hooks` on from now to the end of the `scope` that runs."""
        if self.hooks is None:
            hooks.hold()
            self.hooks = hooks


_session: ContextVar[Session | None] = ContextVar("variator_session", default=None)

# What `current` returns while torch.compile traces `traced`. Never read by running code, so threads do not matter.
_OUTSIDE: Any = object()
_traced: Any = _OUTSIDE


def current() -> Session | None:
    """The session of the running call, None outside of one: then every hook steps aside."""
    if torch.compiler.is_compiling() and _traced is not _OUTSIDE:
        return _traced
    return _session.get()


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


def begin_pass(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Pre-hook of a decoder: find out which tokens of this pass are prompt, and prepare the cache.

    Raises:
        VariatorError: the input does not suit a compressed prompt.
    """
    session, cache = current(), kwargs.get("past_key_values")
    if session is None:
        if is_compressed(cache):
            raise VariatorError(
                "this KV cache is compressed: pass it to the VariatorModel, not to its base model"
            )
        return None
    assert not args, "VariatorModel and generate pass everything by name"
    if (tokens := _tokens(args, kwargs)) is None:
        return None  # the model raises its own error
    _refuse_empty(tokens.shape[0], None)
    plugin, config = session.plugin, host.config
    assert isinstance(config, PreTrainedConfig)
    if plugin is not None and plugin.cache_layers:
        wanted = kwargs.get("use_cache")
        if cache is None and (config.use_cache if wanted is None else wanted):
            cache = kwargs["past_key_values"] = DynamicCache(config=config)
        if cache is not None:
            adopt(cache, plugin.cache_layers, config.num_hidden_layers)
    past = cache.get_seq_length() if cache is not None else 0
    session.segment, session.cache = None, cache
    session.reads, session.narrow = _columns_read(host, kwargs) if session.skip_unread else None, None
    session.merged = 0
    if tokens.shape[1] != 1 or session.edges is not None:
        session.segment = _segment(session, tokens, kwargs.get("attention_mask"), past)
    if cache is not None:
        cache.ends_before_last_token = False
    session.passes += 1
    return args, kwargs


def _columns_read(host: Any, kwargs: dict[str, Any]) -> int | None:
    """Last columns whose logits a pass returns, where nobody reads hidden states, attention or gradients besides."""
    keep = kwargs.get("logits_to_keep")
    if not isinstance(keep, int) or keep < 1 or torch.is_grad_enabled() or host.base_model._forward_hooks:
        return None
    for name in ("output_hidden_states", "output_attentions"):
        wanted = kwargs.get(name)
        if getattr(host.config, name, False) if wanted is None else wanted:
            return None
    return keep


def begin_encoding(encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Pre-hook of an encoder: all its tokens are compressed.

    Raises:
        VariatorError: the input does not suit a compressed prompt.
    """
    session = current()
    if session is None or session.plugin is None or (tokens := _tokens(args, kwargs)) is None:
        return
    session.stash.clear()
    session.segment = _encoded(session, tokens, kwargs.get("attention_mask"))


def _encoded(session: Session, tokens: Tensor, mask: Any) -> Segment:
    """All of an encoder's tokens (rows, width, ...) as prompt."""
    assert session.plugin is not None
    config, width = session.plugin.config, tokens.shape[1]
    assert config.dense_head is not None
    assert config.dense_tail is not None
    valid = _valid(mask, width)
    _refuse_empty(width, valid)
    prompts = width if valid is None else valid.sum(1).tolist()
    return Segment(
        width,
        prompts,
        head=config.dense_head,
        tail=config.dense_tail,
        device=tokens.device,
        valid=valid,
        ragged=True,
    )


def begin_answer(decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Pre-hook of a decoder that reads an encoder: with site "cross" it reads one state per entry.

    Merged once for all decoder layers, and in `generate` once for all steps.

    Raises:
        VariatorError: the input or the cache does not suit merged states.
    """
    session = current()
    site = session.plugin.at("cross", 0) if session and session.plugin else None
    if session is None or site is None or (states := kwargs.get("encoder_hidden_states")) is None:
        return None
    if isinstance(getattr(kwargs.get("past_key_values"), "cross_attention_cache", None), StaticCache):
        raise VariatorError('a static cache does not work with site "cross": leave cache_implementation out')
    if session.stash.get("cross", (None,))[0] is not states:
        segment = _encoded(session, states, kwargs.get("encoder_attention_mask"))
        grouping = segment.grouping(site.k)
        mask = (grouping.columns != FILLER).long() if grouping.has_fillers else None
        session.stash["cross"] = states, grouping.compress(states, site.compressor), mask
    _, entries, mask = session.stash["cross"]
    return args, {**kwargs, "encoder_hidden_states": entries, "encoder_attention_mask": mask}


def _tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """(rows, width, ...) what a model reads: BERT's heads pass their ids by position, the rest by name."""
    ids = args[0] if args else kwargs.get("input_ids")
    return kwargs.get("inputs_embeds") if ids is None else ids


def _valid(mask: Any, width: int) -> Tensor | None:
    """(rows, width) bool, the last columns of a 2D attention mask."""
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise VariatorError("attention_mask must be a 2D tensor (batch, tokens) when a plugin is active")
    if mask is not None and mask.shape[1] < width:
        raise VariatorError(f"attention_mask has {mask.shape[1]} columns for {width} tokens")
    return None if mask is None else mask[:, -width:].bool()


def _refuse_empty(size: int, valid: Tensor | None) -> None:
    if size == 0 or (valid is not None and not bool(valid.any(1).all())):
        raise VariatorError("the prompt is empty: every row needs at least one token")


def _segment(session: Session, tokens: Tensor, mask: Any, past: int) -> Segment:
    """The tokens (rows, width, ...) of a pass after `past` columns of cache, `mask` over both."""
    rows, width = tokens.shape[:2]
    valid = _valid(mask, width)
    _refuse_empty(rows * width, None if past else valid)
    if session.plugin is None:
        return Segment(width, 0, head=0, tail=0, device=tokens.device, valid=valid)

    if session.generating and session.passes == 0:
        session.prompts = width if valid is None else valid.sum(1).tolist()
    elif session.generating and past:
        raise VariatorError(
            "this decoding strategy reads several tokens at once; with a plugin use plain decoding"
        )
    prompts = width if session.prompts is None else session.prompts
    each = [prompts] if isinstance(prompts, int) else prompts
    if isinstance(prompts, list) and len(prompts) != rows:
        raise VariatorError(f"prompt_length has {len(prompts)} entries for {rows} rows")
    if min(each) < 0:
        raise VariatorError(f"prompt_length must not be negative, got {prompts}")
    if max(each) > width:
        raise VariatorError(f"prompt_length {prompts} exceeds the {width} tokens given")

    config = session.plugin.config
    assert config.dense_tail is not None
    head, tail = session.edges or (first_dense(session.cache, config), config.dense_tail)
    return Segment(width, prompts, head=head, tail=tail, device=tokens.device, valid=valid)


def first_dense(cache: Cache | None, config: VariatorConfig) -> int:
    """Dense tokens at the beginning of a prompt that comes after `cache`."""
    assert config.dense_head is not None
    if cache is None or not cache.get_seq_length():
        return config.dense_head
    # a generated token that no pass has read yet belongs to the continuation, keep it dense
    return int(getattr(cache, "ends_before_last_token", False))
