"""The last layer leaves out what nobody reads: same results as the plain form, fewer rows."""

from __future__ import annotations

import pytest
import reference
import torch
from conftest import make_variator, pad, prompts
from transformers import DynamicCache

from llm_variator import VariatorConfig
from llm_variator.measures.operations import Stack, prefill

CONFIGS = {
    "ffn": VariatorConfig(k=2, sites=("ffn",), r=5),
    "ffn+kv": VariatorConfig(k={"ffn": 4, "kv": 3}, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=3),
    "attention": VariatorConfig(k=3, sites=("attention",), r=5, dense_head=1, dense_tail=2),
    "last layer dense": VariatorConfig(
        k=2, sites=("ffn", "kv"), r=5, k_per_layer={"ffn": (2, 2, 1), "kv": (2, 2, 1)}
    ),
}
BOTH = CONFIGS["ffn+kv"]
SLIDING_LAST = dict(layer_types=["full_attention", "full_attention", "sliding_attention"])
PARTS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")


@pytest.fixture(params=CONFIGS)
def config(request) -> VariatorConfig:
    return CONFIGS[request.param]


def rows_of(model, call) -> dict[str, list[int]]:
    """Rows that each projection of each layer gets during `call`."""
    rows: dict[str, list[int]] = {part: [] for part in PARTS}
    handles = [
        layer.get_submodule(part).register_forward_hook(
            lambda module, args, output, part=part: rows[part].append(args[0].shape[1])
        )
        for layer in model.base.model.layers
        for part in PARTS
    ]
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in handles:
            handle.remove()
    return rows


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_logits_equal_the_plain_form(decoder, config, implementation):
    model = make_variator(decoder, config, attn_implementation=implementation).double()
    (ids,) = prompts(29)
    for prompt, keep in ((29, 1), (29, 2), (21, 8)):
        with torch.no_grad():
            expected = reference.logits(model.base, model.plugin(), ids, prompt)[-keep:]
            actual = model(ids, prompt_length=prompt, logits_to_keep=keep).logits[0]
        assert actual.shape == expected.shape
        # the eager attention of transformers takes its softmax in fp32
        torch.testing.assert_close(actual, expected, atol=1e-5 if implementation == "eager" else 1e-9, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_generation_and_cache_are_those_of_the_whole_layer(decoder, config, side):
    model = make_variator(decoder, config)
    batch = pad(prompts(5, 31, 18), side)
    options = dict(max_new_tokens=9, do_sample=False, return_dict_in_generate=True, output_logits=True)
    out = model.generate(**batch, **options)
    model.skip_unread = False
    whole = model.generate(**batch, **options)
    assert torch.equal(out.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(out.logits), torch.stack(whole.logits), atol=1e-5, rtol=0)
    for ours, theirs in zip(out.past_key_values.layers, whole.past_key_values.layers, strict=True):
        torch.testing.assert_close(ours.keys, theirs.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(ours.values, theirs.values, atol=1e-5, rtol=0)


def test_the_second_turn_too(decoder):
    model = make_variator(decoder, BOTH)
    first, second = prompts(31, 17)
    outputs = []
    for skip in (True, False):
        model.skip_unread, cache = skip, DynamicCache(config=model.config)
        turn = model.generate(input_ids=first, past_key_values=cache, max_new_tokens=5, do_sample=False)
        whole = torch.cat((turn, second), dim=1)
        outputs.append(
            model.generate(input_ids=whole, past_key_values=cache, max_new_tokens=8, do_sample=False)
        )
    assert torch.equal(*outputs)


def test_a_sliding_last_layer():
    model = make_variator("gemma3", BOTH, **SLIDING_LAST).double()
    (ids,) = prompts(29)
    with torch.no_grad():
        expected = reference.logits(model.base, model.plugin(), ids, 29)[-2:]
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits[0], expected, atol=1e-9, rtol=0)
    assert rows_of(model, lambda: model(ids, logits_to_keep=2))["self_attn.q_proj"] == [29, 29, 2]


def test_only_the_rows_read_are_computed(decoder):
    model = make_variator(decoder, BOTH)
    (ids,) = prompts(30)
    ffn, kv = len(reference.entries(30, 30, 4, 2, 3)), len(reference.entries(30, 30, 3, 2, 3))
    rows = rows_of(model, lambda: model(ids, logits_to_keep=1))
    assert rows["self_attn.q_proj"] == rows["self_attn.o_proj"] == [30, 30, 1]
    assert rows["self_attn.k_proj"] == ([kv, 30, kv] if decoder == "gemma3" else [kv] * 3)
    assert rows["mlp.up_proj"] == [ffn, ffn, 1]
    steps = rows_of(model, lambda: model.generate(ids, max_new_tokens=2, do_sample=False))
    assert steps["mlp.up_proj"] == [ffn, ffn, 1, 1, 1, 1]


def test_everything_is_there_for_whoever_reads_it():
    model = make_variator("llama", BOTH)
    (ids,) = prompts(30)
    ffn = len(reference.entries(30, 30, 4, 2, 3))

    def last(call) -> int:
        return rows_of(model, call)["mlp.up_proj"][-1]

    assert last(lambda: model(ids)) == ffn
    assert last(lambda: model(ids, logits_to_keep=1)) == 1
    assert last(lambda: model(ids, logits_to_keep=torch.tensor([29]))) == ffn
    assert last(lambda: model(ids, logits_to_keep=5)) == ffn  # one of them is merged
    assert last(lambda: model(ids, logits_to_keep=1, output_hidden_states=True)) == ffn
    assert last(lambda: model(ids, logits_to_keep=1, output_attentions=True)) == ffn
    with torch.enable_grad():
        assert model(ids, logits_to_keep=1).logits.requires_grad
        assert last(lambda: torch.enable_grad()(model)(ids, logits_to_keep=1)) == ffn
    handle = model.base.model.register_forward_hook(lambda module, args, output: None)
    assert last(lambda: model(ids, logits_to_keep=1)) == ffn
    handle.remove()
    with model.disable_plugin():  # exactly the base model
        assert last(lambda: model(ids, logits_to_keep=1)) == 30
    # a right-padded row ends in padding: its last column is no dense token
    batch = pad(prompts(20, 30), "right")
    assert last(lambda: model(**batch, logits_to_keep=1)) == ffn


def test_a_failed_pass_leaves_nothing_behind():
    model = make_variator("llama", BOTH)
    (ids,) = prompts(30)
    expected = model(ids).logits

    def fail(module, args):
        raise RuntimeError("inside the last layer")

    handle = model.base.model.layers[-1].mlp.register_forward_pre_hook(fail)
    with torch.no_grad(), pytest.raises(RuntimeError, match="inside the last layer"):
        model(ids, logits_to_keep=1)
    handle.remove()
    assert torch.equal(model(ids).logits, expected)
    assert not any(module._forward_hooks for module in model.unload().modules())


def test_operations_count_what_is_left():
    """By hand: one layer, d = 32, FFN 48 wide, 4 query and 2 KV heads of 8; 30 tokens, of which 1 is read."""
    model = make_variator("llama", BOTH, num_hidden_layers=1)
    stack, config = Stack.of(model.base.config), model.plugin().config
    cost = prefill(stack, 30, config, reads=1)
    kv = len(reference.entries(30, 30, 3, 2, 3))
    groups = sum(entry.merged for entry in reference.entries(30, 30, 3, 2, 3))
    assert cost.ffn == 2 * 3 * 32 * 48
    assert cost.projections == 2 * 2 * 32 * 32 + 2 * 2 * 32 * 16 * kv
    assert cost.scores == 2 * 2 * 32 * kv
    assert cost.plugin == 2 * 32 * 3 * groups * 3 + 2 * 32 * groups * 3
    assert (
        prefill(stack, 30, config, reads=5).ffn == prefill(stack, 30, config).ffn
    )  # one of the five is merged
