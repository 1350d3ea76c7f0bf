"""Plugins of different sites in one: each does at its site what it did alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conftest import make_variator, prompts, randomise

from llm_variator import VariatorConfig, VariatorError

FFN = VariatorConfig(k=4, sites=("ffn",), r=5, k_per_layer={"ffn": [1, 4, 8]}, dense_head=2, dense_tail=3)
MERGED = VariatorConfig(k=2, sites=("kv",), dense_head=2, dense_tail=3)
KEPT = VariatorConfig(
    sites=("kv",),
    compressor="select",
    k_per_head=[[4, 1], [2, 8], [4, 4]],
    block=8,
    score_fits=2,
    dense_head=2,
    dense_tail=3,
)
BOTH = {
    "merged": dict(
        k={"ffn": 4, "kv": 2},
        sites=("ffn", "kv"),
        compressor={"ffn": "weighted", "kv": "weighted"},
        r=5,
        k_per_layer={"ffn": [1, 4, 8]},
        dense_head=2,
        dense_tail=3,
    ),
    "kept": dict(
        sites=("ffn", "kv"),
        k={"ffn": 4, "kv": 2},
        r=5,
        k_per_layer={"ffn": [1, 4, 8]},
        compressor={"ffn": "weighted", "kv": "select"},
        k_per_head=[[4, 1], [2, 8], [4, 4]],
        block=8,
        score_fits=2,
        dense_head=2,
        dense_tail=3,
    ),
}


def parts(name: str, kv: VariatorConfig, ffn: VariatorConfig = FFN):
    model = make_variator(name, ffn)
    model.add_plugin("kv", kv)
    for seed, plugin in enumerate(("default", "kv")):
        randomise(model.plugin(plugin), seed=seed)
    return model


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("form", BOTH)
def test_joined_is_one_plugin_made_at_once(name, form):
    model = parts(name, {"merged": MERGED, "kept": KEPT}[form])
    joined = model.join_plugins(["kv", "default"], "both")
    assert model.active_plugin == "default"
    by_hand = model.add_plugin("by hand", VariatorConfig(**BOTH[form]))
    with torch.no_grad():
        for own, part in ((by_hand.ffn, model.plugin().ffn), (by_hand.kv, model.plugin("kv").kv)):
            for ours, theirs in zip(own.parameters(), part.parameters(), strict=True):
                ours.copy_(theirs)
    assert joined.config == by_hand.config
    (ids,) = prompts(50)
    outs = []
    for plugin in ("both", "by hand"):
        with model.use_plugin(plugin):
            outs.append(
                model.generate(
                    ids, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
                )
            )
    assert torch.equal(torch.stack(outs[0].logits), torch.stack(outs[1].logits))
    with torch.no_grad():  # copies: training one leaves the others
        next(joined.kv.parameters()).add_(1)
    assert not torch.equal(next(joined.kv.parameters()), next(model.plugin("kv").parameters()))


def test_one_site_alone_is_left_as_it_was():
    """Where the other site does nothing, the joined plugin is the one that does something."""
    model = parts("llama", VariatorConfig(k=1, sites=("kv",), compressor="mean", dense_head=2, dense_tail=3))
    model.join_plugins(["kv", "default"], "both")  # the first has no weights
    (ids,) = prompts(50)
    with torch.no_grad():
        alone = model(ids, prompt_length=40).logits
        with model.use_plugin("both"):
            torch.testing.assert_close(model(ids, prompt_length=40).logits, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("order", [("default", "kv"), ("kv", "default")])
def test_weights_keep_the_wider_dtype(order):
    model = parts("llama", MERGED)
    model.plugin().to(torch.bfloat16)
    joined = model.join_plugins(order, "both")
    assert {parameter.dtype for parameter in joined.parameters()} == {torch.float32}
    pairs = zip(joined.kv.parameters(), model.plugin("kv").parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_a_base_may_have_other_names():
    """A plugin made for a copy of the base: it was loaded, so it fits."""
    model = parts("llama", MERGED)
    other = dataclasses.replace(
        MERGED, base=dataclasses.replace(model.signature, name="a/copy", weights="other")
    )
    model.add_plugin("copy", other)
    assert model.join_plugins(["default", "copy"], "both").config.base == model.signature


def test_encoders_join_too():
    model = make_variator("t5", VariatorConfig(k=2, sites=("ffn",), r=5))
    model.add_plugin("cross", VariatorConfig(k=4, sites=("cross",)))
    assert model.join_plugins(["default", "cross"], "both").config.k == {"ffn": 2, "cross": 4}


def test_a_joined_plugin_is_saved_and_loaded(tmp_path):
    model = parts("llama", KEPT)
    model.join_plugins(["default", "kv"], "both")
    model.save_pretrained(tmp_path, plugin_name="both")
    again = model.load_plugin(tmp_path, "again")
    assert again.config == model.plugins["both"]
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), model.plugin("both").parameters(), strict=True)
    )


def test_what_does_not_go_together_is_refused():
    tail = VariatorConfig.from_dict(MERGED.to_dict() | {"dense_tail": 9})
    model = parts("llama", tail)
    with pytest.raises(
        VariatorError,
        match="same dense_tail, these have 3 and 9: give dense_tail",
    ):
        model.join_plugins(["default", "kv"], "both")
    assert model.join_plugins(["default", "kv"], "both", dense_tail=9).config.ends == (2, 9)
    with pytest.raises(VariatorError, match="r: of joined plugins only dense_head, dense_tail"):
        model.join_plugins(["default", "kv"], "more", dense_tail=9, r=7)
    model.add_plugin("some", VariatorConfig(sites=("kv",), layers=(1,), dense_head=2, dense_tail=3))
    with pytest.raises(
        VariatorError, match=r"same layers, these have \(1,\) and None: make one of them anew"
    ):
        model.join_plugins(["default", "some"], "more")
    model.delete_plugin("some")
    with pytest.raises(VariatorError, match="have site ffn: leave out all but one"):
        model.join_plugins(["default", "both"], "more")
    with pytest.raises(VariatorError, match="no plugin named 'k8'"):
        model.join_plugins(["default", "k8"], "more")
    with pytest.raises(VariatorError, match="name at least one"):
        model.join_plugins([], "more")
    assert set(model.plugins) == {"default", "kv", "both"}
