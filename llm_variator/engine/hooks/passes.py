"""Where a pass begins and ends: hooks on the module that reads the tokens, and on a decoder that reads an encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedConfig, StaticCache

from llm_variator.engine.blocks import Place
from llm_variator.engine.cache import CompressedLayer, SelectedLayer, adopt, is_compressed
from llm_variator.engine.cache.naming import NAMES, take_cache
from llm_variator.engine.contexts.inputs import refuse_empty
from llm_variator.engine.groups import FILLER, Segment
from llm_variator.engine.plugin import CompressionPlugin
from llm_variator.engine.session import Pass, Session, current, first_dense
from llm_variator.errors import VariatorError


def begin_pass(
    host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, cache_name: str
) -> tuple[Any, Any] | None:
    """Pre-hook of a decoder: find out which tokens of this pass are prompt, and prepare the cache.

    `cache_name`: of the argument that gives `host` its cache.

    Raises:
        VariatorError: the input does not suit a compressed prompt.
    """
    session = current()
    if session is None:
        if any(is_compressed(kwargs.get(name)) for name in NAMES):
            raise VariatorError(
                "this KV cache is compressed: pass it to the VariatorModel, not to its base model"
            )
        return None
    if args or (
        session.generating
        and session.now is not None
        and session.now.cache
        and not _goes_on(kwargs, session.now.cache)
    ):
        raise VariatorError(
            "inside generate something else reads a prompt with the base model (guidance, a logits processor, "
            "custom_generate): have it call the VariatorModel"
        )
    session.now = None
    if (tokens := _tokens(kwargs)) is None:
        return None  # the model raises its own error
    refuse_empty(tokens.shape[0], None)
    plugin, config = session.plugin, host.config
    assert isinstance(config, PreTrainedConfig)
    cache = take_cache(kwargs)
    if plugin is not None and plugin.cache_layers:
        wanted = kwargs.get("use_cache")
        if cache is None and (config.use_cache if wanted is None else wanted):
            cache = DynamicCache(config=config)
        if cache is not None:
            adopt(cache, plugin.cache_layers, config.num_hidden_layers, plugin.plan.selected)
            _refuse_ageing(cache, plugin)
    if cache is not None:
        kwargs[cache_name] = cache
        if any(isinstance(layer, SelectedLayer) for layer in getattr(cache, "layers", ())):
            _refuse_weights(host, kwargs)
    past = cache.get_seq_length() if cache is not None else 0
    segment, places, unread = None, None, getattr(cache, "unread", 0)
    # a static cache holds no entries, and counts its tokens on its device: no step may ask for their number
    if cache is not None and not _is_static(cache):
        if past != getattr(cache, "ends_at", 0):  # it was cropped, or emptied
            cache.masked = None
        cache.ends_at = past + tokens.shape[1]
    if not session.passes and past:
        _hide(cache, kwargs.get("attention_mask"), past, tokens.shape[1])
    if tokens.shape[1] != 1 or session.edges is not None:
        if unread and session.edges is None:
            raise VariatorError(
                f"a prompt of this cache has {unread} tokens left: read these first, by themselves"
            )
        segment = _segment(session, tokens, kwargs.get("attention_mask"), past, cache)
        _refuse_packed(kwargs, segment)
        if plugin is not None and plugin.selects:
            _refuse_weights(host, kwargs)
            places = _places(session, segment, cache)
    narrows = session.skip_unread and segment is not None and not _is_static(cache)
    reads = _columns_read(host, kwargs) if narrows else None
    session.now = Pass(plugin, segment, cache, reads, places, ends_prompts=bool(unread) and segment is None)
    if cache is not None:
        cache.answered, cache.unread = None, 0
    session.passes += 1
    return args, kwargs


@torch.compiler.disable
def end_pass(module: nn.Module, args: Any, output: Any) -> None:
    """Hook of the module that reads the tokens: prove that its layers compressed what they should have.

    Raises:
        VariatorError: they did not.
    """
    if (session := current()) is not None:
        session.end_pass()


def _hide(cache: Any, mask: Any, past: int, width: int) -> None:
    """Make entries of `cache` invisible whose tokens a 2D mask over `past` and `width` columns leaves out.

    Such as the padding behind rows that ended before others.
    """
    held = [layer for layer in cache.layers if isinstance(layer, (CompressedLayer, SelectedLayer))]
    if not held or not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != past + width:
        return
    seen, before = mask[:, :past].bool(), getattr(cache, "masked", None)
    if before is not None and len(before) == len(seen) and before.shape[1] <= past:
        was = F.pad(before, (0, past - before.shape[1]), value=True)
        if torch.equal(seen, was):  # as in every step of a loop that generates
            return
    if not bool(seen.all()):
        for layer in held:
            layer.hide(seen)
    cache.masked = seen


def _is_static(cache: Any) -> bool:
    """Whether attention gets all of a cache's slots: the last of several queries alone would see those still empty."""
    return bool(getattr(cache, "is_compileable", False))


def _places(session: Session, segment: Segment, cache: Any) -> list[Place]:
    """Where the prompts of a pass begin in their prompts: at the start, unless these are read in parts."""
    assert session.plugin is not None
    uniform = segment.uniform_prompt is not None
    if session.place is not None and uniform:
        return [session.place]
    plan = session.plugin.plan
    head = first_dense(cache, plan)
    prompts = (
        segment.prompts if segment.uniform_prompt is None else [min(segment.uniform_prompt, segment.width)]
    )
    return [Place(head, plan.tail, 0, prompt) for prompt in prompts]


def _refuse_ageing(cache: Any, plugin: CompressionPlugin) -> None:
    """Raise where generated tokens would be merged in a cache that keeps single keys."""
    merges = plugin.config.decode_block is not None and not plugin.selects
    if merges and any(isinstance(layer, SelectedLayer) for layer in cache.layers):
        raise VariatorError(
            "this cache keeps single keys of each head: decode_block cannot merge tokens in it; go on with a plugin "
            "without decode_block"
        )


def _refuse_weights(host: Any, kwargs: dict[str, Any]) -> None:
    """Raise where attention weights are asked for: there is no one matrix of them."""
    wanted = kwargs.get("output_attentions")
    if host.config.output_attentions if wanted is None else wanted:
        raise VariatorError(
            'with compressor "select" every head sees other keys, in parts: leave out output_attentions, or read the '
            "prompt with model.disable_plugin()"
        )


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


def begin_encoding(
    encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, names: Sequence[str]
) -> None:
    """Pre-hook of an encoder: all its tokens are compressed.

    `names`: of what it takes by position, as a head may give BERT its ids and their mask.

    Raises:
        VariatorError: the input does not suit a compressed prompt.
    """
    session = current()
    if session is None or session.plugin is None:
        return
    given = dict(zip(names, args, strict=False)) | kwargs
    if (tokens := _tokens(given)) is None:
        return
    session.now = None
    session.now = Pass(session.plugin, _encoded(session, tokens, given.get("attention_mask")))
    session.passes += 1


def _encoded(session: Session, tokens: Tensor, mask: Any) -> Segment:
    """All of an encoder's tokens (rows, width, ...) as prompt."""
    assert session.plugin is not None
    plan, width = session.plugin.plan, tokens.shape[1]
    valid = _valid(mask, width)
    refuse_empty(width, valid)
    prompts = width if valid is None else valid.sum(1).tolist()
    return Segment(
        width,
        prompts,
        head=plan.head,
        tail=plan.tail,
        device=tokens.device,
        valid=valid,
        ragged=True,
    )


def begin_answer(
    decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, cache_name: str
) -> tuple[Any, Any] | None:
    """Pre-hook of a decoder that reads an encoder: with site "cross" it reads one state per entry.

    Merged once for all decoder layers, and in `generate` once for all steps.

    Raises:
        VariatorError: the input or the cache does not suit merged states.
    """
    session = current()
    site = session.plugin.at("cross", 0) if session and session.plugin else None
    if session is None or site is None or (states := kwargs.get("encoder_hidden_states")) is None:
        return None
    if isinstance(getattr(kwargs.get(cache_name), "cross_attention_cache", None), StaticCache):
        raise VariatorError('a static cache does not work with site "cross": leave cache_implementation out')
    if session.cross is None or session.cross[0] is not states:
        segment = _encoded(session, states, kwargs.get("encoder_attention_mask"))
        grouping = segment.grouping(site.k)
        mask = (grouping.columns != FILLER).long() if grouping.has_fillers else None
        session.cross = states, grouping.compress(states, site.compressor), mask
    _, entries, mask = session.cross
    return args, {**kwargs, "encoder_hidden_states": entries, "encoder_attention_mask": mask}


def _tokens(given: Mapping[str, Any]) -> Tensor | None:
    """(rows, width, ...) what a model reads."""
    ids = given.get("input_ids")
    return given.get("inputs_embeds") if ids is None else ids


def _valid(mask: Any, width: int) -> Tensor | None:
    """(rows, width) bool, the last columns of a 2D attention mask."""
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise VariatorError("attention_mask must be a 2D tensor (batch, tokens) when a plugin is active")
    if mask is not None and mask.shape[1] < width:
        raise VariatorError(f"attention_mask has {mask.shape[1]} columns for {width} tokens")
    return None if mask is None else mask[:, -width:].bool()


def _of_slots(session: Session, mask: Any, past: int, tokens: Tensor) -> Any:
    """The 2D mask of a pass over a static cache, of which `generate` makes those of each kind of layer (4D)."""
    is_made = isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.ndim == 4)
    if not session.generating or not is_made:
        return mask
    if session.mask is None:
        return None
    rows, width = tokens.shape[:2]
    given = session.mask[:, past : past + width].repeat_interleave(rows // len(session.mask), dim=0)
    return F.pad(given, (0, width - given.shape[1]), value=1)


def _goes_on(kwargs: dict[str, Any], cache: Any) -> bool:
    """Whether a pass goes on from `cache`."""
    return any(kwargs.get(name) is cache for name in NAMES)


def _refuse_packed(kwargs: dict[str, Any], segment: Segment) -> None:
    """Raise where a row holds several documents: groups and dense heads would be those of one."""
    positions = kwargs.get("position_ids")
    packed = any(kwargs.get(name) is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx"))
    if isinstance(positions, Tensor) and positions.ndim == 2 and positions.shape[1] == segment.width:
        back = positions.diff(dim=1) < 0
        if segment.valid is not None:
            valid = segment.valid.to(back.device)
            back = back & valid[:, 1:] & valid[:, :-1]
        packed = packed or bool(back.any())
    if packed:
        raise VariatorError(
            "packed sequences (position_ids that start again inside a row) cannot be compressed: give every document "
            "a row of its own, padded, or disable the plugin"
        )


def _segment(session: Session, tokens: Tensor, mask: Any, past: int, cache: Any) -> Segment:
    """The tokens (rows, width, ...) of a pass after `past` columns of `cache`, `mask` over both."""
    rows, width = tokens.shape[:2]
    valid = _valid(_of_slots(session, mask, past, tokens) if _is_static(cache) else mask, width)
    refuse_empty(rows * width, None if past else valid)
    if session.plugin is None:
        return Segment(width, 0, head=0, tail=0, device=tokens.device, valid=valid)

    if session.generating and session.passes == 0 and not session.drafts:
        session.prompts = width if valid is None else valid.sum(1).tolist()
    elif session.drafts and session.passes:
        session.prompts = 0
    elif session.generating and past and not session.drafts:
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

    plan = session.plugin.plan
    head, tail = session.edges or (first_dense(cache, plan), plan.tail)
    return Segment(width, prompts, head=head, tail=tail, device=tokens.device, valid=valid)
