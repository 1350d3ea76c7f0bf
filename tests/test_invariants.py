"""What must always hold, on tiny random models of every architecture."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from conftest import make_decoder, make_variator, pad, prompts, randomise

from llm_variator import VariatorConfig, VariatorModel
from llm_variator.engine.hooks import ffn

CONFIGS = {
    "ffn": VariatorConfig(k=2, sites=("ffn",), r=5),
    "kv": VariatorConfig(k=2, sites=("kv",), r=5),
    "ffn+kv": VariatorConfig(k={"ffn": 4, "kv": 3}, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=3),
    "attention": VariatorConfig(k=3, sites=("attention",), r=5, dense_head=1, dense_tail=2),
    "ffn+attention": VariatorConfig(k=2, sites=("ffn", "attention"), r=5, activation="tanh"),
    "paper": VariatorConfig.paper(4, r=5),
    "per layer": VariatorConfig(
        k=2, sites=("ffn", "kv"), r=5, k_per_layer={"ffn": (1, 2, 5), "kv": (3, 1, 2)}
    ),
}


@pytest.fixture(params=CONFIGS)
def config(request) -> VariatorConfig:
    return CONFIGS[request.param]


# The base model is untouched.


def test_plugin_off_is_bit_identical(decoder, config):
    base = make_decoder(decoder)
    state = copy.deepcopy(base.state_dict())
    batch = pad(prompts(9, 20, 31), "left")
    expected = base(**batch).logits
    sequence = base.generate(**batch, max_new_tokens=8, do_sample=False)
    model = VariatorModel(base, config)
    randomise(model.plugin())
    assert not torch.equal(model(**batch).logits, expected)
    with model.disable_plugin():
        assert torch.equal(model(**batch).logits, expected)
        assert torch.equal(model.generate(**batch, max_new_tokens=8, do_sample=False), sequence)
    model.set_plugin(None)
    assert torch.equal(model(**batch).logits, expected)
    base = model.unload()
    assert torch.equal(base(**batch).logits, expected)
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


# Groups of one, merged by mean and copied back, are the dense model.


@pytest.mark.parametrize("sites", [("ffn", "kv"), ("ffn", "attention")])
def test_identity_plugin_is_dense(decoder, sites):
    base = make_decoder(decoder)
    batch = pad(prompts(12, 25), "left")
    expected, sequence = base(**batch).logits, base.generate(**batch, max_new_tokens=16, do_sample=False)
    model = VariatorModel(base, VariatorConfig(k=1, sites=sites, compressor="mean", decompressor="copy"))
    logits = model(**batch).logits
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], atol=1e-4, rtol=0)
    assert torch.equal(model.generate(**batch, max_new_tokens=16, do_sample=False), sequence)


# The whole computation against the plain form, in fp64.


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_equal_the_plain_form(decoder, config, implementation):
    model = make_variator(decoder, config, attn_implementation=implementation).double()
    (ids,) = prompts(29)
    for prompt in (29, 21):
        with torch.no_grad():
            expected = reference.logits(model.base, model.plugin(), ids, prompt)
            actual = model(ids, prompt_length=prompt).logits[0]
        # the eager attention of transformers takes its softmax in fp32
        torch.testing.assert_close(actual, expected, atol=1e-5 if implementation == "eager" else 1e-9, rtol=0)


def test_rows_of_zeros_behind_the_entries_change_nothing(monkeypatch):
    monkeypatch.setattr(ffn, "_WORTH_FILLING", 1)
    model = make_variator("llama", VariatorConfig(k=2, sites=("ffn", "kv"), r=5))
    rows = []
    for block in model.base.model.layers:
        for module in (block.mlp.up_proj, block.self_attn.k_proj):
            module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[-2:-1]))
    (ids,) = prompts(29)
    model.half()
    with torch.no_grad():
        actual = model(ids).logits[0].double()
        filled = set(rows)
        model.double()
        expected = reference.logits(model.base, model.plugin(), ids, 29)
    assert filled == {(24,)}  # 23 entries
    torch.testing.assert_close(actual, expected, atol=0.02, rtol=0.02)


# Information flows forward only, except within a group.


def test_no_token_moves_what_comes_before_its_group(decoder, config):
    model = make_variator(decoder, config)
    (ids,) = prompts(40)
    resolved, prompt = model.plugin().config, 33
    changed = ids.repeat(40, 1)
    changed[torch.arange(40), torch.arange(40)] = (
        ids[0] - 2
    ) % 90 + 3  # another token than before, in each row
    with torch.no_grad():
        before = model(ids.repeat(40, 1), prompt_length=prompt).logits
        after = model(changed, prompt_length=prompt).logits
    ratios = {k for site in config.sites for i in range(3) if (k := resolved.ratio(site, i))}
    for j in range(40):
        start = min(
            entry.positions[0]
            for k in ratios
            for entry in reference.entries(40, prompt, k, resolved.dense_head, resolved.dense_tail)
            if j in entry.positions
        )
        # layers of different ratio chain their groups: go back until no group of any ratio straddles `start`
        moved = True
        while moved:
            moved = False
            for k in ratios:
                for entry in reference.entries(40, prompt, k, resolved.dense_head, resolved.dense_tail):
                    if entry.positions[0] < start <= entry.positions[-1]:
                        start, moved = entry.positions[0], True
        assert torch.equal(after[j, :start], before[j, :start]), j
        assert not torch.equal(after[j, j], before[j, j]), j


# Decoding is intact.


@pytest.mark.parametrize("length", [3, 9, 24])
def test_stepwise_equals_teacher_forced(decoder, config, length):
    model = make_variator(decoder, config)
    (ids,) = prompts(length)
    out = model.generate(
        input_ids=ids, max_new_tokens=12, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    forced = model(out.sequences, prompt_length=length).logits[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), forced, atol=1e-4, rtol=0)


# Padding never changes a result.


def test_padding_never_changes_a_result(decoder, config):
    model = make_variator(decoder, config)
    rows = prompts(1, 3, 7, 12, 18, 23, 30, 41)
    alone = [
        model.generate(input_ids=row, max_new_tokens=8, do_sample=False)[0, row.shape[1] :] for row in rows
    ]
    for side in ("left", "right"):
        batch = pad(rows, side)
        together = model.generate(**batch, max_new_tokens=8, do_sample=False)
        assert torch.equal(together[:, -8:], torch.stack(alone)), side
        logits = model(**batch).logits
        for i, row in enumerate(rows):
            real = batch["attention_mask"][i].bool()
            torch.testing.assert_close(logits[i, real], model(row).logits[0], atol=1e-4, rtol=0)


def test_prompt_length_may_differ_by_row(decoder, config):
    model = make_variator(decoder, config)
    rows, lengths = prompts(30, 30, 22), torch.tensor([30, 11, 17])
    batch = pad(rows, "right")
    together = model(**batch, prompt_length=lengths).logits
    for i, row in enumerate(rows):
        alone = model(row, prompt_length=int(lengths[i])).logits[0]
        torch.testing.assert_close(together[i, : row.shape[1]], alone, atol=1e-4, rtol=0)


# The cache holds entries, not tokens.


@pytest.mark.parametrize("site", ["kv", "attention"])
@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_cache_holds_exactly_the_entries(site, k):
    base = make_decoder("llama", num_hidden_layers=1)
    for head in (0, 4):
        for tail in (1, 16):
            model = VariatorModel(
                base, VariatorConfig(k=k, sites=(site,), r=2, dense_head=head, dense_tail=tail)
            )
            for n in range(1, 301):
                (ids,) = prompts(n)
                cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
                groups = max(0, (n - head - tail) // k)
                layer = cache.layers[0]
                assert layer.keys.shape[-2] == layer.values.shape[-2] == groups + (n - groups * k), n
                assert layer.keys.untyped_storage().nbytes() == layer.keys.numel() * layer.keys.element_size()
                assert cache.get_seq_length() == n
            base = model.unload()


# The base is frozen.


def test_only_the_plugin_is_trained(decoder, config):
    model = make_variator(decoder, config)
    plugin = dict(model.plugin().named_parameters())
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in plugin.values()}
    (ids,) = prompts(40)
    model.train()
    model(ids, prompt_length=32).logits.square().mean().backward()
    assert all(parameter.grad is None for parameter in model.base.parameters())
    for name, parameter in plugin.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name.endswith("compressor.bias"), name
