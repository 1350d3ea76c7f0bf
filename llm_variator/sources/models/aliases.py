"""Short names of models: each one's hub id and its literal shape, known without any network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class ModelAlias:
    """A short name's hub id and literal shape.

    Attributes:
        hub_id: where the pretrained weights live.
        config: keyword arguments of the transformers configuration, `model_type` included.
        dtype: dtype of a randomly initialised model when none is asked for.
    """

    hub_id: str
    config: Mapping[str, Any]
    dtype: torch.dtype = torch.float32


def _llama(hub_id: str, **shape: Any) -> ModelAlias:
    config = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=32000, rms_norm_eps=1e-6)
    config |= dict(max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return ModelAlias(hub_id, config | shape, torch.bfloat16)


def _t5(hub_id: str, dtype: torch.dtype = torch.float32, **shape: Any) -> ModelAlias:
    config: dict[str, Any] = dict(model_type="t5", architectures=["T5ForConditionalGeneration"])
    config |= dict(vocab_size=32128, d_kv=64)
    config |= dict(feed_forward_proj="relu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    return ModelAlias(hub_id, config | shape, dtype)


ALIASES: dict[str, ModelAlias] = {
    "llama-7b": _llama(
        "huggyllama/llama-7b",
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "llama-13b": _llama(
        "huggyllama/llama-13b",
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
    ),
    "llama-3.1-8b": _llama(
        "meta-llama/Llama-3.1-8B",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=128000,
        eos_token_id=128001,
        pad_token_id=None,
    ),
    "t5-base": _t5("google-t5/t5-base", d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "t5-large": _t5("google-t5/t5-large", d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
    "t5-3b": _t5(
        "google-t5/t5-3b", torch.bfloat16, d_model=1024, d_ff=16384, num_layers=24, num_heads=32, d_kv=128
    ),
    "t5-11b": _t5(
        "google-t5/t5-11b", torch.bfloat16, d_model=1024, d_ff=65536, num_layers=24, num_heads=128, d_kv=128
    ),
    "bert-base": ModelAlias(
        "google-bert/bert-base-uncased",
        dict(
            model_type="bert",
            architectures=["BertForMaskedLM"],
            vocab_size=30522,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            max_position_embeddings=512,
        ),
    ),
    "smollm2-135m": ModelAlias(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        dict(
            model_type="llama",
            architectures=["LlamaForCausalLM"],
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=2,
        ),
    ),
    # Shapes for trying a recipe in seconds, with random weights and a byte-level tokenizer.
    "tiny-t5": _t5(
        "tiny-t5",
        num_layers=2,
        num_heads=2,
        d_model=32,
        d_ff=64,
        d_kv=16,
        vocab_size=384,
        eos_token_id=2,
        tie_word_embeddings=False,
    ),
    "tiny-bert": ModelAlias(
        "tiny-bert",
        dict(
            model_type="bert",
            architectures=["BertForMaskedLM"],
            vocab_size=384,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=1024,
        ),
    ),
    "tiny-llama": ModelAlias(
        "tiny-llama",
        dict(
            model_type="llama",
            architectures=["LlamaForCausalLM"],
            vocab_size=384,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        ),
    ),
}
