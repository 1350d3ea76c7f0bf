"""Files of compressed contexts: one safetensors file whose header says in JSON what it belongs to.

One file, because two cannot be replaced at once.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from llm_variator.engine.cache import CompressedLayer, SelectedLayer
from llm_variator.engine.cache.paging import KVPool, PagedStore
from llm_variator.engine.cache.quantised import Quantised, dense
from llm_variator.engine.cache.recent import Recent
from llm_variator.engine.cache.selected import HeadClass
from llm_variator.engine.cache.stores import KVStore, Part, SharedStore, whole
from llm_variator.engine.contexts.fingerprints import (
    WEIGHTS,
    check_function,
    function_state,
    model_fingerprint,
    plugin_fingerprint,
    tokenizer_fingerprint,
)
from llm_variator.engine.contexts.host import Host
from llm_variator.engine.contexts.inputs import Chat, chats, template_options
from llm_variator.engine.devices import input_device
from llm_variator.engine.files import write_atomically
from llm_variator.engine.plan import kv_heads
from llm_variator.engine.session import answered, ends_before_last_token
from llm_variator.errors import VariatorError

FORMAT = "llm_variator.context"
FORMAT_VERSION = 4
_QUANTISED = ("codes", "scale", "low")  # tensors of a `Quantised`


class Kept(Protocol):
    """What a file keeps of a `CompressedContext`, under the names of its fields."""

    @property
    def model(self) -> Host: ...  # noqa: D102
    @property
    def plugin(self) -> str | None: ...  # noqa: D102
    @property
    def fingerprint(self) -> str | None: ...  # noqa: D102
    @property
    def function(self) -> Mapping[str, str]: ...  # noqa: D102
    @property
    def input_ids(self) -> Tensor: ...  # noqa: D102
    @property
    def attention_mask(self) -> Tensor: ...  # noqa: D102
    @property
    def cache(self) -> Cache: ...  # noqa: D102
    @property
    def tokenizer(self) -> Any: ...  # noqa: D102
    @property
    def messages(self) -> list[Chat] | None: ...  # noqa: D102
    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]: ...  # noqa: D102


def save(context: Kept, path: Path) -> None:
    """Write `context` to `path`, whole or not at all."""
    check_function(context.model.base, context.function, "the context")
    tensors = {"input_ids": context.input_ids, "attention_mask": context.attention_mask}
    layers: list[dict[str, Any]] = []
    for index, layer in enumerate(context.cache.layers):
        assert isinstance(layer, DynamicLayer)
        facts: dict[str, Any] = {"tokens": layer.get_seq_length()}
        if isinstance(layer, SelectedLayer):
            assert layer.open is None, "a prompt is read to its end before a context has its cache"
            if layer.window is not None:
                raise VariatorError(
                    "a context whose newest tokens are to be reduced (decode_block) cannot be saved: compress it with "
                    "the plugin loaded without decode_block"
                )
            facts |= {"has_fillers": layer.has_fillers, "classes": []}
            for number, one in enumerate(layer.classes):
                own = {"heads": one.heads, "k": one.k}
                facts["classes"].append(own)
                tensors[f"{index}.{number}.columns"] = layer.columns(one)
                _put(tensors, f"{index}.{number}", own, *_stored(one.store))
        elif isinstance(layer, CompressedLayer):
            tensors[f"{index}.columns"] = layer.columns
            facts["has_fillers"] = layer.has_fillers
            _put(tensors, str(index), facts, *_stored(layer.store))
            if layer.recent is not None:
                parts = (layer.recent.hidden, *layer.recent.position)
                tensors |= {f"{index}.recent.{i}": part for i, part in enumerate(parts)}
                facts["recent"] = len(parts)
        else:
            _put(tensors, str(index), facts, *whole(layer))
        layers.append(facts)
    # safetensors refuses tensors that share memory, as those of several layers may
    stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    stored = {name: value.clone() if ".recent." in name else value for name, value in stored.items()}
    facts = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "belongs_to": _owners(context),
        "ends_before_last_token": ends_before_last_token(context.cache),
        "messages": context.messages,
        "chat_template_kwargs": dict(context.chat_template_kwargs),
        "layers": layers,
        "tensors": {name: [*_form(value), _checksum(value)] for name, value in stored.items()},
    }
    text = json.dumps(facts)
    header = {"context": text, "checksum": str(zlib.crc32(text.encode()))}
    write_atomically(path, lambda file: save_file(stored, file, metadata=header))


def load(path: Path, model: Host, tokenizer: Any, *, pool: KVPool | None, verify: bool) -> dict[str, Any]:
    """The fields of the `CompressedContext` in `path`; errors as in its `load`."""
    if not path.is_file():
        raise VariatorError(f"{path} not found: save a context there first")
    try:
        with safe_open(path, framework="pt") as opened:
            header = opened.metadata() or {}
            text = header.get("context", "null")
            if "checksum" in header and header["checksum"] != str(zlib.crc32(text.encode())):
                raise VariatorError(f"{path} is damaged (its header); save the context again")
            facts = json.loads(text) if "checksum" in header else None
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    except VariatorError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise VariatorError(
            f"{path} is not a whole safetensors file ({error}); save the context again"
        ) from None
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise VariatorError(
            f"{path} is a safetensors file, but no compressed context; name one that save() wrote"
        )
    if facts.get("format_version") != FORMAT_VERSION:
        raise VariatorError(
            f"{path}: format_version {facts.get('format_version')} is not supported, this version of llm_variator "
            f"reads {FORMAT_VERSION}; compress the context again"
        )
    try:
        return _fields(path, facts, tensors, model, tokenizer, pool=pool, verify=verify)
    except VariatorError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        # somebody wrote it who is not `save`
        raise VariatorError(f"{path} is damaged (its header: {error!r}); save the context again") from None


def _fields(
    path: Path,
    facts: dict[str, Any],
    tensors: dict[str, Tensor],
    model: Host,
    tokenizer: Any,
    *,
    pool: KVPool | None,
    verify: bool,
) -> dict[str, Any]:
    """What `load` returns, of a header that has the right version."""
    plugin = _owner(path, facts["belongs_to"], model, tokenizer)
    if tensors.keys() != facts["tensors"].keys():
        raise VariatorError(f"{path} lacks tensors or has surplus ones; save the context again")
    for name, value in tensors.items():
        *form, checksum = facts["tensors"][name]
        if form != _form(value) or (verify and _checksum(value) != checksum):
            raise VariatorError(f"{path} is damaged ({name}); save the context again")
    cache: Any = DynamicCache(config=model.base.config)
    _check_layers(facts, tensors["input_ids"], tensors["attention_mask"], len(cache.layers))
    for index, layer in enumerate(facts["layers"]):
        if "classes" in layer:
            cache.layers[index] = _selected(tensors, index, layer, model, pool)
            continue
        keys, values = _pair(tensors, str(index), layer, model)
        if "has_fillers" in layer:
            columns = tensors[f"{index}.columns"].to(input_device(model.base))
            if columns.shape[1] != keys.shape[2]:
                raise ValueError("columns")
            store = _store(keys, values, pool)
            held = CompressedLayer.holding(store, layer["tokens"], columns, layer["has_fillers"])
            if "recent" in layer:
                hidden, *position = (
                    tensors[f"{index}.recent.{i}"].to(input_device(model.base))
                    for i in range(layer["recent"])
                )
                held.recent = Recent(hidden, tuple(position))
            cache.layers[index] = held
        else:
            cache.layers[index].update(dense(keys), dense(values))
            cache.layers[index].cumulative_length = layer["tokens"]
    if facts["ends_before_last_token"]:
        answered(cache)
    return {
        "plugin": plugin,
        "fingerprint": (facts["belongs_to"]["plugin"] or {}).get("fingerprint"),
        "input_ids": tensors["input_ids"].to(input_device(model.base)),
        "attention_mask": tensors["attention_mask"].to(input_device(model.base)),
        "cache": cache,
        "function": function_state(model.base),
        "messages": facts["messages"],
        "chat_template_kwargs": template_options(facts.get("chat_template_kwargs")),
    }


def _selected(
    tensors: Mapping[str, Tensor], index: int, layer: Mapping[str, Any], model: Host, pool: KVPool | None
) -> SelectedLayer:
    """A layer whose heads keep keys of their own choice; raises a `ValueError` unless they are the model's."""
    classes, heads = [], kv_heads(model.base.config)
    for number, one in enumerate(layer["classes"]):
        columns = tensors[f"{index}.{number}.columns"].to(input_device(model.base))
        keys, values = _pair(tensors, f"{index}.{number}", one, model)
        own, rows = tuple(map(int, one["heads"])), len(keys)
        if not own or keys.shape[:3] != values.shape[:3] or keys.shape[1] != len(own):
            raise ValueError("keys and values of classes")
        if columns.dtype != torch.int32 or len(columns) not in (1, rows) or int(one["k"]) < 1:
            raise ValueError("columns or ratios of classes")
        classes.append(HeadClass(own, _store(keys, values, pool, heads), columns, int(one["k"])))
    held = SelectedLayer.holding(classes, layer["tokens"], layer["has_fillers"])
    if len(held.counts) != heads:
        raise ValueError("other heads than the model's")
    return held


def _check_layers(facts: Mapping[str, Any], ids: Tensor, mask: Tensor, layers: int) -> None:
    """Raise unless the header fits the tokens; the shapes of keys and values are torch's business."""
    read = {layer["tokens"] for layer in facts["layers"]}
    # what an answer ends with has not been read yet
    if len(facts["layers"]) != layers or len(read) != 1 or not read <= {ids.shape[1], ids.shape[1] - 1}:
        raise ValueError("other layers or tokens than it holds")
    if any(not isinstance(layer.get("has_fillers", False), bool) for layer in facts["layers"]):
        raise TypeError("has_fillers")
    if ids.shape != mask.shape or not (facts["messages"] is None or chats(facts["messages"])):
        raise ValueError("other rows or messages than it holds")


def _stored(store: DynamicLayer) -> Part:
    """Keys and values as they lie, or in one tensor each where they lie in several."""
    if isinstance(store, SharedStore) and len(store.parts) == 1 and not store.keys.numel():
        return store.parts[0]
    return whole(store)


def _put(
    tensors: dict[str, Tensor],
    name: str,
    facts: dict[str, Any],
    keys: Tensor | Quantised,
    values: Tensor | Quantised,
) -> None:
    """Keys and values of layer or class `name` among `tensors`, and their bits among its `facts`."""
    for side, value in (("keys", keys), ("values", values)):
        if isinstance(value, Quantised):
            facts["bits"] = value.bits
            tensors |= {f"{name}.{side}.{part}": getattr(value, part) for part in _QUANTISED}
        else:
            tensors[f"{name}.{side}"] = value


def _pair(tensors: Mapping[str, Tensor], name: str, facts: Mapping[str, Any], model: Host) -> Part:
    """What `_put` has put there."""
    device = input_device(model.base)

    def side(which: str) -> Tensor | Quantised:
        if "bits" not in facts:
            return tensors[f"{name}.{which}"].to(device)
        parts = {part: tensors[f"{name}.{which}.{part}"].to(device) for part in _QUANTISED}
        return Quantised(**parts, bits=facts["bits"], dtype=model.base.dtype)

    return side("keys"), side("values")


def _store(keys: Tensor | Quantised, values: Tensor | Quantised, pool: KVPool | None, of: int = 0) -> KVStore:
    """A store of them where they lie, or in `pool`; `of` so many KV heads in all."""
    if pool is None:
        return SharedStore(((keys, values),))
    return PagedStore(pool, of=of).like(dense(keys), dense(values))


def _owners(context: Kept) -> dict[str, Any]:
    """What the entries depend on."""
    model, tokenizer = context.model, context.tokenizer
    return {
        "base": {
            "name": model.signature.name,
            "dtype": str(model.base.dtype),
            "fingerprint": model_fingerprint(model.base),
            "function": {name: value for name, value in context.function.items() if name != WEIGHTS},
        },
        "plugin": None
        if context.plugin is None
        else {"name": context.plugin, "fingerprint": context.fingerprint},
        "tokenizer": None if tokenizer is None else tokenizer_fingerprint(tokenizer),
    }


def _owner(path: Path, made: Mapping[str, Any], model: Host, tokenizer: Any) -> str | None:
    """Name of the context's plugin in `model`; raises where the two do not belong together."""
    base, name = made["base"], model.signature.name
    if base["dtype"] != str(model.base.dtype):
        raise VariatorError(
            f"{path} was made in {base['dtype']}, the model is {model.base.dtype}: load the model in that dtype"
        )
    if base["fingerprint"] != model_fingerprint(model.base):
        raise VariatorError(
            f"{path} was made with {base['name']!r}, this model ({name!r}) has other weights: compress the "
            "context again, or load the model it was made with"
        )
    check_function(model.base, base["function"], str(path))
    if tokenizer is not None and made["tokenizer"] not in (None, tokenizer_fingerprint(tokenizer)):
        raise VariatorError(
            f"{path} was made with another tokenizer: load the one that belongs to {base['name']!r}"
        )
    if made["plugin"] is None:
        return None
    for own in model.plugins:
        if plugin_fingerprint(model.plugin(own)) == made["plugin"]["fingerprint"]:
            return own
    raise VariatorError(
        f"{path} was made with the plugin {made['plugin']['name']!r}, which this model has not loaded or has with "
        f"other weights or settings (loaded: {', '.join(model.plugins) or 'none'}); load it, or compress again"
    )


def _form(value: Tensor) -> list[Any]:
    """What a damaged header could change without changing a byte of the values."""
    return [str(value.dtype), [*value.shape]]


def _checksum(value: Tensor) -> int:
    return zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
