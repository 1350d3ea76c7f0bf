"""Site "cross" of T5: the decoder reads merged encoder states, and everything else holds as before."""

from __future__ import annotations

import pytest
import torch
from conftest import make_decoder, make_encoder, make_variator, pad, prompts, randomise
from reference import entries, merge
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5EncoderModel

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.measures.operations import EncoderShape, encoding

T5S = ["t5", "t5-gated"]
CONFIGS = {
    "cross": VariatorConfig(k=4, sites=("cross",)),
    "mean": VariatorConfig(k=3, sites=("cross",), compressor="mean"),
    "all": VariatorConfig(
        k={"ffn": 2, "kv": 3, "cross": 4}, sites=("ffn", "kv", "cross"), r=5, layers=(0, 2)
    ),
    "head and tail": VariatorConfig(k=4, sites=("attention", "cross"), r=5, dense_head=1, dense_tail=2),
}
DECODED = torch.tensor([[0, 5, 9, 4]])
GREEDY = dict(do_sample=False, max_new_tokens=6)


@pytest.fixture(params=CONFIGS)
def config(request) -> VariatorConfig:
    return CONFIGS[request.param]


@pytest.fixture(params=T5S)
def name(request) -> str:
    return request.param


def kept(config: VariatorConfig, n: int):
    return entries(n, n, config.ratio("cross", 0), config.dense_head, config.dense_tail, ragged=True)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("n", [1, 16, 29])
@torch.no_grad()
def test_the_decoder_reads_the_merged_states(name, config, implementation, n):
    """The dense decoder, given states that were merged by hand."""
    model = make_variator(name, config, attn_implementation=implementation).double()
    (ids,) = prompts(n)
    actual = model(ids, decoder_input_ids=DECODED)
    states, weights = actual.encoder_last_hidden_state[0], model.plugin().state_dict()
    merged = [
        merge(weights, "cross.0", [states[i] for i in entry.positions])
        if entry.merged
        else states[entry.positions[0]]
        for entry in kept(model.plugin().config, n)
    ]
    with model.disable_plugin():
        expected = model(encoder_outputs=(torch.stack(merged)[None],), decoder_input_ids=DECODED)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=0)
    assert len(states) == n


@torch.no_grad()
def test_entries_are_real_memory(config):
    model = make_variator("t5", config)
    seen = []
    for block in model.base.decoder.block:
        block.layer[1].EncDecAttention.k.register_forward_pre_hook(
            lambda _, args: seen.append(args[0].shape[1])
        )
    cache = model(*prompts(21), decoder_input_ids=DECODED, use_cache=True).past_key_values
    wanted = len(kept(model.plugin().config, 21))
    assert seen == [wanted] * 3
    assert [layer.keys.shape[-2] for layer in cache.cross_attention_cache.layers] == [wanted] * 3
    assert [layer.keys.shape[-2] for layer in cache.self_attention_cache.layers] == [4] * 3


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_never_changes_a_result(name, config, implementation):
    model = make_variator(name, config, attn_implementation=implementation)
    rows = prompts(1, 2, 3, 4, 5, 12, 18, 31)
    alone = torch.cat([model(row, decoder_input_ids=DECODED).logits for row in rows])
    for side in ("left", "right"):
        together = model(**pad(rows, side), decoder_input_ids=DECODED.expand(len(rows), -1)).logits
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [dict(), dict(num_beams=3, num_return_sequences=2)])
def test_generation_of_a_batch_equals_that_of_its_rows(config, options):
    model = make_variator("t5", config)
    rows = prompts(3, 9, 26)
    alone = torch.cat([model.generate(row, **GREEDY, **options) for row in rows])
    for side in ("left", "right"):
        assert torch.equal(model.generate(**pad(rows, side), **GREEDY, **options), alone), side


def test_decoding_is_intact_and_merges_once():
    model = make_variator("t5", CONFIGS["cross"])
    batch = pad(prompts(20, 11), "right")
    calls = []
    model.plugin().at("cross", 0).compressor.register_forward_hook(lambda *_: calls.append(1))
    out = model.generate(**batch, **GREEDY, num_beams=2, output_logits=True, return_dict_in_generate=True)
    assert len(calls) == 1
    out = model.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True)
    forced = model(**batch, decoder_input_ids=out.sequences[:, :-1]).logits
    torch.testing.assert_close(torch.stack(out.logits, dim=1), forced, atol=1e-4, rtol=0)
    assert torch.equal(model.generate(**batch, **GREEDY, use_cache=False), out.sequences)
    with pytest.raises(VariatorError, match="static cache does not work"):
        model.generate(**batch, **GREEDY, cache_implementation="static")
    with model.disable_plugin():
        read = model.base.encoder(**batch)
    assert torch.equal(model.generate(encoder_outputs=read, **batch, **GREEDY), out.sequences)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_identity_and_off_are_the_base(name, side):
    base = make_encoder(name)
    batch = pad(prompts(12, 25), side) | {"decoder_input_ids": DECODED.expand(2, -1)}
    expected = base(**batch).logits
    hooks = [len(m._forward_pre_hooks) for m in base.modules()]
    model = VariatorModel(base, VariatorConfig(k=1, sites=("cross",), compressor="mean"))
    torch.testing.assert_close(model(**batch).logits, expected, atol=1e-4, rtol=0)
    model.add_plugin("k4", CONFIGS["cross"])
    with model.use_plugin("k4"):
        assert not torch.equal(model(**batch).logits, expected)
    with model.disable_plugin():
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model.unload()(**batch).logits, expected)
    assert [len(m._forward_pre_hooks) for m in base.modules()] == hooks


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_the_plain_form(checkpointing):
    model = make_variator("t5", CONFIGS["cross"]).double().train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    rows = prompts(9, 6)
    model(**pad(rows, "right"), decoder_input_ids=DECODED.expand(2, -1)).logits.square().sum().backward()
    actual = {name: p.grad.clone() for name, p in model.plugin().named_parameters()}
    assert all(parameter.grad is None for parameter in model.base.parameters())
    model.zero_grad()
    weights, config = dict(model.plugin().named_parameters()), model.plugin().config
    for row in rows:
        with model.disable_plugin():
            states = model.base.encoder(row)[0][0]
            merged = [
                merge(weights, "cross.0", [states[i] for i in entry.positions])
                for entry in kept(config, row.shape[1])
            ]
            out = model(encoder_outputs=(torch.stack(merged)[None],), decoder_input_ids=DECODED)
        out.logits.square().sum().backward()
    for name, parameter in weights.items():
        scale = parameter.grad.abs().max().item()
        assert scale > 1e-4
        torch.testing.assert_close(actual[name], parameter.grad, atol=1e-3 * scale, rtol=0, msg=name)


@torch.no_grad()
def test_round_trip_is_strict(tmp_path):
    model = make_variator("t5", CONFIGS["cross"])
    (ids,) = prompts(21)
    expected = model(ids, decoder_input_ids=DECODED).logits
    shapes = {key: tuple(value.shape) for key, value in model.plugin().state_dict().items()}
    assert shapes == {"cross.0.compressor.weight": (4, 4 * 32), "cross.0.compressor.bias": (4,)}
    model.save_pretrained(tmp_path)
    base = model.unload()
    again = VariatorModel.from_pretrained(base, tmp_path)
    assert torch.equal(again(ids, decoder_input_ids=DECODED).logits, expected)
    file = tmp_path / "variator.safetensors"
    weights = load_file(file)
    del weights["cross.0.compressor.bias"]
    save_file(weights, file)
    with pytest.raises(VariatorError, match=r"lacks cross\.0\.compressor\.bias"):
        again.load_plugin(tmp_path, "broken")


@pytest.mark.parametrize("make", [lambda: make_decoder("llama"), lambda: make_encoder("bert")])
def test_models_without_an_encoder_to_read_refuse_it(make):
    for sites in (("cross",), ("ffn", "cross")):
        with pytest.raises(VariatorError, match='"cross" is for T5 with its decoder'):
            VariatorModel(make(), VariatorConfig(k=2, sites=sites))


def test_a_t5_encoder_alone_refuses_it():
    with pytest.raises(VariatorError, match="T5EncoderModel has no decoder"):
        VariatorModel(T5EncoderModel(make_encoder("t5").config), CONFIGS["cross"])


def test_it_has_one_ratio():
    with pytest.raises(VariatorError, match='k_per_layer has no "cross"'):
        VariatorConfig(k=2, sites=("cross",), k_per_layer={"cross": (2, 2, 2)})
    config = VariatorConfig(k={"ffn": 2, "cross": 4}, sites=("cross", "ffn"), layers=(1,))
    assert config.sites == ("ffn", "cross")
    assert [config.ratio("cross", layer) for layer in (0, 1)] == [4, None]
    assert [config.ratio("ffn", layer) for layer in (0, 1)] == [None, 2]
    assert VariatorConfig.from_dict(config.to_dict()) == config
    assert "cross" not in VariatorConfig().sites  # off by default


def test_a_decoder_of_another_depth():
    model = make_variator("t5", CONFIGS["all"], num_decoder_layers=2)
    assert model(*prompts(21), decoder_input_ids=DECODED).logits.shape[:2] == (1, 4)


@torch.no_grad()
def test_arithmetic_equals_what_torch_counts(config):
    model = make_variator("t5", config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model(*prompts(61), decoder_input_ids=DECODED)
    shape = EncoderShape.of(model.base.config)
    cost = encoding(shape, 61, answer=4, plugin=model.plugins["default"], causal=False)
    assert counter.get_total_flops() == cost.total
    assert cost.answer < encoding(shape, 61, answer=4, causal=False).answer


def test_identity_on_real_weights(flan_t5_small):
    base = AutoModelForSeq2SeqLM.from_pretrained(flan_t5_small, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(flan_t5_small)
    texts = [
        "translate English to German: The house is wonderful.",
        "translate English to German: Good morning.",
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    expected = base.generate(**batch, **GREEDY)
    model = VariatorModel(base, VariatorConfig(k=1, sites=("cross",), compressor="mean"))
    assert torch.equal(model.generate(**batch, **GREEDY), expected)
    model.add_plugin("k2", VariatorConfig(k=2, sites=("cross",)))
    randomise(model.plugin("k2"), std=0.01)
    with model.use_plugin("k2"):
        alone = [
            model.generate(ids[mask.bool()][None], **GREEDY)
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        assert torch.equal(model.generate(**batch, **GREEDY), torch.cat(alone))
