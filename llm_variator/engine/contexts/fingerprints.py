"""Short hashes that tell models, plugins and tokenizers apart."""

from __future__ import annotations

import hashlib
import json
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llm_variator.engine.plugin import CompressionPlugin

_known: WeakKeyDictionary[CompressionPlugin, tuple[Any, str]] = WeakKeyDictionary()

SAMPLED_VALUES = 64  # of each of a model's tensors: enough to notice any fine-tuning, cheap for any size


def model_fingerprint(base: nn.Module) -> str:
    """Of a model's tensors: names, shapes, dtypes and evenly spread values. Adapters in it count."""
    digest = hashlib.sha256()
    for name, value in sorted(base.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        flat = value.detach().flatten()
        digest.update(_bytes(flat[:: max(1, flat.numel() // SAMPLED_VALUES)].cpu()))
    return digest.hexdigest()[:32]


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
