"""The real vLLM engine on tiny models against the Hugging Face path. Runs in its own environment: `make test-vllm`."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm.v1", reason="vllm is not installed here: make test-vllm")

from engine import BOTH, FFN, Engine, expected, make_model, make_plugin, reference_model

LENGTHS = (1, 3, 9, 33, 64, 117, 250, 700)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def ffn(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ffn")
    return {f"k{k}": make_plugin(model, folder / f"k{k}", k, **FFN) for k in (2, 4)}


@pytest.fixture(scope="module")
def both(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("both")
    return {f"k{k}": make_plugin(model, folder / f"k{k}", k, **BOTH) for k in (2, 4)}


def random_prompts(*lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 211, (n,), generator=generator).tolist() for n in lengths]


def test_ffn_mixed_batch(model, ffn):
    prompts, ks = random_prompts(*LENGTHS), [2, 4, 0, 2, 4, 0, 4, 2]
    wanted = expected(reference_model(model, ffn), prompts, ks, 24)
    with Engine(model, ffn) as engine:
        assert engine.tokens(prompts, ks, 24) == wanted


def test_kv_mixed_batch(model, both):
    prompts, ks = random_prompts(*LENGTHS), [2, 4, 0, 2, 4, 0, 4, 2]
    wanted = expected(reference_model(model, both), prompts, ks, 24)
    with Engine(model, both) as engine:
        free = engine.free_blocks
        assert engine.tokens(prompts, ks, 24) == wanted
        assert engine.free_blocks == free
