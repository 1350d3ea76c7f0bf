"""T5 and BERT: what must always hold when all tokens of an encoder are compressed."""

from __future__ import annotations

import copy

import pytest
import reference_encoder
import torch
from conftest import make_encoder, make_variator, pad, prompts, randomise
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    T5EncoderModel,
)

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.sources.models import load_model

CONFIGS = {
    "ffn": VariatorConfig(k=2, sites=("ffn",), r=5),
    "kv": VariatorConfig(k=3, sites=("kv",), r=5),
    "ffn+kv": VariatorConfig(k={"ffn": 4, "kv": 3}, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=3),
    "attention": VariatorConfig(k=4, sites=("attention",), r=5),
    "ffn+attention": VariatorConfig(k=5, sites=("ffn", "attention"), r=5, activation="tanh", dense_head=1),
    "mean, copy": VariatorConfig(k=4, sites=("ffn", "kv"), compressor="mean", decompressor="copy"),
    "per layer": VariatorConfig(
        k=2, sites=("ffn", "kv"), r=5, k_per_layer={"ffn": (1, 2, 5), "kv": (1, 3, 2)}
    ),
}
T5S = ["t5", "t5-gated", "mt5"]
DECODED = torch.tensor([[0, 5, 9, 4]])
GREEDY = dict(do_sample=False, max_new_tokens=6)


@pytest.fixture(params=CONFIGS)
def config(request) -> VariatorConfig:
    return CONFIGS[request.param]


def decoded(base, rows: int = 1) -> dict[str, torch.Tensor]:
    """The decoder's input where there is a decoder."""
    return {"decoder_input_ids": DECODED.expand(rows, -1)} if base.config.is_encoder_decoder else {}


def padded(name: str, rows: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    """A padded batch; BERT needs to be told its positions when padding comes first."""
    batch = pad(rows, side)
    if name == "bert":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


# The base model is untouched.


@torch.no_grad()  # while T5's position bias wants a gradient, torch picks another attention kernel
def test_plugin_off_is_bit_identical(encoder, config):
    base = make_encoder(encoder)
    state = copy.deepcopy(base.state_dict())
    batch = pad(prompts(9, 20, 31), "right") | decoded(base, 3)
    expected = base(**batch).logits
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in base.modules()]
    model = VariatorModel(base, config)
    randomise(model.plugin())
    assert not torch.equal(model(**batch).logits, expected)
    with model.disable_plugin():
        assert torch.equal(model(**batch).logits, expected)
    base = model.unload()
    assert torch.equal(base(**batch).logits, expected)
    assert base.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in base.state_dict().items())
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in base.modules()] == hooks


@pytest.mark.parametrize("sites", [("ffn", "kv"), ("ffn", "attention")])
@pytest.mark.parametrize("side", ["left", "right"])
def test_identity_plugin_is_dense(encoder, sites, side):
    base = make_encoder(encoder)
    batch = pad(prompts(12, 25), side) | decoded(base, 2)
    expected = base(**batch).logits
    model = VariatorModel(base, VariatorConfig(k=1, sites=sites, compressor="mean", decompressor="copy"))
    real = slice(None) if encoder != "bert" else batch["attention_mask"].bool()
    torch.testing.assert_close(model(**batch).logits[real], expected[real], atol=1e-4, rtol=0)


# The whole computation against the plain form, in fp64.


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("length", [1, 3, 16, 29])
@torch.no_grad()
def test_states_equal_the_plain_form(encoder, config, implementation, length):
    model = make_variator(encoder, config, attn_implementation=implementation).double()
    (ids,) = prompts(length)
    expected = reference_encoder.states(model.base, model.plugin(), ids)
    # T5's norms square in fp32
    close = dict(atol=1e-9 if encoder == "bert" else 1e-5, rtol=0)
    if encoder == "bert":
        actual = model(ids, output_hidden_states=True)
        torch.testing.assert_close(actual.hidden_states[-1][0], expected, **close)
        torch.testing.assert_close(actual.logits[0], model.base.cls(expected), **close)
    else:
        actual = model(ids, decoder_input_ids=DECODED)
        torch.testing.assert_close(actual.encoder_last_hidden_state[0], expected, **close)
        logits = model.base(encoder_outputs=(expected[None],), decoder_input_ids=DECODED).logits
        torch.testing.assert_close(actual.logits, logits, atol=1e-4, rtol=0)


def test_layers_see_one_vector_per_group():
    """n = 21 and k = 4: six vectors in the encoder's FFNs and keys, every token in the decoder's."""
    model = make_variator("t5", VariatorConfig(k=4, sites=("ffn", "kv")))
    seen = {}

    def watch(name, module):
        module.register_forward_pre_hook(lambda _, args: seen.update({name: args[0].shape[1]}))

    for name, module in model.base.named_modules():
        if name.endswith(("wi", ".k", ".q")):
            watch(name, module)
    model(*prompts(21), decoder_input_ids=DECODED)
    for i in range(3):
        assert seen[f"encoder.block.{i}.layer.1.DenseReluDense.wi"] == 6
        assert seen[f"encoder.block.{i}.layer.0.SelfAttention.k"] == 6
        assert seen[f"encoder.block.{i}.layer.0.SelfAttention.q"] == 21
        assert seen[f"decoder.block.{i}.layer.2.DenseReluDense.wi"] == 4
        assert seen[f"decoder.block.{i}.layer.1.EncDecAttention.k"] == 21


# Padding never changes a result.


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_padding_never_changes_a_result(encoder, config, implementation):
    model = make_variator(encoder, config, attn_implementation=implementation)
    rows = prompts(1, 2, 3, 4, 5, 12, 18, 31)
    alone = [model(row, **decoded(model.base)).logits[0] for row in rows]
    for side in ("left", "right"):
        batch = padded(encoder, rows, side)
        logits = model(**batch, **decoded(model.base, len(rows))).logits
        for i, expected in enumerate(alone):
            actual = logits[i] if encoder != "bert" else logits[i, batch["attention_mask"][i].bool()]
            torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


# Every way of generating works on a compressed encoder.


@pytest.mark.parametrize("name", T5S)
@pytest.mark.parametrize("options", [dict(), dict(num_beams=3, num_return_sequences=2)])
def test_generation_of_a_batch_equals_that_of_its_rows(name, config, options):
    model = make_variator(name, config)
    rows = prompts(3, 9, 26)
    alone = torch.cat([model.generate(row, **GREEDY, **options) for row in rows])
    for side in ("left", "right"):
        assert torch.equal(model.generate(**pad(rows, side), **GREEDY, **options), alone), side
    with model.disable_plugin():
        assert not torch.equal(model.generate(**pad(rows, "right"), **GREEDY, **options), alone)


def test_decoding_is_intact():
    model = make_variator("t5", CONFIGS["ffn+kv"])
    batch = pad(prompts(20, 11), "right")
    out = model.generate(**batch, **GREEDY, output_logits=True, return_dict_in_generate=True)
    forced = model(**batch, decoder_input_ids=out.sequences[:, :-1]).logits
    torch.testing.assert_close(torch.stack(out.logits, dim=1), forced, atol=1e-4, rtol=0)
    static = model.generate(**batch, **GREEDY, cache_implementation="static")
    assert torch.equal(static, out.sequences)
    (ids,) = prompts(20)
    looked_up = model.generate(ids, **GREEDY, prompt_lookup_num_tokens=2)
    assert torch.equal(looked_up, model.generate(ids, **GREEDY))


def test_sampling_follows_the_seed():
    model = make_variator("t5", CONFIGS["ffn"])
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(model.generate(*prompts(20), do_sample=True, max_new_tokens=6, num_return_sequences=5))
    assert draws[0].shape == (5, 7)
    assert torch.equal(*draws)


# Other heads, ways to call, and bases.


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForSequenceClassification])
@torch.no_grad()
def test_every_head_reads_the_compressed_states(auto):
    model = make_variator("bert", CONFIGS["ffn+kv"], auto=auto)
    (ids,) = prompts(21)
    states = reference_encoder.states(model.base, model.plugin(), ids)[None]
    pooled = model.base.base_model.pooler(states)
    expected = pooled if auto is AutoModel else model.base.classifier(pooled)
    out = model(ids)
    actual = out.pooler_output if auto is AutoModel else out.logits
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_t5_encoder_alone():
    whole = make_variator("t5", CONFIGS["ffn+kv"])
    config = copy.deepcopy(whole.config)
    alone = T5EncoderModel(config)
    alone.load_state_dict(whole.base.state_dict(), strict=False)
    alone = VariatorModel(alone.eval(), CONFIGS["ffn+kv"])
    randomise(alone.plugin())
    batch = pad(prompts(21, 8), "right")
    expected = whole(**batch, **decoded(whole.base, 2)).encoder_last_hidden_state
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(alone(**batch).last_hidden_state[real], expected[real])


def test_arguments_by_position_count(encoder):
    model = make_variator(encoder, CONFIGS["ffn"])
    batch = pad(prompts(21, 8), "right")
    by_name = model(**batch, **decoded(model.base, 2)).logits
    by_position = model(*batch.values(), **decoded(model.base, 2)).logits
    assert torch.equal(by_name, by_position)


@torch.no_grad()
def test_a_head_that_gives_the_mask_by_position(encoder):
    """As people write their own heads; T5's stack takes its mask there too."""
    batch = pad(prompts(10, 16), "right")
    model = make_variator(encoder, CONFIGS["ffn+kv"])
    stack = model.base.bert if encoder == "bert" else model.base.encoder

    class Own(torch.nn.Module):
        def forward(self, input_ids, attention_mask):
            return stack(input_ids, attention_mask)[0]

    states = {}
    for name, one in (("by position", Own()), ("by name", lambda **given: stack(**given)[0])):
        forward = model.base.forward
        model.base.forward = lambda one=one, **given: one(**given)
        states[name] = model(**batch)
        model.base.forward = forward
    assert torch.equal(states["by position"], states["by name"])
    alone = model(batch["input_ids"][:1, :10], **decoded(model.base), output_hidden_states=True)
    expected = alone.hidden_states[-1] if encoder == "bert" else alone.encoder_last_hidden_state
    torch.testing.assert_close(states["by position"][:1, :10], expected)


def test_embeddings_instead_of_ids(encoder):
    model = make_variator(encoder, CONFIGS["ffn+kv"])
    (ids,) = prompts(21)
    vectors = model.base.get_input_embeddings()(ids)
    actual = model(inputs_embeds=vectors, **decoded(model.base)).logits
    torch.testing.assert_close(actual, model(ids, **decoded(model.base)).logits)


def test_half_precision_keeps_what_t5_keeps_in_fp32():
    """transformers loads `wo` in fp32, so that the FFN's outputs are fp32 between fp16 layers."""
    model = make_variator("t5-gated", CONFIGS["ffn+kv"])
    batch = pad(prompts(21, 8), "right")
    expected = model(**batch, decoder_input_ids=DECODED.expand(2, -1)).logits
    model.base.half()
    for name, module in model.base.named_modules():
        if name.endswith("wo"):
            module.float()
    actual = model(**batch, decoder_input_ids=DECODED.expand(2, -1)).logits
    assert actual.dtype == torch.float16
    torch.testing.assert_close(actual.float(), expected, atol=0.1, rtol=0.02)


def test_a_lora_model_can_be_the_base():
    torch.manual_seed(0)
    tuned = get_peft_model(make_encoder("t5"), LoraConfig(r=2, target_modules=["q", "v"])).eval()
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    batch = pad(prompts(21, 8), "right") | decoded(tuned, 2)
    dense = tuned(**batch).logits
    model = VariatorModel(tuned, CONFIGS["kv"])
    randomise(model.plugin())
    plain = make_variator("t5", CONFIGS["kv"])
    assert not torch.allclose(model(**batch).logits, plain(**batch).logits, atol=1e-2)  # LoRA is felt
    with model.disable_plugin():
        assert torch.equal(model(**batch).logits, dense)


# Training.


def test_only_the_plugin_is_trained(encoder, config):
    model = make_variator(encoder, config).train()
    plugin = dict(model.plugin().named_parameters())
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert trainable == {id(parameter) for parameter in plugin.values()}
    if not plugin:
        return
    batch = padded(encoder, prompts(21, 30), "right")
    model(**batch, **decoded(model.base, 2)).logits.square().mean().backward()
    assert all(parameter.grad is None for parameter in model.base.parameters())
    for name, parameter in plugin.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or name.endswith("compressor.bias"), name


@pytest.mark.parametrize("sites", [("ffn", "kv"), ("ffn", "attention")])
def test_gradients_are_those_of_the_plain_form(encoder, sites):
    """A batch with padding and short groups, against the sum over its rows in the plain form, in fp64."""
    model = make_variator(encoder, VariatorConfig(k=3, sites=sites, r=5)).double()
    rows = prompts(7, 5)
    torch.manual_seed(2)
    weight = torch.randn(2, 7, 32, dtype=torch.float64)

    def gradients(loss):
        model.zero_grad()
        loss.backward()
        return {name: p.grad.clone() for name, p in model.plugin().named_parameters()}

    batch = padded(encoder, rows, "right")
    if encoder == "bert":
        states = model(**batch, output_hidden_states=True).hidden_states[-1]
    else:
        states = model(**batch, **decoded(model.base, 2)).encoder_last_hidden_state
    actual = gradients((states * weight * batch["attention_mask"][..., None]).sum())

    model.plugin().state_dict = lambda: dict(model.plugin().named_parameters())  # not detached
    plain = [reference_encoder.states(model.base, model.plugin(), row) for row in rows]
    expected = gradients(sum((x * w[: len(x)]).sum() for x, w in zip(plain, weight, strict=True)))
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("sites", [("ffn", "kv"), ("ffn", "attention")])
def test_gradient_checkpointing_gives_the_same_gradients(encoder, sites):
    model = make_variator(encoder, VariatorConfig(k=4, sites=sites, r=5)).train()
    batch = padded(encoder, prompts(21, 30), "right")

    def gradients():
        model.zero_grad()
        output = model(**batch, **decoded(model.base, 2))
        with model.disable_plugin():  # the plugin of the forward pass counts, not that of the backward pass
            output.logits.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.plugin().named_parameters()}

    expected = gradients()
    model.gradient_checkpointing_enable()
    recomputed = gradients()
    for name, value in expected.items():
        torch.testing.assert_close(recomputed[name], value)


# Files and counts.


def test_round_trip(encoder, config, tmp_path):
    model = make_variator(encoder, config)
    batch = pad(prompts(21, 8), "right") | decoded(model.base, 2)
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    base = model.unload()
    again = VariatorModel.from_pretrained(base, tmp_path, plugin_name="saved")
    assert again.plugins["saved"] == model.plugins["default"]
    assert (again.plugins["saved"].base.hidden_size, again.plugins["saved"].base.num_layers) == (32, 3)
    assert torch.equal(again(**batch).logits, expected)


def test_the_default_leaves_no_token_dense(encoder):
    config = make_variator(encoder, CONFIGS["ffn"]).plugins["default"]
    assert (config.dense_head, config.dense_tail) == (0, 0)


def test_a_plugin_of_another_family_is_refused(tmp_path):
    make_variator("bert", CONFIGS["ffn"]).save_pretrained(tmp_path)
    with pytest.raises(VariatorError, match="load it onto its own base"):
        VariatorModel.from_pretrained(make_encoder("t5"), tmp_path)


@pytest.mark.parametrize(("name", "percent"), [("t5-base", 0.9), ("t5-large", 0.7)])
def test_parameter_counts_of_the_paper(name, percent):
    """Table 1: k=4, r=64, FFNs of the encoder."""
    base = load_model(name, random_init=True, device="meta")
    model = VariatorModel(base, VariatorConfig(k=4, r=64, sites=("ffn",)))
    plugin, total = (sum(p.numel() for p in m.parameters()) for m in (model.plugin(), base))
    d, layers = base.config.d_model, base.config.num_layers
    assert plugin == layers * (16 * d + 4 + 3 * 64 * d + 64 + d)
    assert round(100 * plugin / total, 1) == percent


# What cannot work says so.


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("t5", lambda m: m(prompts(9)[0], prompt_length=4), "prompt_length is for decoders, T5For"),
        ("bert", lambda m: m(prompts(9)[0], prompt_length=4), "prompt_length is for decoders, BertFor"),
        ("t5", lambda m: m.kv_cache_report(), "kv_cache_report is for decoders"),
        ("bert", lambda m: m.generate(prompts(9)[0]), "BertForMaskedLM cannot generate"),
        ("bert", lambda m: m(torch.empty(1, 0, dtype=torch.long)), "prompt is empty"),
        ("bert", lambda m: m(prompts(9)[0], attention_mask=torch.zeros(1, 9)), "prompt is empty"),
        ("t5", lambda m: m.generate(prompts(9)[0], attention_mask=torch.zeros(1, 9)), "prompt is empty"),
        ("t5", lambda m: m(prompts(9)[0], attention_mask=torch.ones(1, 1, 9, 9)), "2D tensor"),
    ],
)
def test_bad_calls_get_one_clear_error(name, call, message):
    model = make_variator(name, CONFIGS["ffn"])
    with pytest.raises(VariatorError, match=message):
        call(model)
    model(prompts(9)[0], **decoded(model.base))  # and the model still works


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(is_decoder=True), "is_decoder=True is not supported"),
        (dict(chunk_size_feed_forward=4), "chunk_size_feed_forward cuts"),
    ],
)
def test_unsuitable_settings_are_refused(setting, message):
    with pytest.raises(VariatorError, match=message):
        VariatorModel(make_encoder("bert", **setting), CONFIGS["ffn"])


# The real model.


@pytest.mark.parametrize("sites", [("ffn", "kv"), ("ffn", "attention")])
def test_identity_plugin_on_real_weights(flan_t5_small, sites):
    base = AutoModelForSeq2SeqLM.from_pretrained(flan_t5_small, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(flan_t5_small)
    texts = [
        "translate English to German: The house is wonderful.",
        "Is this review positive or negative? A gripping film, and a very funny one at that.",
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    expected = base.generate(**batch, do_sample=False, max_new_tokens=16)
    assert "Haus" in tokenizer.decode(expected[0])
    model = VariatorModel(base, VariatorConfig(k=1, sites=sites, compressor="mean", decompressor="copy"))
    assert torch.equal(model.generate(**batch, do_sample=False, max_new_tokens=16), expected)
    model.add_plugin("k4", VariatorConfig(k=4, sites=("ffn",)))
    with model.use_plugin("k4"), torch.no_grad():
        states = model(**batch, decoder_input_ids=expected[:, :4]).encoder_last_hidden_state
        plain = [
            reference_encoder.states(base, model.plugin(), ids[mask.bool()][None])
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
    for i, alone in enumerate(plain):
        torch.testing.assert_close(states[i, : len(alone)], alone, atol=1e-4, rtol=1e-4)
