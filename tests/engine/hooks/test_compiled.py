"""torch.compile with a plugin active: the same tokens, no graph break, no recompilation while decoding."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from conftest import make_variator, pad, prompts, randomise
from torch._dynamo.utils import counters, get_compilation_metrics

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.hooks import compiled
from llm_variator.engine.hooks.compiled import DECODE, PREFILL
from llm_variator.engine.session import Session, current, scope, traced

FFN_KV = VariatorConfig(k=2, sites=("ffn", "kv"), r=5)
NEW = 6


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.clear_compilation_metrics()
    counters.clear()
    yield
    torch._dynamo.reset()


def variator(name="llama", config=FFN_KV, **overrides):
    """One layer, unless a test is of several: tracing takes seconds for each."""
    return make_variator(name, config, **{"num_hidden_layers": 1, **overrides})


def generated(model, ids, **options):
    return model.generate(input_ids=ids, max_new_tokens=NEW, do_sample=False, **options)


def compilations(kind):
    return [metrics for metrics in get_compilation_metrics() if metrics.co_name == kind]


def own(caplog):
    """What this library logged: torch traces there too."""
    return [record for record in caplog.records if record.name == compiled.__name__]


def breaks():
    return sum(counters["graph_break"].values())


CASES = {
    "llama": ("llama", FFN_KV, {"num_hidden_layers": 2}),
    "eager attention": ("llama", FFN_KV, {"attn_implementation": "eager"}),
    "per layer": (
        "qwen3",
        VariatorConfig(k=2, sites=("ffn", "kv"), r=5, k_per_layer={"kv": (3, 1)}),
        {"num_hidden_layers": 2},
    ),
    "sliding window": (
        "gemma3",
        FFN_KV,
        {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "whole attention": ("qwen2", VariatorConfig(k=3, sites=("ffn", "attention"), r=5, dense_tail=2), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_tokens_without_breaks(case, caplog):
    name, config, overrides = CASES[case]
    model = variator(name, config, **overrides)
    rows = prompts(30, 41, 37)
    expected = [generated(model, ids) for ids in rows]
    model.compile(backend="eager")
    assert torch.equal(generated(model, rows[0]), expected[0])
    assert len(compilations(PREFILL)) == 1
    # a sliding window keeps a view of its keys from its first step on, whose strides are others
    once = 2 if case == "sliding window" else 1
    assert len(compilations(DECODE)) == once
    for ids, wanted in zip(rows[1:], expected[1:], strict=True):
        assert torch.equal(generated(model, ids), wanted)
    assert len(compilations(DECODE)) == once, [m.recompile_reason for m in compilations(DECODE)]
    assert breaks() == 0
    assert not own(caplog), "nothing ran uncompiled"


def test_inductor_makes_the_same_tokens():
    if shutil.which("g++") is None:
        pytest.skip("torch's inductor needs g++ on a CPU")
    model = variator()
    (ids,) = prompts(30)
    expected = generated(model, ids)
    with torch.inference_mode():
        logits = model(ids).logits
    model.compile()
    assert torch.equal(generated(model, ids), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids).logits, logits, atol=1e-4, rtol=0)
    assert len(compilations(DECODE)) == 1


def test_swapping_plugins_and_padded_batches():
    model = variator(num_hidden_layers=2)
    randomise(model.add_plugin("k3", VariatorConfig(k=3, sites=("ffn",), r=5)), seed=2)
    batch = pad(prompts(12, 25, 31), "left")
    expected = {}
    for name in ("default", "k3", None):
        with model.use_plugin(name):
            expected[name] = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert len({str(value.tolist()) for value in expected.values()}) == 3
    model.compile(backend="eager")
    for name in ("default", "k3", None, "default", "k3"):
        with model.use_plugin(name):
            assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False), expected[name])
    reasons = [metrics.recompile_reason for metrics in compilations(DECODE)]
    assert reasons.count(None) == 3, "once per plugin, and without one"
    # padded rows: the columns known after the prompt are as many as the keys of the first step, then no longer
    assert [reason for reason in reasons if reason and "duck sizing" not in reason] == []
    assert len(reasons) <= 4
    assert breaks() == 0


def test_static_cache_with_an_ffn_plugin():
    model = variator(config=VariatorConfig(k=2, sites=("ffn",), r=5))
    (ids,) = prompts(30)
    expected = generated(model, ids)
    model.compile(backend="eager")
    assert torch.equal(generated(model, ids, cache_implementation="static"), expected)
    assert breaks() == 0


def test_conversation_and_beams():
    model = variator()
    first, second = prompts(30, 21)
    both = torch.cat((first, second), dim=1)

    def talk():
        out = generated(model, first, return_dict_in_generate=True)
        ids = torch.cat((out.sequences, second), dim=1)
        return generated(model, ids, past_key_values=out.past_key_values), generated(model, both, num_beams=2)

    expected = talk()
    model.compile(backend="eager")
    assert all(torch.equal(a, b) for a, b in zip(talk(), expected, strict=True))


def test_what_cannot_be_compiled_says_so_and_is_right(caplog):
    model = variator()
    (ids,) = prompts(30)
    expected, context = generated(model, ids), model.compress(ids)
    answer = model.generate(ids, context=context, max_new_tokens=NEW, do_sample=False)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    logits = model(ids).logits
    model.compile(backend="eager")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model(ids).logits, logits)
        assert torch.equal(model.generate(ids, context=context, max_new_tokens=NEW, do_sample=False), answer)
        with torch.no_grad():
            again = model(ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(again, states, strict=True))
    reasons = [record.getMessage().partition("uncompiled: ")[2] for record in own(caplog)]
    assert [reason.split()[0] for reason in reasons] == ["gradients", "the", "output_hidden_states"]
    assert torch.equal(generated(model, ids), expected)


def test_more_kinds_of_passes_than_torch_compiles(caplog):
    model = variator()
    rows = prompts(30, 41, 52)
    expected = [generated(model, ids) for ids in rows]
    model.compile(backend="eager", dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1):
        assert all(torch.equal(generated(model, ids), e) for ids, e in zip(rows, expected, strict=True))
    assert "recompile_limit" in caplog.text


def test_code_that_does_not_merge_is_found(monkeypatch):
    model = variator()
    (ids,) = prompts(30)
    model.compile(backend="eager")
    # stands for code compiled while no plugin was active
    stale = lambda session, call, args, kwargs: traced(None, call, args, kwargs)  # noqa: E731
    monkeypatch.setattr(compiled, "traced", stale)
    with pytest.raises(VariatorError, match="site 'ffn' of layer 0 did not merge"):
        generated(model, ids)
    model.uncompile()
    generated(model, ids)


def test_somebody_elses_torch_compile_stays_right():
    model = variator()
    rows = prompts(30, 41)
    with torch.no_grad():
        expected = [model(ids).logits for ids in rows]
        theirs = torch.compile(model, backend="eager")
        for ids, logits in zip(rows, expected, strict=True):
            torch.testing.assert_close(theirs(ids).logits, logits)
        with model.disable_plugin():
            dense = model(rows[0]).logits
            torch.testing.assert_close(theirs(rows[0]).logits, dense)
        assert not torch.allclose(dense, expected[0])


@pytest.mark.parametrize("part", ["model", "stack", "layer", "ffn"])
def test_somebody_elses_torch_compile_of_a_dense_pass_does_not_freeze_it(part):
    model = variator()
    (ids,) = prompts(30)
    with torch.no_grad():
        expected = model(ids).logits
        layer = model.base.model.layers[0]
        theirs = torch.compile(model, backend="eager") if part == "model" else model
        if part != "model":
            {"stack": model.base.model, "layer": layer, "ffn": layer.mlp}[part].compile(backend="eager")
        for _ in range(2):
            with model.disable_plugin():
                assert not torch.allclose(theirs(ids).logits, expected)
            torch.testing.assert_close(theirs(ids).logits, expected)


@pytest.mark.parametrize("dropped", [False, True])
def test_unload_leaves_nothing_of_ours_compiled(dropped):
    model = variator()
    base = model.base
    model.compile(backend="eager")
    if not dropped:
        model.unload()
    del model
    assert base.base_model._compiled_call_impl is None
    base.base_model.compile(backend="eager")
    theirs = base.base_model._compiled_call_impl
    VariatorModel(base, VariatorConfig(k=2)).unload()
    assert base.base_model._compiled_call_impl is theirs


def test_options_are_torchs_by_name():
    with pytest.raises(VariatorError, match="by name"):
        variator().compile("inductor")
    with pytest.raises(VariatorError, match="for decoders"):
        make_variator("bert", VariatorConfig(k=2)).compile()


def test_the_session_is_found_only_inside_the_trace():
    with scope(Session(None)) as own:
        assert current() is own
        assert traced(None, current, (), {}) is own, "running code asks the thread"
    assert current() is None
