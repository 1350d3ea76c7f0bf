"""No pass is silently dense: whatever takes the hooks off is noticed or mended."""

from __future__ import annotations

import copy
import io
import json
import logging
import tomllib
import types
import warnings
from pathlib import Path

import pytest
import torch
from conftest import DECODERS, ENCODERS, make_decoder, make_encoder, make_variator, prompts, randomise
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from transformers import DynamicCache
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.cache.naming import NAMES, cache_argument, cache_of
from llm_variator.engine.hooks import selfcheck

CONFIG = VariatorConfig(k=2, sites=("ffn", "kv"), r=5, dense_head=1, dense_tail=2)
WHOLE = VariatorConfig(k=3, sites=("ffn", "attention"), r=5, dense_head=1, dense_tail=2)
KV = ["q_proj", "k_proj", "v_proj"]
LORA = dict(r=4, lora_alpha=64, target_modules=KV, init_lora_weights=False)
GREEDY = dict(max_new_tokens=6, do_sample=False)
ROOT = Path(__file__).parents[2]

eager_attention_forward = modeling_llama.eager_attention_forward  # where attention modules have theirs

pytestmark = pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning")


def reading(model, ids, **kwargs):
    """Logits of a forward pass over a prompt of a decoder, T5 or BERT."""
    if getattr(model.config, "is_encoder_decoder", False):
        kwargs["decoder_input_ids"] = ids[:, :3]
    with torch.no_grad():
        return model(ids, **kwargs).logits


# A changed library: the name of the cache, once more.


class _Moved(LlamaAttention):
    """An attention that takes its cache under a third name."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, memory=None, **kwargs):
        kwargs[cache_argument_of_llama] = memory
        return LlamaAttention.forward(self, hidden_states, position_embeddings, attention_mask, **kwargs)


class _Hidden(LlamaAttention):
    """One that still names the old argument, and no longer reads it."""

    def forward(
        self,
        hidden_states,
        position_embeddings=None,
        attention_mask=None,
        cache=None,
        past_key_values=None,
        memory=None,
        **kwargs,
    ):
        kwargs[cache_argument_of_llama] = memory
        return LlamaAttention.forward(self, hidden_states, position_embeddings, attention_mask, **kwargs)


cache_argument_of_llama = cache_argument(make_decoder("llama").model.layers[0].self_attn)


class _Layer(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        memory = next((kwargs.pop(name) for name in NAMES if name in kwargs), None)
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(hidden_states=normed, memory=memory, **kwargs)[0]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [
        (_Moved, r"_Moved.forward takes its KV cache under none of the names"),
        (_Hidden, r"layer 0 did not hand its keys and values to its cache"),
    ],
)
def test_a_cache_under_another_name_is_noticed_when_attaching(kind, complaint):
    base = make_decoder("llama")
    expected = reading(base, prompts(20)[0])
    for block in base.model.layers:
        block.__class__, block.self_attn.__class__ = _Layer, kind
    assert torch.equal(reading(base, prompts(20)[0]), expected)
    with pytest.raises(VariatorError, match=complaint):
        VariatorModel(base, CONFIG)
    # and the base is as it was
    assert torch.equal(reading(base, prompts(20)[0]), expected)
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_every_module_names_its_cache(decoder):
    base = make_decoder(decoder)
    for module in (base, base.model, base.model.layers[0].self_attn):
        assert cache_argument(module) in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_users_may_use_either_name(name, decoder):
    model, (ids, more) = make_variator(decoder, CONFIG), prompts(20, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = model(ids, **{name: DynamicCache(config=model.config)})
        model(more, **{name: cache_of(out)})
        with model.disable_plugin():
            model(more, prompt_length=0, **{name: cache_of(out)})
        model.generate(ids, **{name: DynamicCache(config=model.config)}, **GREEDY)
    assert cache_of(out) is out.past_key_values
    assert model.kv_cache_report(cache_of(out)).layers[0].dense_entries == 30


def test_two_caches_at_once_are_refused():
    model = make_variator("llama", CONFIG)
    both = {name: DynamicCache(config=model.config) for name in NAMES}
    with pytest.raises(VariatorError, match="under one name"):
        model(prompts(9)[0], **both)


# Hooks that are gone, and modules in place of others.

GONE = {
    "before the ffn": ("mlp", "_forward_pre_hooks", "site 'ffn' of layer 1 did not merge"),
    "behind the ffn": ("mlp", "_forward_hooks", "shape|size|site 'ffn' of layer 1"),
    "before the attention": ("self_attn", "_forward_pre_hooks", "of layer 1 did not|layer 1 holds"),
    "behind the attention": ("self_attn", "_forward_hooks", "site 'kv' of layer 1 did not merge"),
    "before a key projection": ("self_attn.k_proj", "_forward_pre_hooks", "layer 1|shape|size"),
    "behind a value projection": ("self_attn.v_proj", "_forward_hooks", "layer 1|shape|size"),
}


@pytest.mark.parametrize("which", GONE)
def test_a_hook_that_is_gone_is_noticed(which):
    path, kind, complaint = GONE[which]
    model, (ids,) = make_variator("llama", CONFIG), prompts(20)
    reading(model, ids)
    getattr(model.base.model.layers[1].get_submodule(path), kind).clear()
    with pytest.raises((VariatorError, RuntimeError), match=complaint):
        reading(model, ids)


@pytest.mark.parametrize("hooks", ["_forward_pre_hooks", "_forward_hooks"])
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_pass_that_is_not_noticed_is_noticed(name, hooks):
    config = CONFIG if name in DECODERS else VariatorConfig(k=2, sites=("ffn", "kv"), r=5)
    model, (ids,) = make_variator(name, config), prompts(20)
    reading(model, ids)
    getattr(model._architecture.stack(model.base), hooks).clear()
    with pytest.raises(VariatorError, match=r"no pass reached|0 of 1 passes"):
        reading(model, ids)


def test_an_attention_function_of_somebody_elses_is_noticed():
    model, (ids,) = make_variator("llama", CONFIG), prompts(20)
    reading(model, ids)
    model.base.model.layers[1].self_attn.config = model.base.config
    with pytest.raises((VariatorError, RuntimeError), match=r"layer 1 attended without|size"):
        reading(model, ids)


def test_a_cache_that_does_not_take_what_it_is_given_is_noticed(monkeypatch):
    model, (ids,) = make_variator("llama", CONFIG), prompts(20)
    cache = DynamicCache(config=model.config)
    monkeypatch.setattr(cache, "update", lambda key, value, layer, **kwargs: (key, value))
    with pytest.raises(VariatorError, match="layer 0 holds 0 entries of the KV cache, expected 12"):
        model(ids, cache=cache)


@pytest.mark.parametrize("config", [CONFIG, WHOLE], ids=["kv", "attention"])
def test_modules_put_in_place_of_others_are_found(config):
    """A base whose modules were replaced after attaching computes what one does that always had them."""
    (ids,) = prompts(20)
    model, other = make_variator("llama", config), make_decoder("llama")
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, 0, 0.25, generator=torch.Generator().manual_seed(parameter.numel()))
    reading(model, ids)
    before = model.generate(ids, **GREEDY)
    model.base.model.layers = other.model.layers
    expected = VariatorModel(copy.deepcopy(model.base), config)
    expected.plugin().load_state_dict(model.plugin().state_dict())
    assert torch.equal(reading(model, ids), reading(expected, ids))
    after = model.generate(ids, **GREEDY)
    assert torch.equal(after, expected.generate(ids, **GREEDY))
    assert not torch.equal(after, before)
    base = model.unload()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())


def test_another_number_of_layers_is_refused():
    model, (ids,) = make_variator("llama", CONFIG), prompts(20)
    model.base.model.layers = model.base.model.layers[:2]
    for _ in range(2):
        with pytest.raises(VariatorError, match="2 layers now and had 3"):
            reading(model, ids)


@pytest.fixture(params=["llama", "qwen3"])
def merged(request):
    """A plugin on a base, before and after LoRA's merging by hand: ids, a fresh base, its merged copy's logits."""
    (ids,) = prompts(31)
    base = make_decoder(request.param)
    adapted = get_peft_model(copy.deepcopy(base), LoraConfig(**LORA))
    weights = copy.deepcopy(adapted.state_dict())
    plain = VariatorModel(adapted.merge_and_unload(), CONFIG)
    randomise(plain.plugin())
    logits, tokens = reading(plain, ids), plain.generate(ids, **GREEDY)
    assert (reading(base, ids) - reading(plain.unload(), ids)).abs().max() > 1
    return ids, base, weights, logits, tokens


def test_adapters_merged_after_attaching(merged):
    ids, base, weights, logits, tokens = merged
    adapted = get_peft_model(base, LoraConfig(**LORA))
    adapted.load_state_dict(weights)
    model = VariatorModel(adapted, CONFIG)
    randomise(model.plugin())
    torch.testing.assert_close(reading(model, ids), logits, atol=1e-4, rtol=1e-4)
    model.merge_and_unload()
    torch.testing.assert_close(reading(model, ids), logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(ids, **GREEDY), tokens)


@pytest.mark.parametrize("how", ["inject", "get_peft_model", "assigned"])
def test_adapters_put_on_after_attaching(merged, how):
    ids, base, weights, logits, tokens = merged
    model = VariatorModel(base, CONFIG)
    randomise(model.plugin())
    dense = reading(model, ids)
    if how == "inject":  # what `model.add_adapter` does
        inject_adapter_in_model(LoraConfig(**LORA), model.base)
        weights = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
        model.base.load_state_dict(weights)
    else:
        adapted = get_peft_model(model.base, LoraConfig(**LORA))
        adapted.load_state_dict(weights)
        if how == "assigned":
            model.base = adapted
    torch.testing.assert_close(reading(model, ids), logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(model.generate(ids, **GREEDY), tokens)
    assert (dense - logits).abs().max() > 0.5


def test_compiled_code_follows_replaced_modules():
    torch._dynamo.reset()
    model, (ids,) = make_variator("llama", CONFIG), prompts(20)
    model.compile(backend="eager")
    with torch.inference_mode():
        before = model(ids).logits
        inject_adapter_in_model(LoraConfig(**LORA), model.base)
        after = model(ids).logits
    model.uncompile()
    torch.testing.assert_close(after, reading(model, ids), atol=1e-5, rtol=1e-5)
    assert (after - before).abs().max() > 0.5
    torch._dynamo.reset()


# Copies.


@pytest.mark.parametrize("state", ["after a dense pass", "after a compressed pass", "fresh"])
@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])
def test_a_deep_copy_is_a_model_of_its_own(name, state):
    config = CONFIG if name in DECODERS else VariatorConfig(k=2, sites=("ffn", "kv"), r=5)
    model, (ids,) = make_variator(name, config), prompts(20)
    expected = reading(model, ids)
    model.unload()
    model = make_variator(name, config)
    if state == "after a dense pass":
        with model.disable_plugin():
            dense = reading(model, ids)
            assert not torch.equal(dense, expected)
    elif state == "after a compressed pass":
        reading(model, ids)
    twin = copy.deepcopy(model)
    assert torch.equal(reading(twin, ids), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.5)
    assert not torch.equal(reading(twin, ids), expected)
    with twin.disable_plugin():
        reading(twin, ids)
    assert torch.equal(reading(model, ids), expected)  # neither weights nor hooks are shared
    assert not twin.unload()._forward_hooks
    assert torch.equal(reading(model, ids), expected)


def test_a_copy_while_the_original_generates():
    model, (ids,) = make_variator("llama", CONFIG), prompts(20)
    expected, twins = model.generate(ids, **GREEDY), []

    def copied(ids, scores):
        twins.append(copy.deepcopy(model))
        return scores

    assert torch.equal(model.generate(ids, logits_processor=[copied], **GREEDY), expected)
    assert torch.equal(twins[0].generate(ids, **GREEDY), expected)


def test_a_copied_base_is_a_plain_model_that_can_be_wrapped():
    model, (ids,) = make_variator("llama", CONFIG), prompts(20)
    expected = reading(model, ids)
    with model.disable_plugin():
        dense = reading(model, ids)
    reading(model, ids)
    base = copy.deepcopy(model.base)
    assert torch.equal(reading(base, ids), dense)
    other = VariatorModel(base, CONFIG)
    other.plugin().load_state_dict(model.plugin().state_dict())
    assert torch.equal(reading(other, ids), expected)
    assert torch.equal(reading(model, ids), expected)
    base = other.unload()
    assert torch.equal(reading(base, ids), dense)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    assert all(module.config is base.config for module in base.modules() if hasattr(module, "config"))


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_pickled(name):
    config = CONFIG if name in DECODERS else VariatorConfig(k=2, sites=("ffn", "kv"), r=5)
    model, (ids,) = make_variator(name, config), prompts(20)
    expected, file = reading(model, ids), io.BytesIO()
    torch.save({"model": model, "base": model.base}, file)
    file.seek(0)
    back = torch.load(file, weights_only=False)
    assert torch.equal(reading(back["model"], ids), expected)
    assert back["base"] is back["model"].base
    file = io.BytesIO()
    torch.save(model.base, file)
    file.seek(0)
    alone = VariatorModel(torch.load(file, weights_only=False), config)
    alone.plugin().load_state_dict(model.plugin().state_dict())
    assert torch.equal(reading(alone, ids), expected)


def test_a_shallow_copy_is_refused():
    model = make_variator("llama", CONFIG)
    with pytest.raises(VariatorError, match="already has a VariatorModel"):
        copy.copy(model)
    reading(model, prompts(20)[0])


def test_averaged_weights_are_of_a_working_copy():
    from torch.optim.swa_utils import AveragedModel

    model, (ids,) = make_variator("llama", CONFIG), prompts(20)
    average = AveragedModel(model)
    average.update_parameters(model)
    with torch.no_grad():
        assert torch.equal(average(ids).logits, reading(model, ids))


# What goes past the plugin.


@pytest.mark.parametrize("sites", [("ffn",), ("ffn", "kv")])
def test_paged_generation_is_refused(sites):
    model, (ids,) = make_variator("llama", VariatorConfig(k=2, sites=sites, r=5)), prompts(20)
    with pytest.raises(VariatorError, match="generates past the plugin"):
        model.generate(ids, cache_implementation="paged", **GREEDY)
    settings = copy.deepcopy(model.generation_config)
    settings.cache_implementation = "paged"
    with pytest.raises(VariatorError, match="generates past the plugin"):
        model.generate(ids, generation_config=settings, **GREEDY)


@pytest.mark.parametrize(
    "name", ["generate_batch", "init_continuous_batching", "base_model", "model", "get_decoder", "_sample"]
)
def test_what_would_bypass_the_plugin_is_refused(name):
    model = make_variator("llama", CONFIG)
    with pytest.raises(VariatorError, match=f"'{name}' would run the base's layers without the plugin"):
        getattr(model, name)
    assert not hasattr(model, name)
    assert hasattr(model.base, name)


@pytest.mark.parametrize("name", ["encoder", "get_encoder"])
def test_the_encoder_alone_is_refused(name):
    model = make_variator("t5", VariatorConfig(k=2, sites=("ffn",), r=5))
    with pytest.raises(VariatorError, match="without the plugin"):
        getattr(model, name)


def test_what_is_safe_passes():
    model = make_variator("llama", CONFIG)
    for name in ("config", "device", "dtype", "generation_config", "lm_head", "get_input_embeddings"):
        getattr(model, name)
    assert model.num_parameters() == model.base.num_parameters()
    assert model.prepare_inputs_for_generation is not None


def test_a_generation_that_bypasses_the_base_is_noticed():
    model, (ids,) = make_variator("llama", CONFIG), prompts(20)
    model.base.generate = types.MethodType(lambda self, input_ids, **kwargs: input_ids, model.base)
    with pytest.raises(VariatorError, match="no pass reached"):
        model.generate(ids, **GREEDY)


# Attaching.


def test_attaching_leaves_no_trace(decoder):
    base, (ids,) = make_decoder(decoder), prompts(20)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    dense = reading(base, ids)
    model = VariatorModel(base)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(reading(model, ids), dense)
    with pytest.raises(VariatorError, match="no cache to report"):
        model.kv_cache_report()


def test_modules_that_run_past_their_hooks_are_noticed(encoder, monkeypatch):
    base = make_encoder(encoder)
    path = "layer.1.intermediate" if encoder == "bert" else "block.1.layer.1.DenseReluDense"
    ffn = base.base_model.encoder.get_submodule(path)
    monkeypatch.setattr(type(ffn), "__call__", lambda self, x: self.forward(x))
    with pytest.raises(VariatorError, match="site 'ffn' of layer 0 did not merge"):
        VariatorModel(base)


def test_a_newer_release_warns_once(monkeypatch, caplog):
    monkeypatch.setattr(selfcheck, "version", lambda name: "5.99.0")
    selfcheck._warn_if_untested.cache_clear()
    with caplog.at_level(logging.WARNING):
        VariatorModel(make_decoder("llama"))
        VariatorModel(make_decoder("llama"))
    assert caplog.text.count("make test-matrix") == 1
    selfcheck._warn_if_untested.cache_clear()


def test_the_floor_is_the_one_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (declared,) = [need for need in project["dependencies"] if need.startswith("transformers")]
    floor = declared.removeprefix("transformers>=").split(",")[0]
    assert selfcheck.OLDEST_TESTED.startswith(floor)


def test_the_matrix_has_passed_what_is_claimed():
    """`make test-matrix` stores what it ran: the ends of the range that `selfcheck` names, without a failure."""
    file = ROOT / "eval" / "results" / "test-matrix.json"
    found = json.loads(file.read_text(encoding="utf-8"))["figures"]["environments"]
    ran = {name: figures["versions"]["transformers"] for name, figures in found.items()}
    assert ran["oldest"] == selfcheck.OLDEST_TESTED
    assert ran["newest"] == selfcheck.NEWEST_TESTED
    assert not any(
        figures["failures"] or figures["errors"] or figures["exit_status"] for figures in found.values()
    )
    assert all(figures["tests"] > 2000 for figures in found.values())
