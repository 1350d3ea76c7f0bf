"""Token pruning against the plain form, written out layer by layer and token by token."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import make_decoder, make_encoder, pad, prompts
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.baselines import TokenPruning
from llm_variator.baselines.ltp import FEED_FORWARD, kept_tokens

DECODED = torch.tensor([[0, 5, 9, 4]])


def plain_states(base, ids, keep: float):
    """(1, n) tokens without padding -> (n, d): the encoder's last hidden states, and the kept tokens by layer."""
    bert, heads, n = base.config.model_type == "bert", base.config.num_attention_heads, ids.shape[1]
    count, chosen = max(1, math.ceil(keep * n)), []
    encoder = base.base_model.encoder
    if bert:
        x, blocks = base.base_model.embeddings(ids)[0], encoder.layer
    else:
        x, blocks = encoder.embed_tokens(ids)[0], encoder.block
        bias = encoder.block[0].layer[0].SelfAttention.compute_bias(n, n)[0]
    for block in blocks:
        if bert:
            own, h = block.attention.self, x
            q, k, v = own.query(h), own.key(h), own.value(h)
        else:
            own, h = block.layer[0].SelfAttention, block.layer[0].layer_norm(x)
            q, k, v = own.q(h), own.k(h), own.v(h)
        width, received, out = q.shape[-1] // heads, torch.zeros(n, dtype=x.dtype), []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            scores = q[:, part] @ k[:, part].T
            scores = scores / width**0.5 if bert else scores + bias[head]
            shares = torch.exp(scores - scores.max(1, keepdim=True).values)
            shares = shares / shares.sum(1, keepdim=True)
            for query in range(n):
                received = received + shares[query] / (heads * n)
            out.append(shares @ v[:, part])
        joined = torch.cat(out, dim=1)
        x = (
            block.attention.output.LayerNorm(block.attention.output.dense(joined) + x)
            if bert
            else x + own.o(joined)
        )
        kept = sorted(range(n), key=lambda i: -received[i].item())[:count]
        chosen.append(set(kept))
        rows = []
        for i in range(n):
            if i not in kept:
                rows.append(x[i])
            elif bert:
                inner = block.output.dense(block.intermediate(x[i]))
                rows.append(block.output.LayerNorm(inner + x[i]))
            else:
                ffn = block.layer[1]
                rows.append(x[i] + ffn.DenseReluDense(ffn.layer_norm(x[i])))
        x = torch.stack(rows)
    return (x if bert else encoder.final_layer_norm(x)), chosen


def states(model, **batch):
    return (
        model.base_model.encoder(**batch)[0]
        if model.config.model_type != "bert"
        else model.base_model(**batch)[0]
    )


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("n", "keep"), [(1, 0.25), (16, 0.25), (21, 0.25), (21, 0.6), (9, 1.0)])
@torch.no_grad()
def test_states_equal_the_plain_form(encoder, implementation, n, keep):
    model = make_encoder(encoder, attn_implementation=implementation).double()
    (ids,) = prompts(n)
    expected, chosen = plain_states(model, ids, keep)
    if encoder == "bert" and n == 21 and keep == 0.25:
        assert len({frozenset(kept) for kept in chosen}) > 1  # every layer chooses for itself
    with TokenPruning(model, keep):
        actual = states(model, input_ids=ids)[0]
    # T5's norms square in fp32
    torch.testing.assert_close(actual, expected, atol=1e-9 if encoder == "bert" else 1e-5, rtol=0)


def test_gradients_equal_those_of_the_plain_form(encoder):
    model = make_encoder(encoder).double()
    (ids,) = prompts(18)
    plain_states(model, ids, 0.25)[0].square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with TokenPruning(model):
        states(model, input_ids=ids)[0].square().sum().backward()
    actual = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert any("wo" in name or "intermediate" in name for name in expected)
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(actual[name], gradient, atol=1e-4 * scale + 1e-12, rtol=0, msg=name)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_is_never_felt(encoder, side, implementation):
    model = make_encoder(encoder, attn_implementation=implementation).double()
    rows = prompts(5, 17, 30)
    batch = pad(rows, side)
    if encoder == "bert":
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with TokenPruning(model):
        together = states(model, **batch)
        for index, row in enumerate(rows):
            real = batch["attention_mask"][index].bool()
            torch.testing.assert_close(
                together[index][real], states(model, input_ids=row)[0], atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("padding", [False, True])
def test_ffns_compute_the_kept_tokens_only(encoder, padding):
    model = make_encoder(encoder)
    batch = pad(prompts(5, 17, 30) if padding else prompts(30, 30, 30), "right")
    seen, norms = [], []
    for name, module in model.base_model.encoder.named_modules():
        if name.endswith((".wi", ".wi_0", "intermediate.dense")):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:-1].numel()))
        if name.endswith(("layer.1.layer_norm", "output.LayerNorm")) and "attention" not in name:
            module.register_forward_pre_hook(lambda _, args: norms.append(args[0].shape[:-1].numel()))
    with TokenPruning(model):
        states(model, **batch)
    assert seen == norms == [2 + 5 + 8 if padding else 3 * 8] * 3


def test_shares_round_up_and_keep_one():
    assert [kept_tokens(n, 0.25) for n in (1, 4, 5, 8, 9, 512)] == [1, 1, 2, 2, 3, 128]
    assert [kept_tokens(30, keep) for keep in (0.1, 0.7, 1.0)] == [3, 21, 30]


@torch.no_grad()
def test_remove_gives_the_model_back(encoder):
    model = make_encoder(encoder)
    batch = pad(prompts(9, 20), "right") | (
        {} if encoder == "bert" else {"decoder_input_ids": DECODED.expand(2, -1)}
    )
    before = model(**batch).logits
    trainable = [p.requires_grad for p in model.parameters()]
    pruning = TokenPruning(model)
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not torch.equal(model(**batch).logits, before)
    with pytest.raises(VariatorError, match="already has"):
        TokenPruning(model)
    with pytest.raises(VariatorError, match="already has"):
        VariatorModel(model, VariatorConfig(k=2))
    pruning.remove()
    pruning.remove()
    assert torch.equal(model(**batch).logits, before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    wrapped = VariatorModel(model, VariatorConfig(k=2))
    with pytest.raises(VariatorError, match="already has"):
        TokenPruning(model)
    wrapped.unload()
    TokenPruning(model).remove()


@pytest.mark.parametrize("name", ["t5-gated", "bert"])
def test_training_with_dropout_and_checkpointing(name):
    model = make_encoder(name).train()
    batch = pad(prompts(9, 20), "right")
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    gradients = []
    with TokenPruning(model):
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(3)
            model.zero_grad()
            model(**batch, labels=labels).loss.backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert any(g.abs().sum() > 0 for n, g in gradients[0].items() if "encoder" in n)
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient)


@torch.no_grad()
def test_generation_reads_the_pruned_states():
    model = make_encoder("t5")
    batch = pad(prompts(9, 20), "right")
    with TokenPruning(model):
        read = model.encoder(**batch)
        beams = dict(num_beams=2, max_new_tokens=5)
        expected = model.generate(encoder_outputs=read, attention_mask=batch["attention_mask"], **beams)
        assert torch.equal(model.generate(**batch, **beams), expected)


@torch.no_grad()
def test_save_and_load(tmp_path):
    model = make_encoder("t5")
    (ids,) = prompts(15)
    with TokenPruning(model, keep=0.4) as pruning:
        expected = states(model, input_ids=ids)
        model.save_pretrained(tmp_path)
        pruning.save(tmp_path)
    assert json.loads((tmp_path / "ltp.json").read_text()) == {"format_version": 1, "keep": 0.4}
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    with TokenPruning.load(again, tmp_path) as pruning:
        assert pruning.keep == 0.4
        torch.testing.assert_close(states(again, input_ids=ids), expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not found"),
        ("{", "not readable JSON"),
        ("[]", "must hold"),
        ('{"format_version": 1, "keep": 0.5, "x": 1}', "must hold"),
        ('{"format_version": 2, "keep": 0.5}', "format_version 2"),
        ('{"format_version": 1, "keep": 0}', "above 0"),
        ('{"format_version": 1, "keep": "all"}', "above 0"),
    ],
)
def test_loading_is_strict(tmp_path, content, message):
    if content is not None:
        (tmp_path / "ltp.json").write_text(content)
    with pytest.raises(VariatorError, match=message) as error:
        TokenPruning.load(make_encoder("t5"), tmp_path)
    assert "ltp.json" in str(error.value)


def test_what_cannot_be_pruned():
    with pytest.raises(VariatorError, match="for encoders"):
        TokenPruning(make_decoder("llama"))
    for keep in (0, -0.1, 1.1, True, "half"):
        with pytest.raises(VariatorError, match="above 0"):
            TokenPruning(make_encoder("bert"), keep)
    assert set(FEED_FORWARD) == {"t5", "mt5", "bert"}


@torch.no_grad()
def test_real_t5_keeping_everything_is_the_dense_model(flan_t5_small):
    model = AutoModelForSeq2SeqLM.from_pretrained(flan_t5_small, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(flan_t5_small)
    batch = tokenizer(
        ["a fine film", "the plot is thin and the jokes thinner"], padding=True, return_tensors="pt"
    )
    real = batch["attention_mask"].bool()
    dense = states(model, **batch)[real]
    with TokenPruning(model, keep=1.0):
        torch.testing.assert_close(states(model, **batch)[real], dense, atol=1e-4, rtol=0)
    with TokenPruning(model):
        assert (states(model, **batch)[real] - dense).abs().max() > 0.01
