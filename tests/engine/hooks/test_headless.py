"""Decoders without a language-model head, and with other heads: hidden states of compressed prompts."""

from __future__ import annotations

import pytest
import torch
from conftest import DECODERS, SHAPE, make_decoder, make_encoder, make_variator, pad, prompts, randomise
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from llm_variator import VariatorConfig, VariatorError, VariatorModel

CONFIG = VariatorConfig(k={"ffn": 2, "kv": 3}, sites=("ffn", "kv"), r=5, dense_head=1, dense_tail=2)


def hidden(model, **batch) -> torch.Tensor:
    """The last hidden states of a decoder with its head."""
    return model(**batch, output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sites", [("ffn", "kv"), ("attention",)])
def test_hidden_states_are_those_under_the_head(decoder, side, sites):
    config = VariatorConfig(k=2, sites=sites, r=5)
    headed = make_variator(decoder, config)
    batch = pad(prompts(30, 11, 4), side)
    expected, lengths = hidden(headed, **batch), torch.tensor([20, 5, 4])
    forced = hidden(headed, **batch, prompt_length=lengths)
    weights, body = headed.plugin().state_dict(), headed.unload().base_model
    dense = body(**batch).last_hidden_state
    model = VariatorModel(body, config)
    model.plugin().load_state_dict(weights)
    valid = batch["attention_mask"].bool()
    assert torch.equal(model(**batch).last_hidden_state[valid], expected[valid])
    assert torch.equal(model(**batch, prompt_length=lengths).last_hidden_state[valid], forced[valid])
    with model.disable_plugin():
        assert torch.equal(model(**batch).last_hidden_state, dense)
    assert not torch.allclose(dense[valid], expected[valid])
    assert torch.equal(model.unload()(**batch).last_hidden_state, dense)


def test_a_cache_goes_on_without_a_head():
    headed = make_variator("llama", CONFIG)
    document, question = prompts(30, 7)
    cache = headed(document, use_cache=True).past_key_values
    expected = hidden(headed, input_ids=question, past_key_values=cache)
    model = make_variator_without_head(headed)
    cache = model(document, use_cache=True).past_key_values
    assert cache.layers[0].entries == model.kv_cache_report().layers[0].entries < 30
    assert torch.equal(model(question, past_key_values=cache).last_hidden_state, expected)


def make_variator_without_head(headed: VariatorModel) -> VariatorModel:
    config, weights = headed.plugin().config, headed.plugin().state_dict()
    model = VariatorModel(headed.unload().base_model, config)
    model.plugin().load_state_dict(weights)
    return model


def test_a_plugin_of_the_headed_model_fits(tmp_path, caplog):
    headed, (ids,) = make_variator("qwen2", CONFIG), prompts(30)
    headed.save_pretrained(tmp_path / "plugin")
    expected = hidden(headed, input_ids=ids)
    headed.unload().save_pretrained(tmp_path / "base")
    body = AutoModel.from_pretrained(tmp_path / "base")
    model = VariatorModel.from_pretrained(body, tmp_path / "plugin")
    assert torch.equal(model(ids).last_hidden_state, expected)
    assert "other weights" not in caplog.text


def test_it_trains():
    model, (ids,) = VariatorModel(make_decoder("llama").base_model, CONFIG), prompts(30)
    model.train()
    model(ids).last_hidden_state.square().mean().backward()
    assert all(parameter.grad is not None for parameter in model.plugin().parameters())
    assert all(parameter.grad is None for parameter in model.base.parameters())


def test_what_needs_a_head_is_refused_in_one_line():
    model, (ids,) = VariatorModel(make_decoder("llama").base_model, CONFIG), prompts(30)
    for attempt in (lambda: model.generate(ids), lambda: model.compress(ids), model.compile):
        with pytest.raises(VariatorError, match="AutoModelForCausalLM") as caught:
            attempt()
        assert "\n" not in str(caught.value)
    encoder = VariatorModel(make_encoder("bert"), VariatorConfig(k=2))
    with pytest.raises(VariatorError, match="BertForMaskedLM cannot generate"):
        encoder.generate(ids)


HEADS = [AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering]


@pytest.mark.parametrize("auto", HEADS, ids=["sequence", "tokens", "answers"])
def test_other_heads(decoder, auto):
    """A head that reads hidden states gets those of the compressed prompt."""
    config = AutoConfig.for_model(**SHAPE | DECODERS[decoder], num_labels=3)
    try:
        base = auto.from_config(config).eval()
    except ValueError:
        pytest.skip("transformers has no such head for this family")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(0, 0.2)
    model = VariatorModel(base, CONFIG)
    randomise(model.plugin())
    weights, batch = model.plugin().state_dict(), pad(prompts(30, 11), "left")
    out = model(**batch)
    read = {}
    body = base.base_model
    handle = body.register_forward_hook(lambda module, args, output: read.update(states=output[0]))
    model(**batch)
    handle.remove()
    model.unload()
    alone = VariatorModel(body, CONFIG)
    alone.plugin().load_state_dict(weights)
    valid = batch["attention_mask"].bool()
    expected = alone(**batch).last_hidden_state
    assert torch.equal(read["states"][valid], expected[valid])
    assert (out[0] if auto is not HEADS[2] else out.start_logits).isfinite().all()
