"""The arithmetic against torch's own counter on running models, and against counting by hand."""

from __future__ import annotations

import dataclasses
import json

import pytest
import reference
import torch
from conftest import make_decoder, make_variator, prompts
from torch.utils.flop_counter import FlopCounterMode

from llm_variator import VariatorConfig, VariatorError
from llm_variator.config import BaseSignature
from llm_variator.flops import Stack, main, prefill

CONFIGS = {
    "ffn": VariatorConfig(k=2, sites=("ffn",), r=5),
    "ffn+kv": VariatorConfig(k={"ffn": 4, "kv": 3}, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=3),
    "attention": VariatorConfig(k=3, sites=("ffn", "attention"), r=5),
    "bare": VariatorConfig(k=2, sites=("ffn", "kv"), compressor="mean", decompressor="copy"),
    "per layer": VariatorConfig(
        k=2, sites=("ffn", "kv"), r=5, k_per_layer={"ffn": (1, 2, 5), "kv": (3, 1, 2)}
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_arithmetic_equals_what_torch_counts(decoder, name):
    model = make_variator(decoder, CONFIGS[name], attn_implementation="eager")
    (ids,) = prompts(61)
    stack = Stack.of(model.config)
    for plugin in (None, "default"):
        with model.use_plugin(plugin), FlopCounterMode(display=False) as counter, torch.no_grad():
            cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        cost = prefill(stack, 61, model.plugins[plugin] if plugin else None, causal=False)
        # some releases of transformers compute the angles of RoPE with a small product
        assert cost.total <= counter.get_total_flops() <= 1.01 * cost.total
        if decoder != "gemma3":  # stock sliding layers drop one token more than the window shows
            assert cost.cache_entries == sum(layer.keys.shape[-2] for layer in cache.layers)


@pytest.mark.parametrize("name", ["ffn+kv", "attention"])
def test_causal_scores_equal_counting_pairs(name):
    config = CONFIGS[name].resolved(BaseSignature("", "llama", 32, 3), decoder=True)
    stack = Stack.of(make_decoder("llama").config)
    for n in (1, 9, 40):
        whole = "attention" in config.sites
        entries = reference.entries(
            n, n, config.ratio("attention" if whole else "kv", 0), config.dense_head, config.dense_tail
        )
        last = {i: e.positions[-1] for e in entries for i in e.positions}
        queries = [e.positions[-1] for e in entries] if whole else range(n)
        pairs = sum(e.positions[-1] <= last[q] for q in queries for e in entries)
        assert prefill(stack, n, config).scores == 3 * 4 * stack.attention_width * pairs
        assert prefill(stack, n).scores == 3 * 4 * stack.attention_width * n * (n + 1) // 2


def test_sliding_windows_bound_the_scores():
    stack = dataclasses.replace(Stack.of(make_decoder("llama").config), layers=1, windows=(4,))
    pairs = sum(min(i + 1, 4) for i in range(10))
    assert prefill(stack, 10).scores == 4 * stack.attention_width * pairs


def test_the_command_prints_and_stores(tmp_path, capsys):
    flags = ["--model", "llama-7b", "--k", "2", "--sites", "ffn,kv", "--tokens", "2048"]
    main([*flags, "--json", str(tmp_path / "f.json")])
    assert "0.584" in capsys.readouterr().out
    figures = json.loads((tmp_path / "f.json").read_text())["figures"]["prompts"]["2048"]
    assert figures["dense"]["ffn"] == 2 * 3 * 4096 * 11008 * 2048 * 32
    assert figures["dense"]["cache_entries"] == 32 * 2048
    assert figures["plugin"]["cache_entries"] == 32 * (2048 - (2048 - 4 - 1) // 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "t5-base", "--k", "4"], "decoders built like LLaMA"),
        (["--model", "llama-7b", "--k", "2", "--plugin", "nowhere"], "leave out --k"),
        (["--model", "llama-7b", "--layers", "40"], "has 32 layers"),
    ],
)
def test_bad_input(flags, message):
    with pytest.raises(VariatorError, match=message):
        main(flags)
