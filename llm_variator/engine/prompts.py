"""What `VariatorModel.generate` does with its arguments before Hugging Face's `generate` gets them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from llm_variator.engine.cache.naming import cache_argument
from llm_variator.engine.contexts.inputs import NO_TOKEN, Prompt, check_embeddings, padding_first
from llm_variator.engine.contexts.prefill import read, slides
from llm_variator.engine.hooks.hook import ATTACHED
from llm_variator.engine.plugin import CompressionPlugin
from llm_variator.errors import VariatorError

_UNSUPPORTED = {
    "assistant_model": "assisted decoding",
    "prompt_lookup_num_tokens": "prompt-lookup decoding",
    "assistant_early_exit": "assisted decoding",
}
# caches that entries can be put into; for "hybrid", a word of older checkpoints, transformers takes its default
_GROWING = (None, "dynamic", "dynamic_full", "hybrid", "offloaded", "quantized")


def setting(host: PreTrainedModel, kwargs: Mapping[str, Any], name: str) -> Any:
    """A generation setting: the call's, else its generation_config's, else the model's, as transformers takes it."""
    if name in kwargs:
        return kwargs[name]  # None too: it unsets what the configurations say
    places = (kwargs.get("generation_config"), host.generation_config)
    found = [getattr(place, name, None) for place in places]
    return next((value for value in found if value is not None), None)


def check_generation(
    host: PreTrainedModel, plugin: CompressionPlugin | None, kwargs: Mapping[str, Any]
) -> None:
    """Refuse what cannot work with a compressed prompt."""
    selects = plugin is not None and bool(plugin.selects)
    for name, what in _UNSUPPORTED.items():
        if selects and drafts(host, kwargs) and not setting(host, kwargs, "assistant_early_exit"):
            assert plugin is not None
            _check_drafts(host, plugin, kwargs)
        elif setting(host, kwargs, name):
            raise VariatorError(
                f"{what} ({name}) does not work with a compressed prompt; leave it out or disable the plugin"
            )
    implementation = setting(host, kwargs, "cache_implementation")
    if implementation == "paged":
        raise VariatorError(
            'cache_implementation="paged" generates past the plugin, in a thread of its own: leave it out, or disable '
            "the plugin"
        )
    if (setting(host, kwargs, "guidance_scale") or 1) != 1:
        raise VariatorError(
            "classifier-free guidance (guidance_scale) reads a second prompt past the plugin: leave it out, or disable "
            "the plugin"
        )
    if selects and implementation == "quantized" and setting(host, kwargs, "prefill_chunk_size"):
        raise VariatorError(
            'with compressor "select" prefill_chunk_size takes entries back, which cache_implementation="quantized" '
            "cannot: leave out one of the two, or quantise a context (CompressedContext.quantised)"
        )
    if plugin is not None and plugin.cache_layers and implementation not in _GROWING:
        raise VariatorError(
            f"cache_implementation={implementation!r} does not work with a compressed KV cache; leave it out"
        )


def refuse_reading_twice(host: PreTrainedModel, kwargs: Mapping[str, Any], past: int = 0) -> None:
    """Raise where generate would read once more what a cache of `past` tokens holds, or take a question for that."""
    if setting(host, kwargs, "use_cache") is False:
        raise VariatorError("going on from a context or a cache needs it: give use_cache=True")
    ids = kwargs.get("input_ids")
    if isinstance(ids, Tensor) and ids.ndim == 2 and 0 < ids.shape[1] <= past:
        raise VariatorError(
            f"the cache holds {past} tokens and {ids.shape[1]} are given: give the whole sequence, those of the cache "
            "first and some behind them; or compress the prompt, and ask with context="
        )


def drafts(host: PreTrainedModel, kwargs: Mapping[str, Any]) -> bool:
    """Whether generate guesses several tokens, reads them in one pass, and takes back what was wrong."""
    return any(setting(host, kwargs, name) for name in ("assistant_model", "prompt_lookup_num_tokens"))


def _check_drafts(host: PreTrainedModel, plugin: CompressionPlugin, kwargs: Mapping[str, Any]) -> None:
    """Refuse what cannot work with guesses behind a prompt of which keys and values are kept."""
    if plugin.config.decode_block is not None:
        raise VariatorError(
            "assisted and prompt-lookup decoding take back tokens that decode_block may have reduced: leave out one of "
            "the two"
        )
    assistant, mask = kwargs.get("assistant_model"), kwargs.get("attention_mask")
    if assistant is not None and (
        not isinstance(assistant, PreTrainedModel) or getattr(assistant, ATTACHED, False)
    ):
        raise VariatorError(
            "assistant_model must be a model of transformers without plugins: load it once more"
        )
    embedded = kwargs.get("input_ids") is None or kwargs.get("inputs_embeds") is not None
    if embedded or setting(host, kwargs, "prefill_chunk_size"):
        raise VariatorError(
            "with a plugin, assisted and prompt-lookup decoding need token ids that are read in one pass: leave out "
            "inputs_embeds and prefill_chunk_size"
        )
    rows = len(kwargs["input_ids"]) if isinstance(kwargs.get("input_ids"), Tensor) else 1
    if rows > 1 or (isinstance(mask, Tensor) and not bool(mask.all())):
        raise VariatorError(
            "with a plugin, assisted and prompt-lookup decoding take one row without padding: generate row by row, "
            "each without its padding"
        )


def refuse_drafts_after(cache: Any) -> None:
    """Raise where guesses would come after a cache: transformers reads all of its tokens once more then."""
    if cache is not None and cache.get_seq_length():
        raise VariatorError(
            "assisted and prompt-lookup decoding cannot go on from a cache or a context, whose tokens transformers "
            "reads once more: leave them out, or give the whole text as one prompt"
        )


def check_vocabulary(host: PreTrainedModel, ids: Tensor) -> None:
    """Refuse tokens that are none of the model's."""
    if ids.is_floating_point():
        raise VariatorError("token ids must be whole numbers; give embeddings as inputs_embeds=")
    embeddings: Any = host.get_input_embeddings()
    size = len(embeddings.weight)
    least, most = ids.min().item(), ids.max().item()
    if least < 0 or most >= size:
        raise VariatorError(
            f"token ids must lie in the vocabulary, 0 to {size - 1}; got {least if least < 0 else most}"
        )


def normalised(host: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with their prompt, where it is token ids or embeddings, checked and padded on the left."""
    kwargs = dict(given)
    ids, mask, embeds = (kwargs.get(name) for name in ("input_ids", "attention_mask", "inputs_embeds"))
    if embeds is not None:
        check_embeddings(embeds, host.get_input_embeddings())
        if not isinstance(ids, Tensor) or not ids.numel():
            kwargs.pop("input_ids", None)
            ids = torch.full(embeds.shape[:2], NO_TOKEN, device=embeds.device)
        elif ids.shape != embeds.shape[:2]:
            raise VariatorError(
                f"input_ids {tuple(ids.shape)} and inputs_embeds {tuple(embeds.shape)} are two prompts: leave one out"
            )
    if not isinstance(ids, Tensor):
        return kwargs
    if mask is None and embeds is None:
        mask = kwargs["attention_mask"] = _mask_of(host, kwargs, ids)
    fits = mask if isinstance(mask, Tensor) and mask.shape == ids.shape else None
    prompt = Prompt.of(ids, fits, embeds)
    if kwargs.get("input_ids") is not None:
        check_vocabulary(host, ids)
    if fits is not None:
        ready = {"input_ids": prompt.ids, "inputs_embeds": prompt.embeds, "attention_mask": prompt.mask}
        positions = kwargs.get("position_ids")
        if isinstance(positions, Tensor) and positions.shape == ids.shape and prompt.ids is not ids:
            ready["position_ids"] = padding_first(positions, fits)
        kwargs |= {name: value for name, value in ready.items() if kwargs.get(name) is not None}
    return kwargs


def without_padding(ids: Tensor, mask: Tensor) -> Tensor:
    """The ids with a row's own first token where `mask` is 0: a penalty of repetition counts all that it sees."""
    first = mask.bool().int().argmax(dim=1, keepdim=True)
    return torch.where(mask.bool(), ids, ids.gather(1, first.to(ids.device)))


def turned(given: Mapping[str, Any], past: int) -> dict[str, Any]:
    """The arguments with the padding behind `past` columns of a cache before what is new in each row."""
    kwargs = dict(given)
    ids, mask, embeds = (kwargs.get(name) for name in ("input_ids", "attention_mask", "inputs_embeds"))
    whole = ids if embeds is None else embeds
    if not isinstance(whole, Tensor) or not isinstance(mask, Tensor) or mask.shape != whole.shape[:2]:
        return kwargs
    if mask.shape[1] <= past or bool(mask[:, -1].all()):
        return kwargs
    for name in ("input_ids", "inputs_embeds", "attention_mask"):
        if (value := kwargs.get(name)) is not None:
            kwargs[name] = torch.cat((value[:, :past], padding_first(value[:, past:], mask[:, past:])), dim=1)
    return kwargs


def _mask_of(host: PreTrainedModel, kwargs: Mapping[str, Any], ids: Tensor) -> Tensor | None:
    """Where ids given without a mask are padding, as transformers tells it; None where they have none."""
    pad, ends = (setting(host, kwargs, name) for name in ("pad_token_id", "eos_token_id"))
    ends = ends if isinstance(ends, (list, tuple)) else [ends]
    if pad is None or pad in ends or not bool((ids == pad).any()):
        return None
    return (ids != pad).long()


def uncompiled(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with generate's own torch.compile off: with a static cache on a GPU it would stop at every hook."""
    config = kwargs.get("generation_config")
    if config is None:
        return {"disable_compile": True, **kwargs}
    config = copy.deepcopy(config)  # beside a configuration of its own, generate takes no settings
    config.disable_compile = True
    return {**kwargs, "generation_config": config}


def read_ahead(
    base: Any, host: Any, plugin: CompressionPlugin | None, given: Mapping[str, Any], *, forked: bool = False
) -> dict[str, Any]:
    """Read all of the prompt but its last token where that needs several passes; returns the arguments to go on.

    `forked`: the cache is a context's, of one row or of one per prompt.
    """
    chunk, kwargs = setting(host, given, "prefill_chunk_size"), _without(host, given, "prefill_chunk_size")
    embeds: Any = kwargs.get("inputs_embeds")
    ids: Any = kwargs.get("input_ids") if embeds is None else embeds
    mask: Any = kwargs.get("attention_mask")
    name = cache_argument(host)
    cache: Any = kwargs.get(name)
    past = cache.get_seq_length() if cache is not None else 0
    repeats = max(setting(host, kwargs, name) or 1 for name in ("num_beams", "num_return_sequences"))
    if chunk is not None or (forked and slides(cache) and not bool(mask[:, past:].all())):
        _refuse(ids, mask, past, repeats if past and not forked else 1, setting(host, kwargs, "use_cache"))
        if cache is None:
            kwargs = with_own_cache(host, kwargs)
            cache = kwargs[name] = DynamicCache(config=host.config)
        mask = ids.new_ones(ids.shape[:2], dtype=torch.long) if mask is None else mask
        kwargs = _of_any_pass(kwargs, mask)
        if read(base, plugin, cache, ids[:, past:], mask, chunk=chunk, unread=1):
            both = {
                name: kwargs[name] for name in ("input_ids", "inputs_embeds") if kwargs.get(name) is not None
            }
            kwargs |= {name: padding_first(value, mask) for name, value in both.items()}
            mask = padding_first(mask, mask)
        kwargs["attention_mask"] = mask
        forked = True
    if forked and repeats > 1:
        cache.batch_repeat_interleave(repeats)
    return kwargs


def with_own_cache(host: PreTrainedModel, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a generation that gets a dynamic cache from us, beside which transformers takes no kind of one.

    Raises:
        VariatorError: they ask for another kind.
    """
    kind = setting(host, kwargs, "cache_implementation")
    if kind not in (None, "dynamic", "dynamic_full", "hybrid"):
        raise VariatorError(
            f"cache_implementation={kind!r} does not work after a context, nor with prefill_chunk_size: their cache is "
            "dynamic; leave it out"
        )
    return _without(host, kwargs, "cache_implementation")


def refuse_other_adapters(kwargs: Mapping[str, Any]) -> None:
    """Raise where rows are to be read by adapters that another pass, which reads what is before them, does not get."""
    if kwargs.get("adapter_names") is not None:
        raise VariatorError(
            "adapter_names choose adapters for one pass, not for what a context holds or prefill_chunk_size reads "
            "ahead: choose one with set_adapter, or give the whole prompt at once"
        )


def _of_any_pass(kwargs: Mapping[str, Any], mask: Tensor) -> dict[str, Any]:
    """The arguments of a prompt that is read in several passes, each of which counts its positions by `mask`.

    Raises:
        VariatorError: they say something else.
    """
    refuse_other_adapters(kwargs)
    positions = kwargs.get("position_ids")
    if positions is not None:
        own, counted = mask.bool(), mask.long().cumsum(1) - 1
        if positions.shape != mask.shape or not torch.equal(positions[own], counted[own]):
            raise VariatorError(
                "a prompt that is read in parts has the positions that its attention_mask says: leave out position_ids "
                "or prefill_chunk_size"
            )
    return {name: value for name, value in kwargs.items() if name != "position_ids"}


def _without(host: PreTrainedModel, given: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The arguments without a setting, whoever made it."""
    kwargs = {other: value for other, value in given.items() if other != name}
    if getattr(kwargs.get("generation_config"), name, None) is not None:
        kwargs["generation_config"] = copy.deepcopy(kwargs["generation_config"])
        setattr(kwargs["generation_config"], name, None)
    if getattr(host.generation_config, name, None) is not None:
        kwargs[name] = None  # a configuration's None would be filled in with it
    return kwargs


def _refuse(ids: Tensor | None, mask: Tensor | None, past: int, repeats: int, use_cache: bool | None) -> None:
    if ids is None:
        raise VariatorError("prefill_chunk_size needs input_ids or inputs_embeds")
    if use_cache is False:
        raise VariatorError("prefill_chunk_size needs a cache: leave out use_cache=False")
    if repeats > 1 or ids.shape[1] <= past or (mask is not None and mask.shape != ids.shape[:2]):
        raise VariatorError(
            "prefill_chunk_size after a cache needs the whole sequence as input_ids, an attention_mask of "
            "its shape, and one beam"
        )
