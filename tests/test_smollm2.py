"""The invariants once more on a real model: SmolLM2-135M in fp32.

Logits of passes of different shapes are compared in fp64: over 30 layers float32 itself, dense or compressed, is
4e-5 to 1e-4 from pass to pass, as the CPU's kernels go. (`generate` gives its logits in float32, to 2e-6 of them.)
"""

from __future__ import annotations

import pytest
import torch
from conftest import pad, randomise

from llm_variator import CompressedContext, KVPool, VariatorConfig, VariatorModel
from llm_variator.sources.corpora import EMBEDDED, read_windows, spread
from llm_variator.sources.models import shipped_plugins

TEXTS = [
    "The capital of France is",
    "Water boils at one hundred degrees, and it freezes at",
    "Once upon a time there was a king who had three daughters. The eldest was proud, the second was clever, and",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "A long sentence, which began in the morning, went on through the afternoon, and ended only in the evening, when "
    "everybody had gone home, the lamps were lit, and the streets were empty, was finally",
    "One, two, three, four, five, six,",
    "Photosynthesis is the process by which plants turn light into chemical energy. In most plants it takes place in",
    "To be, or not to be,",
]
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=2)


@pytest.fixture(scope="module")
def model(smollm2):
    """Plugins "k1" (identity) and "k2" (ffn+kv, slightly random)."""
    base, _ = smollm2
    model = VariatorModel(base)
    model.add_plugin("k1", VariatorConfig(k=1, sites=("ffn", "kv"), compressor="mean", decompressor="copy"))
    randomise(model.add_plugin("k2", VariatorConfig(k=2, sites=("ffn", "kv"), r=8)), 0.01)
    yield model
    model.unload()


@pytest.fixture
def double(model):
    """The model in fp64 for one test; its float32 weights come back unchanged."""
    yield model.double()
    model.float()


@pytest.fixture(scope="module")
def rows(smollm2):
    return [smollm2[1](text, return_tensors="pt").input_ids for text in TEXTS]


def test_plugin_off_and_identity(model, rows):
    row = rows[4]
    with model.disable_plugin():
        expected, tokens = model(row).logits, model.generate(row, max_new_tokens=64, **GREEDY)
        assert torch.equal(model.base(row).logits, expected)
        assert torch.equal(model.base.generate(row, max_new_tokens=64, **GREEDY), tokens)
    with model.use_plugin("k1"):
        torch.testing.assert_close(model(row).logits, expected, atol=1e-4, rtol=0)
        assert torch.equal(model.generate(row, max_new_tokens=64, **GREEDY), tokens)


def test_stepwise_equals_teacher_forced(double, rows):
    model = double
    with model.use_plugin("k2"):
        out = model.generate(
            rows[4], max_new_tokens=16, output_logits=True, return_dict_in_generate=True, **GREEDY
        )
        n = rows[4].shape[1]
        forced = model(out.sequences, prompt_length=n).logits[:, n - 1 : -1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), forced, atol=1e-5, rtol=0, check_dtype=False)
    report = model.kv_cache_report(out.past_key_values)
    groups = (n - 4 - 1) // 2
    assert {layer.entries for layer in report.layers} == {groups + (n - 2 * groups) + 15}


@pytest.mark.parametrize("k", [2, 3, 4, 8])
def test_cache_holds_exactly_the_entries(model, monkeypatch, k):
    """Prompts of 1 to 100 tokens, and of some up to 300, through the first layer; the layers do not differ in this."""
    monkeypatch.setattr(model.config, "num_hidden_layers", 1)
    monkeypatch.setitem(model.base._modules, "lm_head", torch.nn.Identity())  # nobody reads the logits here
    ids = torch.arange(1, 301)[None]
    for head in (0, 4):
        for tail in (1, 16):
            config = VariatorConfig(k=k, sites=("kv",), layers=(0,), dense_head=head, dense_tail=tail)
            model.add_plugin("entries", config)
            with model.use_plugin("entries"), torch.no_grad():
                for n in (*range(1, 101), *range(107, 301, 7)):
                    cache = model(ids[:, :n], use_cache=True, logits_to_keep=1).past_key_values
                    groups = max(0, (n - head - tail) // k)
                    assert cache.layers[0].keys.shape[-2] == groups + (n - groups * k), n
            model.delete_plugin("entries")


def test_padding_never_changes_a_result(model, rows):
    with model.use_plugin("k2"):
        alone = [model.generate(row, max_new_tokens=10, **GREEDY)[0, -10:] for row in rows]
        for side in ("left", "right"):
            together = model.generate(**pad(rows, side, 2), max_new_tokens=10, **GREEDY)
            assert torch.equal(together[:, -10:], torch.stack(alone)), side


def test_no_token_moves_what_comes_before_its_group(model, rows):
    ids = rows[4][:, :40].repeat(40, 1)
    changed = ids.clone()
    changed[torch.arange(40), torch.arange(40)] += 1
    with model.use_plugin("k2"), torch.no_grad():
        before, after = (model(x, prompt_length=33).logits for x in (ids, changed))
    for j in range(40):
        grouped = 4 <= j < 32  # (33 - 4 - 1) // 2 = 14 pairs from 4 on
        start = j - (j - 4) % 2 if grouped else j
        assert torch.equal(before[j, :start], after[j, :start]), j
        assert not torch.equal(before[j, j], after[j, j]), j


def test_chat_template_and_turns(model, smollm2):
    """Two chat turns over one cache: with groups of one, token for token what the base model says."""
    tokenizer = smollm2[1]

    def template(*chat):
        turns = [{"role": role, "content": content} for role, content in chat]
        return tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    first = template(("user", "What is the capital of France?"))
    second = template(("user", "Name a river in that country."))["input_ids"]
    answers = {}
    for name in (None, "k1"):
        with model.use_plugin(name):
            out = model.generate(**first, return_dict_in_generate=True, max_new_tokens=12, do_sample=False)
            ids = torch.cat((out.sequences, second), dim=1)
            answers[name] = model.generate(
                ids, past_key_values=out.past_key_values, max_new_tokens=12, **GREEDY
            )
    assert "Paris" in tokenizer.decode(answers["k1"][0])
    assert torch.equal(answers["k1"], answers[None])


@pytest.mark.parametrize("name", [name for name in shipped_plugins() if name.startswith("smollm2-135m/")])
def test_shipped_plugins_load_and_beat_their_untrained_selves(model, smollm2, name):
    """On text of a kind that none was trained on."""
    plugin = model.load_plugin(name, "shipped")
    try:
        model.add_plugin("untrained", plugin.config)
        windows = spread(read_windows(EMBEDDED, smollm2[1], seq_length=320), 4).long()
        losses = {}
        for which in ("shipped", "untrained"):
            with model.use_plugin(which), torch.no_grad():
                logits = model(windows, prompt_length=256).logits[:, 255:-1]
            losses[which] = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), windows[:, 256:].flatten()
            )
        assert losses["shipped"] < losses["untrained"]
    finally:
        for which in ("shipped", "untrained"):
            model.delete_plugin(which)


def test_contexts(model, smollm2, rows, tmp_path):
    """Compress, save, load, ask, extend in chunks, page, age: on the real model, against a plain conversation."""
    tokenizer = smollm2[1]
    document, more, question = torch.cat(rows[2:5], dim=1), rows[6], rows[0]
    with model.use_plugin("k2"):
        context = model.compress(document, tokenizer=tokenizer, prefill_chunk_size=32)
        context.save(tmp_path / "context")
        loaded = CompressedContext.load(tmp_path / "context", model, tokenizer=tokenizer)
        pool = KVPool(2000)
        paged = CompressedContext.load(tmp_path / "context", model, pool=pool)
        cache = model(document, use_cache=True, logits_to_keep=1).past_key_values
        model(more, past_key_values=cache, logits_to_keep=1)
        whole = torch.cat((document, more, question), dim=1)
        expected = model.generate(whole, past_key_values=cache, max_new_tokens=10, **GREEDY)
        for each in (context, loaded, paged):
            longer = each.extend(more, prefill_chunk_size=8)
            out = model.generate(question, context=longer, max_new_tokens=10, **GREEDY)
            assert torch.equal(out, expected[:, -out.shape[1] :])
        text = model.generate(TEXTS[0], context=loaded.extend(more), max_new_tokens=10, **GREEDY)
        assert torch.equal(text[:, -10:], expected[:, -10:])
    ageing = VariatorConfig(k=2, sites=("ffn", "kv"), r=8, dense_tail=4, decode_block=8)
    model.add_plugin("ageing", ageing)
    with model.use_plugin("ageing"):
        out = model.generate(rows[0], max_new_tokens=40, return_dict_in_generate=True, **GREEDY)
    n = rows[0].shape[1] + 39
    assert {layer.entries for layer in out.past_key_values.layers} < set(range(4 + 4 + 8 + (n - 16) // 2 + 2))
    model.delete_plugin("ageing")


@pytest.fixture
def keeping(double, smollm2):
    """The shipped plugin that keeps keys and values, in fp64, and 300 tokens of text."""
    model = double
    model.load_plugin("smollm2-135m/kv4", "kv4")
    with model.use_plugin("kv4"):
        yield model, spread(read_windows(EMBEDDED, smollm2[1], seq_length=300), 1).long()
    model.delete_plugin("kv4")


def test_kept_keys_step_by_step_in_chunks_and_at_once(keeping):
    model, ids = keeping
    options = dict(max_new_tokens=6, output_logits=True, return_dict_in_generate=True, **GREEDY)
    options["attention_mask"] = torch.ones_like(ids)  # the text has a token that could pad
    out, chunked = (model.generate(ids, **options, **more) for more in ({}, {"prefill_chunk_size": 90}))
    forced = model(out.sequences, prompt_length=300).logits[:, 299:-1]
    for found in (out, chunked):
        torch.testing.assert_close(
            torch.stack(found.logits, dim=1), forced, atol=1e-5, rtol=0, check_dtype=False
        )
    report = model.kv_cache_report(out.past_key_values)
    for layer, held in enumerate(report.layers):
        for one in held.classes:
            cut = (300 - 4 - 108) % 64
            kept = 4 + 2 * 64 // one.ratio + -(-cut // one.ratio) + 108 + 5
            assert (one.entries, one.bytes) == (kept, one.heads * kept * 2 * 64 * 8), layer
    assert report.bytes == sum(t.nbytes for one in kept_tensors(out.past_key_values) for t in one)
    assert report.bytes < 0.65 * report.dense_bytes


def kept_tensors(cache):
    for layer in cache.layers:
        stores = [one.store for one in layer.classes] if hasattr(layer, "classes") else [layer]
        yield from ((store.keys, store.values) for store in stores)


@pytest.mark.parametrize("j", [5, 70, 131, 200, 250])
@torch.no_grad()
def test_kept_keys_let_nothing_flow_backwards(keeping, j):
    model, ids = keeping
    changed = ids.clone()
    changed[0, j] = (changed[0, j] + 1000) % model.config.vocab_size
    before, after = (model(row).logits[0] for row in (ids, changed))
    torch.testing.assert_close(after[:j], before[:j], atol=1e-5, rtol=0)
    assert (after[j] - before[j]).abs().max() > 1e-2
