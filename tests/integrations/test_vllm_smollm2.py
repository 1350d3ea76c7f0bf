"""Real SmolLM2 in vLLM, token for token against `VariatorModel.generate`. Minutes; `make test-vllm`."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("vllm.v1", reason="vllm is not installed here: make test-vllm")

from vllm_engine import BOTH, FFN, Engine, expected, make_plugin, reference_model

LENGTHS = (1, 5, 70, 200, 333, 512, 1024, 1700)
NEW = 26  # 8 prompts: 208 tokens
KS = [2, 4, 0, 4, 2, 4, 2, 4]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prompts(smollm2):
    text = (Path(__file__).parents[2] / "examples" / "long_prompt.txt").read_text(encoding="utf-8")
    ids = smollm2[1](text)["input_ids"]
    while len(ids) < max(LENGTHS) + 50 * len(LENGTHS):
        ids = ids + ids
    return [ids[50 * i : 50 * i + n] for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def ffn(smollm2, tmp_path_factory):
    """Random plugins; the first layer stays dense, as in every plugin worth serving."""
    folder = tmp_path_factory.mktemp("ffn")
    settings = {k: FFN | dict(k_per_layer={"ffn": [1] + [k] * 29}) for k in (2, 4)}
    return {f"k{k}": make_plugin("smollm2-135m", folder / f"k{k}", k, **settings[k]) for k in (2, 4)}


@pytest.fixture(scope="module")
def both(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kv")
    return {f"k{k}": make_plugin("smollm2-135m", folder / f"k{k}", k, **BOTH) for k in (2, 4)}


def check(plugins, prompts, orders, **options):
    wanted = expected(reference_model("smollm2-135m", plugins), prompts, KS, NEW)
    assert sum(map(len, wanted)) >= 200
    with Engine("smollm2-135m", plugins, max_num_batched_tokens=256, **options) as engine:
        for order in orders:
            found = engine.tokens([prompts[i] for i in order], [KS[i] for i in order], NEW)
            assert found == [wanted[i] for i in order]


ORDER = [3, 7, 0, 5, 1, 6, 2, 4]


def test_ffn(ffn, prompts):
    """The second time in another order, with every prefix cached."""
    check(ffn, prompts, [range(8), ORDER], max_model_len=1800, num_gpu_blocks_override=140)


def test_ffn_and_kv(both, prompts):
    check(both, prompts, [range(8), ORDER], max_model_len=1800, num_gpu_blocks_override=60)


def test_kept_keys(prompts, tmp_path):
    """The shipped plugin that keeps keys, whose tail is longer than a block, beside a random one that merges."""
    k4 = make_plugin("smollm2-135m", tmp_path / "k4", 4, **BOTH)
    plugins = {"k2": "smollm2-135m/kv4", "k4": k4}
    check(plugins, prompts, [range(8), ORDER], max_model_len=1800, num_gpu_blocks_override=1500)


def test_ratios_by_layer(prompts, tmp_path):
    """A shipped plugin with FFNs at 1 and 16, and a random one that compresses every other KV cache."""
    layers = {"ffn": [1, 2, 8] * 10, "kv": [1, 4] * 15}
    k4 = make_plugin("smollm2-135m", tmp_path / "k4", 4, **BOTH | {"k_per_layer": layers})
    plugins = {"k2": "smollm2-135m/k2-ffn", "k4": k4}
    check(plugins, prompts, [ORDER], max_model_len=1800, num_gpu_blocks_override=160)


def test_dense_requests_equal_stock_vllm(ffn, prompts):
    options = dict(max_num_batched_tokens=256, max_model_len=1800, num_gpu_blocks_override=140)
    found = []
    for plugins, ks in ((None, [None] * 8), ({}, [0, 1] * 4), (ffn, [0, 1] * 4)):
        with Engine("smollm2-135m", plugins, **options) as engine:
            outputs = engine.outputs(prompts, ks, 8, logprobs=5)
            found.append([(out.outputs[0].token_ids, out.outputs[0].logprobs) for out in outputs])
    stock, *ours = found
    assert ours == [stock, stock]
