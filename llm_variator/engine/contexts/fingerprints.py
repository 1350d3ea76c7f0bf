"""Short hashes that tell models, plugins and tokenizers apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llm_variator.engine.plugin import CompressionPlugin
from llm_variator.errors import VariatorError

_known: WeakKeyDictionary[nn.Module, tuple[Any, str]] = (
    WeakKeyDictionary()
)  # with the state it was computed in

WEIGHTS = "weights"
"""Of `function_state`: what means nothing in another process, where `model_fingerprint` takes its place."""

# Settings of a model's configuration that do not enter its forward pass.
_IDLE = {
    "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id", "dtype",
    "eos_token_id", "id2label", "is_encoder_decoder", "label2id", "output_attentions", "output_hidden_states",
    "pad_token_id", "problem_type", "quantization_config", "return_dict", "tie_word_embeddings", "transformers_version",
    "use_cache",
}  # fmt: skip


def model_fingerprint(base: nn.Module) -> str:
    """Of all bytes of a model's tensors, with names, shapes and dtypes; computed anew only after they changed.

    A change through `tensor.data`, which torch does not count, goes unnoticed until the model is loaded again.
    """
    values = dict(_tensors(base))
    counted = [(name, value) for name, value in values.items() if not value.is_inference()]
    state = tuple((name, value.data_ptr(), value._version) for name, value in counted)
    known = _known.get(base)
    if known is None or known[0] != state or len(state) != len(values):
        digest = hashlib.sha256()
        for name, value in sorted(values.items()):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(_bytes(value.detach().cpu()))
        known = _known[base] = state, digest.hexdigest()[:32]
    return known[1]


def _tensors(base: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors that a model saves, those on disk too: accelerate's offloading leaves none of them in the module."""
    offloaded = {name: module for name, module in base.named_modules() if hasattr(module, "_hf_hook")}
    for name, value in base.state_dict().items():
        owner, _, own = name.rpartition(".")
        if value.is_meta and owner in offloaded:
            hook: Any = offloaded[owner]._hf_hook
            maps = [getattr(one, "weights_map", None) for one in getattr(hook, "hooks", (hook,))]
            value = next(weights[own] for weights in maps if weights is not None)
        yield name, value


def function_state(base: Any) -> dict[str, str]:
    """What decides the function that a model computes: adapters in use, settings, and in this process its weights."""
    adapters = []
    for name, module in base.named_modules():
        if isinstance(getattr(module, "disable_adapters", None), bool):  # a layer of PEFT's
            used = [] if module.disable_adapters else list(module.active_adapters)
            scaling = module.__dict__.get("scaling")  # of LoRA and its like
            scales = {one: scaling.get(one) if isinstance(scaling, dict) else None for one in used}
            adapters.append([name, scales, sorted(map(str, getattr(module, "merged_adapters", ())))])
    config = {name: value for name, value in base.config.to_dict().items() if name not in _IDLE}
    # not where they lie, so that a model may move; a parameter on disk (meta) is another object after every pass
    weights = [(id(p), 0 if p.is_inference() else p._version) for p in base.parameters() if not p.is_meta]
    return {
        "adapters": _digest(adapters),
        "settings": _digest(config),
        "number format": str(base.dtype),
        WEIGHTS: _digest(weights),
    }


def check_function(base: Any, made: Mapping[str, str], what: str) -> None:
    """Raise unless `base` computes the function of the `function_state` that `made` is."""
    differs = [name for name, now in function_state(base).items() if made.get(name, now) != now]
    if differs:
        raise VariatorError(
            f"{what} was made with other {' and '.join(differs)} of the base model: set them as they were, or compress "
            "it again"
        )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def plugin_fingerprint(plugin: CompressionPlugin) -> str:
    """Of a plugin's settings and all its weights; computed anew only after they changed."""
    weights = plugin.state_dict().values()
    if any(value.is_inference() for value in weights):  # made in inference mode: they count no changes
        return _plugin_fingerprint(plugin)
    state = tuple((value.data_ptr(), value._version) for value in weights)
    known = _known.get(plugin)
    if known is None or known[0] != state:
        known = _known[plugin] = state, _plugin_fingerprint(plugin)
    return known[1]


def _plugin_fingerprint(plugin: CompressionPlugin) -> str:
    settings = plugin.config.to_dict()
    settings.pop("base")
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name, value in sorted(plugin.state_dict().items()):
        digest.update(f"{name} {value.dtype}".encode())
        digest.update(_bytes(value.detach().cpu()))
    return digest.hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Of a tokenizer's vocabulary, merges, special tokens and chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    inner = json.loads(backend.to_str()) if backend is not None else {"vocabulary": tokenizer.get_vocab()}
    for passing in ("padding", "truncation"):  # what the last call asked for
        inner.pop(passing, None)
    parts = [inner, tokenizer.special_tokens_map, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().view(torch.uint8).numpy().tobytes() if value.numel() else b""
