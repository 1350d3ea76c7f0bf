"""Decode-time compression against the plain form, and what the cache then holds."""

from __future__ import annotations

import dataclasses

import pytest
import reference
import torch
from conftest import make_decoder, make_variator, pad, prompts
from transformers import DynamicCache

from llm_variator import CompressedContext, VariatorConfig, VariatorError, VariatorModel

CONFIGS = {
    "kv": VariatorConfig(k=2, sites=("kv",), r=5, decode_block=4),
    "ffn+kv": VariatorConfig(
        k={"ffn": 4, "kv": 3}, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=3, decode_block=7
    ),
    "attention": VariatorConfig(k=3, sites=("attention",), r=5, dense_head=1, dense_tail=2, decode_block=1),
    "per layer": VariatorConfig(
        k=2, sites=("ffn", "kv"), r=5, k_per_layer={"ffn": (1, 2, 5), "kv": (3, 1, 2)}, decode_block=5
    ),
}
OPTIONS = dict(do_sample=False, output_logits=True, return_dict_in_generate=True)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("length", [2, 21])
def test_logits_and_entries_equal_the_plain_form(decoder, config, length):
    model = make_variator(decoder, config).double()
    (ids,) = prompts(length)
    out = model.generate(ids, max_new_tokens=24, **OPTIONS)
    expected = reference.logits(model.base, model.plugin(), out.sequences, length)[length - 1 : -1]
    # generate returns logits in fp32
    torch.testing.assert_close(torch.stack(out.logits, dim=1)[0], expected.float(), atol=1e-5, rtol=1e-6)
    resolved = model.plugin().config
    for index, layer in enumerate(out.past_key_values.layers):
        site = "attention" if "attention" in config.sites else "kv"
        if model._architecture.slides(model.base, index):
            continue
        held = reference.held_while_decoding(
            length + 23,
            length,
            resolved.ratio(site, index),
            resolved.dense_head,
            resolved.dense_tail,
            resolved.decode_block,
        )
        last = held[length + 22]
        assert layer.keys.shape[-2] == len(last)
        if resolved.ratio(site, index):
            assert layer.columns[0].tolist() == [entry.positions[-1] for entry in last]


def test_it_is_off_by_default_and_off_changes_nothing():
    config = CONFIGS["ffn+kv"]
    off = dataclasses.replace(config, decode_block=None)
    assert VariatorConfig().decode_block is None
    model = make_variator("llama", off)
    (ids,) = prompts(21)
    out = model.generate(ids, max_new_tokens=24, **OPTIONS)
    forced = model(out.sequences, prompt_length=21).logits[:, 20:-1]
    torch.testing.assert_close(torch.stack(out.logits, dim=1), forced, atol=1e-4, rtol=0)
    assert all(layer.recent is None for layer in out.past_key_values.layers)


@pytest.mark.parametrize("k", [2, 4])
def test_the_cache_keeps_shrinking(k):
    """A long generation: at most window + rest / k entries, after every token."""
    config = VariatorConfig(k=k, sites=("kv",), r=5, dense_tail=16, decode_block=16)
    model = make_variator("llama", config, num_hidden_layers=1, max_position_embeddings=4096)
    cache = model(prompts(101)[0], use_cache=True).past_key_values
    layer, token = cache.layers[0], prompts(1)[0]
    with torch.no_grad():
        for _ in range(600):
            model(token, past_key_values=cache, logits_to_keep=1)
            head, window = 4, 16 + 16
            assert layer.entries <= head + window + (layer.tokens - head - window) / k + 1
            assert len(layer.recent) <= window
    assert layer.store.keys.shape[-2] == layer.entries


def test_padding_never_changes_a_result(decoder):
    model = make_variator(decoder, CONFIGS["ffn+kv"])
    rows = prompts(9, 25, 26, 40)
    alone = [model.generate(row, max_new_tokens=20, do_sample=False)[0, -20:] for row in rows]
    uniform = model.generate(torch.cat(prompts(26, 26)), max_new_tokens=20, do_sample=False)
    assert torch.equal(
        uniform[0, -20:], model.generate(prompts(26)[0], max_new_tokens=20, do_sample=False)[0, -20:]
    )
    # rows of one length mod k have their groups at the same tokens, and so the same entries
    same = model.generate(**pad([rows[1], rows[3]], "left"), max_new_tokens=20, do_sample=False)
    assert torch.equal(same[:, -20:], torch.stack([alone[1], alone[3]]))


def test_beams_and_their_memory():
    """Beams reorder what is remembered too: the best beam's score is that of its tokens, one by one."""
    model = make_variator("llama", CONFIGS["kv"])
    (ids,) = prompts(21)
    out = model.generate(
        ids, num_beams=4, max_new_tokens=16, do_sample=False, return_dict_in_generate=True, output_scores=True
    )
    cache, total = DynamicCache(config=model.config), 0.0
    logits = model(ids, past_key_values=cache).logits[0, -1]
    for token in out.sequences[0, 21:]:
        total += float(logits.detach().log_softmax(-1)[token])
        logits = model(token[None, None], past_key_values=cache).logits[0, -1]
    assert total / 16 == pytest.approx(float(out.sequences_scores[0]), abs=1e-4)


def test_turns_contexts_and_files_go_on_ageing(decoder, tmp_path):
    """A conversation over one cache, over contexts, and over a saved context: the same tokens and entries."""
    model = make_variator(decoder, CONFIGS["ffn+kv"])
    document, *questions = prompts(33, 9, 4, 15)
    context, cache, whole = model.compress(document), DynamicCache(config=model.config), document
    chunked = model.compress(document, prefill_chunk_size=13)
    model(document, past_key_values=cache)
    for question in questions:
        context.save(tmp_path / "context")
        loaded = CompressedContext.load(tmp_path / "context", model)
        answer, context = model.generate(
            question, context=context, return_context=True, max_new_tokens=17, do_sample=False
        )
        for other in (loaded, chunked):
            same, chunked = model.generate(
                question, context=other, return_context=True, max_new_tokens=17, do_sample=False
            )
            assert torch.equal(same, answer)
        whole = torch.cat((whole, question), dim=1)
        whole = model.generate(whole, past_key_values=cache, max_new_tokens=17, do_sample=False)
        assert torch.equal(answer, whole[:, -answer.shape[1] :])
        assert context.entries == tuple(layer.keys.shape[-2] for layer in cache.layers)
    assert context.entries[0] < 4 + 10 + (context.tokens - 14) / 3 + 3 * 2


def test_one_context_ages_apart_in_every_answer():
    model = make_variator("llama", CONFIGS["kv"])
    context = model.compress(prompts(33)[0])
    before, questions = context.entries, prompts(9, 9, 9, seed=3)
    together = model.generate(torch.cat(questions), context=context, max_new_tokens=17, do_sample=False)
    for i, question in enumerate(questions):
        alone = model.generate(question, context=context, max_new_tokens=17, do_sample=False)
        assert torch.equal(together[i], alone[0])
    assert context.entries == before


def test_a_dense_turn_in_between_ends_the_memory():
    model = make_variator("llama", CONFIGS["kv"])
    cache = model(prompts(21)[0], use_cache=True).past_key_values
    assert len(cache.layers[0].recent) > 0
    with model.disable_plugin():
        model(prompts(3)[0], past_key_values=cache)
    assert cache.layers[0].recent is None
    model(prompts(20)[0], past_key_values=cache)


def test_it_needs_a_cache_to_compress():
    with pytest.raises(VariatorError, match='needs site "kv"'):
        VariatorConfig(sites=("ffn",), decode_block=8)
    with pytest.raises(VariatorError, match="decode_block must be an integer >= 1"):
        VariatorConfig(sites=("kv",), decode_block=0)
    with pytest.raises(VariatorError, match="decode_block is for decoders"):
        make_variator("bert", VariatorConfig(sites=("attention",), decode_block=8))


def test_a_saved_plugin_may_age_with_another_block(tmp_path):
    model = make_variator("llama", VariatorConfig(k=2, sites=("kv",), r=5))
    model.save_pretrained(tmp_path)
    other = VariatorModel(make_decoder("llama"))
    other.load_plugin(tmp_path, "ages", decode_block=8)
    assert other.plugins["ages"].decode_block == 8
