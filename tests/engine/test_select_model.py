"""A model with kept keys: its base, gradients, precisions, files, and what others do to it."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import pickle

import pytest
import reference_select as plain
import torch
from conftest import make_decoder, make_encoder, pad, prompts
from peft import LoraConfig, get_peft_model
from reference_select import Segment
from selecting import (
    CONFIGS,
    FEW,
    FULL,
    GREEDY,
    LAYERS,
    MAIN,
    STEP,
    add,
    by_hand,
    check_steps,
    choose,
    close,
    config_for,
    every_setting,
    first,
    kv_heads,
    make,
    rule,
    slides,
)
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.hooks import compiled

pytest_generate_tests = every_setting


# The base model is untouched.


def test_plugin_off_is_bit_identical(decoder, settings):
    base = make_decoder(decoder)
    state = copy.deepcopy(base.state_dict())
    batch = pad(prompts(9, 30, 41), "left")
    logits, sequence = base(**batch).logits, base.generate(**batch, **GREEDY)
    model = VariatorModel(base, config_for(settings, kv_heads(decoder)))
    choose(model.plugin())
    assert not torch.equal(model(**batch).logits, logits)
    with model.disable_plugin():
        assert torch.equal(model(**batch).logits, logits)
        assert torch.equal(model.generate(**batch, **GREEDY), sequence)
    model.set_plugin(None)
    assert torch.equal(model(**batch).logits, logits)
    base = model.unload()
    assert torch.equal(base(**batch).logits, logits)
    assert torch.equal(base.generate(**batch, **GREEDY), sequence)
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_ratios_of_one_everywhere_are_refused_or_dense(decoder):
    base = make_decoder(decoder)
    (ids,) = prompts(40)
    logits = base(ids).logits
    try:
        model = VariatorModel(base, config_for(dict(MAIN, ratios=((1, 1),) * 3), kv_heads(decoder)))
    except VariatorError as error:
        assert "layer" in str(error)  # noqa: PT017
        return
    assert torch.equal(model(ids).logits, logits)


def test_ratios_of_one_beside_another_layer_are_dense(decoder):
    """A single layer chooses; below it everything is the base model."""
    model = make(decoder, dict(MAIN, ratios=((1, 1), (1, 1), (4, 4))))
    assert list(model.plugin().selects) == [2]
    (ids,) = prompts(40)
    with torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
        with model.disable_plugin():
            dense = model(ids, output_hidden_states=True).hidden_states
    for layer in range(3):
        close(states[layer], dense[layer], 1e-10)
    assert (states[3] - dense[3]).abs().max() > 1e-3


# Gradients, precision, files.


def test_gradients_equal_the_plain_form(decoder):
    model = make(decoder)
    (ids,) = prompts(40)
    embedded = model.base.get_input_embeddings()(ids).detach()
    found = []
    parts = [Segment(31, rule(model), 2), Segment(9)]
    for run in (
        lambda x: model(inputs_embeds=x, prompt_length=31).logits[0],
        lambda x: plain.read(model.base, None, parts, embedded=x).logits,
    ):
        x = embedded.clone().requires_grad_()
        run(x).square().mean().backward()
        found.append(x.grad)
    assert found[1].isfinite().all()
    assert (found[1].abs().amax(-1) > 0).all()
    close(found[0], found[1])
    assert all(parameter.grad is None for parameter in model.base.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_half_precision(decoder, dtype):
    model = make(decoder, dtype=dtype)
    batch = pad(prompts(40, 23, 9), "left")
    real = batch["attention_mask"].bool()
    assert model(**batch).logits[real].isfinite().all()
    for chunk in (None, 16):
        out = model.generate(**batch, prefill_chunk_size=chunk, **FULL, **GREEDY)
        assert torch.stack(out.logits).isfinite().all()
    row, counts = prompts(40)[0], [sum(by_hand(40, k, 4, 2, 3) for k in r) for r in MAIN["ratios"]]
    cache = model(row, use_cache=True).past_key_values
    report, groups = model.kv_cache_report(cache), kv_heads(decoder)
    for layer in range(LAYERS):
        if not slides(model, layer):
            assert report.layers[layer].bytes == counts[layer] * groups // 2 * 2 * 8 * 2


def test_a_saved_plugin_is_the_same(tmp_path, decoder, settings):
    model = make(decoder, settings)
    (ids,) = prompts(45)
    with torch.no_grad():
        wanted = model(ids, prompt_length=38).logits
    names = {name for name in model.plugin().state_dict() if name.startswith("kv.")}
    attached = [
        layer
        for layer in range(LAYERS)
        if not slides(model, layer)
        and layer in (settings.get("layers") or range(LAYERS))
        and max(settings["ratios"][layer] if "ratios" in settings else (2,)) > 1
    ]
    assert names == {f"kv.{i}.score.{part}" for i in attached for part in ("weight", "bias")}
    groups = kv_heads(decoder)
    for layer in attached:
        chosen, fits = model.plugin().selects[layer], settings.get("score_fits", 1)
        row = settings["ratios"][layer] if "ratios" in settings else (settings["k"],)
        assert chosen.ratios == (row * groups)[:groups]
        assert chosen.score.weight.shape == (fits, groups, 32)
        assert chosen.score.bias.shape == (fits, groups)
    model.save_pretrained(tmp_path)
    config = model.plugin().config
    loaded = VariatorModel.from_pretrained(model.unload(), tmp_path)
    assert loaded.plugin().config == config
    with torch.no_grad():
        close(loaded(ids, prompt_length=38).logits, wanted)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: VariatorModel(make_decoder("llama"), config_for(dict(MAIN, ratios=((2, 4),) * 2), 2)), "3"),
        (
            lambda: VariatorModel(make_decoder("llama"), config_for(dict(MAIN, ratios=((2, 4),) * 3), 3)),
            "heads",
        ),
        (
            lambda: VariatorModel(make_decoder("llama-mha"), config_for(dict(MAIN, ratios=((2, 4),) * 3), 2)),
            "heads",
        ),
        *(
            (
                functools.partial(lambda name: VariatorModel(make_encoder(name), config_for({}, 4)), name),
                "decoder",
            )
            for name in ("t5", "bert")
        ),
        (
            lambda: VariatorModel(make_decoder("mistral", sliding_window=16), config_for(MAIN, 2)),
            "sliding window",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(build, message):
    with pytest.raises(VariatorError, match=message):
        build()


# What others do to a model and its cache.


class _Elsewhere:
    """Stands in for the streams of a GPU."""

    def wait_stream(self, other) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def offloading(monkeypatch):
    """Caches that are offloaded: here to another dtype, with which nothing can be computed by mistake."""

    def moved(layer, dtype: torch.dtype) -> None:
        if layer.is_initialized:
            layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)

    monkeypatch.setattr(DynamicLayer, "offload", lambda layer: moved(layer, torch.float64))
    monkeypatch.setattr(DynamicLayer, "prefetch", lambda layer: moved(layer, torch.float32))
    monkeypatch.setattr(torch, "Stream", _Elsewhere)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: _Elsewhere())


@torch.no_grad()
def test_an_offloaded_cache(offloading):
    model = make("llama", dtype=torch.float32)
    add(model, "swapped", dict(MAIN, ratios=((4, 2), (1, 1), (2, 2))))
    model.add_plugin("merged", VariatorConfig(k=2, sites=("kv",), dense_head=2, dense_tail=2))
    model.float()
    ids, second = prompts(45, 20)
    wanted = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, cache_implementation="offloaded", **GREEDY), wanted)
    longer = torch.cat((wanted, second), 1)
    for before, after in itertools.permutations(("default", "swapped", "merged", None), 2):
        found = []
        for offloaded in (False, True):
            cache = DynamicCache(config=model.config, offloading=offloaded)
            with model.use_plugin(before):
                model.generate(ids, past_key_values=cache, **GREEDY)
            with model.use_plugin(after):
                options = dict(attention_mask=torch.ones_like(longer), past_key_values=cache)
                found.append(model.generate(longer, **options, **FULL, **GREEDY))
        close(torch.stack(found[1].logits), torch.stack(found[0].logits), STEP)


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_forks_are_freed_by_themselves(decoder):
    model = make(decoder)
    document, more, question = prompts(41, 30, 19)
    context = model.compress(document)
    before = context.entries
    fork = context.fork()
    longer = fork.extend(more)
    fork.free()
    assert context.entries == before
    out = model.generate(question, context=longer, **FULL, **GREEDY)
    parts = [Segment(41, rule(model), 2), Segment(30, rule(model)), Segment(19, rule(model))]
    check_steps(model, out, torch.cat((document, more, question), 1), parts)


@torch.no_grad()
def test_compiled_models_run_as_before_and_say_so_once(caplog):
    model = make("llama", CONFIGS["ffn"])
    rows = pad(prompts(40, 23), "left")
    expected, loose = model.generate(**rows, **GREEDY), model(**rows, use_cache=False).logits
    model.compile(backend="eager")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(model.generate(**rows, **GREEDY), expected)
        assert torch.equal(model(**rows, use_cache=False).logits, loose)
    said = [record.getMessage() for record in caplog.records if record.name == compiled.__name__]
    assert len(said) == 1
    assert 'compressor "select"' in said[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@torch.no_grad()
def test_copies_choose_for_themselves(copied):
    model = make("llama")
    (ids,) = prompts(40)
    wanted = model(ids).logits
    other = copied(model)
    choose(model.plugin(), seed=9)
    assert (model(ids).logits - wanted).abs().max() > 1e-3
    assert torch.equal(other(ids).logits, wanted)


@torch.no_grad()
def test_a_lora_model_as_base_and_around():
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj"])
    tuned = get_peft_model(make_decoder("llama"), config).double()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    (ids,) = prompts(40)
    model = VariatorModel(tuned.eval(), config_for(MAIN, 2)).double()
    choose(model.plugin())
    logits, select = model(ids, prompt_length=33).logits[0], rule(model)
    with model.disable_plugin():
        assert (model(ids).logits[0] - logits).abs().max() > 1e-2
    merged = model.unload().merge_and_unload()
    close(logits, plain.read(merged, ids, [Segment(33, select, 2), Segment(7)]).logits, STEP)

    inner = make("llama")
    around = get_peft_model(inner, config)
    out = around.generate(input_ids=ids, **FULL, **GREEDY)
    check_steps(inner, out, ids, [first(inner, 40)])
