"""Chunked prefill: passes that never split a group, and the result of a single pass."""

from __future__ import annotations

import math

import pytest
import reference
import torch
from conftest import make_decoder, make_variator, pad, prompts
from transformers import DynamicCache

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.contexts.prefill import chunks
from llm_variator.engine.groups import FILLER

MIXED = VariatorConfig(k={"ffn": 4, "kv": 3}, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=3)
GREEDY = dict(do_sample=False, max_new_tokens=5)


@pytest.mark.parametrize("ratios", [(1,), (2,), (3, 4), (8,)])
def test_chunks_cover_the_prompt_and_keep_its_groups(ratios):
    step = math.lcm(*ratios)
    for n in (1, 2, 5, 17, 40, 101):
        for head, tail, chunk in [(0, 0, 1), (0, 1, 8), (4, 1, 8), (4, 16, 8), (3, 2, 30), (4, 64, 500)]:
            parts = list(chunks(n, head=head, tail=tail, step=step, chunk=chunk))
            assert [part.start for part in parts] == [0, *(part.end for part in parts[:-1])]
            assert parts[-1].end == n
            assert all(part.end - part.start <= max(chunk, head + step) for part in parts)
            for k in ratios:
                # the groups that the chunks make, each split as any prompt is
                made = [
                    [part.start + i for i in entry.positions]
                    for part in parts
                    for entry in reference.entries(*[part.end - part.start] * 2, k, part.head, part.tail)
                    if entry.merged
                ]
                whole = reference.entries(n, n, k, head, tail)
                assert made == [entry.positions for entry in whole if entry.merged]


@pytest.mark.parametrize("chunk", [13, 29, 100])
def test_chunked_equals_unchunked(decoder, chunk):
    model = make_variator(decoder, MIXED)
    (ids,) = prompts(161)
    whole = model.compress(ids)
    parts = model.compress(ids, prefill_chunk_size=chunk)
    assert parts.entries == whole.entries
    for a, b in zip(whole.cache.layers, parts.cache.layers, strict=True):
        torch.testing.assert_close(b.keys, a.keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(b.values, a.values, atol=1e-5, rtol=0)
        assert b.get_seq_length() == a.get_seq_length() == 161
        if hasattr(a, "columns"):
            assert torch.equal(a.columns, b.columns)


@pytest.mark.parametrize(
    ("k", "sites"),
    [*((k, ("ffn", "kv")) for k in (2, 3, 4, 8)), (3, ("ffn",)), (3, ("attention",))],
)
def test_chunked_batch_of_ragged_rows(k, sites):
    """Logits after the prompt, and the entries of every row, for the chunks 64, 100 and 256."""
    model = make_variator("llama", VariatorConfig(k=k, sites=sites, r=5))
    rows = prompts(300, 1, 77, 300, 163, 12)
    options = dict(output_logits=True, return_dict_in_generate=True, **GREEDY)
    for side in ("left", "right") if k == 3 else ("left",):
        whole = model.generate(**pad(rows, side), **options)
        for chunk in (64, 100, 256):
            parts = model.generate(**pad(rows, side), prefill_chunk_size=chunk, **options)
            assert torch.equal(parts.sequences[:, -5:], whole.sequences[:, -5:])
            torch.testing.assert_close(
                torch.stack(parts.logits), torch.stack(whole.logits), atol=1e-5, rtol=0
            )
            for a, b in zip(whole.past_key_values.layers, parts.past_key_values.layers, strict=True):
                assert a.get_seq_length() == b.get_seq_length()
                if sites == ("ffn",):
                    continue
                for row in range(len(rows)):
                    (was,) = torch.where(a.columns.expand(len(rows), -1)[row] != FILLER)
                    (now,) = torch.where(b.columns.expand(len(rows), -1)[row] != FILLER)
                    assert torch.equal(a.columns[row, was], b.columns[row, now])
                    torch.testing.assert_close(b.keys[row, :, now], a.keys[row, :, was], atol=1e-5, rtol=0)


def test_chunked_ragged_rows_of_every_family(decoder):
    model = make_variator(decoder, MIXED)
    batch = pad(prompts(1, 50, 23, 41, 50), "left")
    for options in (GREEDY, dict(num_beams=3, num_return_sequences=2, **GREEDY)):
        expected = model.generate(**batch, **options)
        assert torch.equal(model.generate(**batch, prefill_chunk_size=13, **options), expected)


def test_a_chunked_second_turn():
    model = make_variator("llama", MIXED)
    first, second = prompts(40, 60)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    turns = [model.generate(first, past_key_values=cache, **GREEDY) for cache in caches]
    whole = torch.cat((turns[0], second), dim=1)
    out = model.generate(whole, past_key_values=caches[0], **GREEDY)
    assert torch.equal(model.generate(whole, past_key_values=caches[1], prefill_chunk_size=16, **GREEDY), out)
    assert caches[0].layers[0].entries == caches[1].layers[0].entries


def test_the_chunk_may_come_from_a_generation_config():
    model = make_variator("llama", MIXED)
    (ids,) = prompts(60)
    widths = []
    handle = model.base.model.embed_tokens.register_forward_hook(lambda m, a, o: widths.append(o.shape[1]))
    config = model.base.generation_config.__class__(prefill_chunk_size=14, **GREEDY)
    out = model.generate(ids, generation_config=config)
    assert widths[:5] == [
        14,
        12,
        12,
        12,
        9,
    ]  # head and one group of 12, groups of 12, and all but the last token
    assert config.prefill_chunk_size == 14
    handle.remove()
    assert torch.equal(out, model.generate(ids, **GREEDY))


def test_no_pass_holds_more_than_a_chunk():
    """What bounds the memory of activations: no hidden state, mask or logit is wider than the chunk."""
    model = make_variator("llama", MIXED)
    widest = 0

    def see(module, args, output):
        nonlocal widest
        widest = max(widest, output.shape[1])

    handles = [layer.mlp.register_forward_hook(see) for layer in model.base.model.layers]
    handles += [model.base.lm_head.register_forward_hook(see)]
    for n in (200, 400, 800):
        model.compress(prompts(min(n, 500))[0].repeat(1, -(-n // 500))[:, :n], prefill_chunk_size=48)
        assert widest <= 48, n
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(use_cache=False), "needs a cache"),
        (dict(attention_mask=torch.tensor([[1] * 10 + [0] * 5 + [1] * 5])), "not inside it"),
    ],
)
def test_what_cannot_be_chunked_says_so(options, message):
    model = make_variator("llama", MIXED)
    with pytest.raises(VariatorError, match=message):
        model.generate(prompts(20)[0], prefill_chunk_size=8, **options, **GREEDY)


def test_generation_after_a_chunked_prompt_needs_a_dense_last_token():
    model = make_variator("llama", VariatorConfig(k=2, dense_tail=0))
    with pytest.raises(VariatorError, match="dense_tail of at least 1"):
        model.generate(prompts(20)[0], prefill_chunk_size=8, **GREEDY)
    assert model.compress(prompts(20)[0], prefill_chunk_size=8).tokens == 20


def test_without_a_plugin_chunks_are_those_of_transformers():
    base = make_decoder("llama")
    (ids,) = prompts(40)
    expected = base.generate(ids, **GREEDY)
    model = VariatorModel(base, MIXED)
    with model.disable_plugin():
        cache = DynamicCache(config=base.config)
        out = model.generate(ids, prefill_chunk_size=8, past_key_values=cache, **GREEDY)
    assert torch.equal(out, expected)
