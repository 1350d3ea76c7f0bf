"""The compressor "select" against its plain form (tests/reference_select.py), and what must hold of it."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import pickle
from threading import Thread

import pytest
import reference_select as plain
import torch
from conftest import DECODERS, SHAPE, make_decoder, make_encoder, pad, prompts, randomise
from peft import LoraConfig, get_peft_model
from reference_select import Segment
from transformers import DynamicCache, TextIteratorStreamer
from transformers.cache_utils import DynamicLayer

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.hooks import compiled
from llm_variator.sources.models import byte_tokenizer

LAYERS = 3
EXACT = 1e-8
"""In fp64."""
STEP = 1e-5
"""Of the logits that generate gives back: always in fp32."""

CONFIGS = {
    "short tail": dict(block=4, dense_head=2, dense_tail=3, ratios=((2, 4), (4, 2), (4, 1))),
    "long tail": dict(block=4, dense_head=0, dense_tail=10, ratios=((4, 4), (2, 2), (1, 4))),
    "dense layer": dict(block=8, dense_head=4, dense_tail=1, ratios=((8, 2), (1, 1), (4, 8))),
    "no tail": dict(block=8, dense_head=1, dense_tail=0, ratios=((1, 8), (8, 4), (2, 8))),
    "two fits": dict(block=8, dense_head=3, dense_tail=5, score_fits=2, ratios=((8, 4), (4, 8), (8, 8))),
    "one ratio": dict(block=4, dense_head=2, dense_tail=2, k=4),
    "some layers": dict(block=4, dense_head=2, dense_tail=2, k=2, layers=(0, 2)),
    "ffn": dict(
        block=4,
        dense_head=2,
        dense_tail=3,
        ratios=((2, 4), (4, 2), (4, 4)),
        k={"ffn": 3, "kv": 4},
        sites=("ffn", "kv"),
        compressor={"ffn": "weighted", "kv": "select"},
        r=5,
    ),
}
MAIN = CONFIGS["short tail"]
GREEDY = dict(do_sample=False, max_new_tokens=6)
FULL = dict(return_dict_in_generate=True, output_logits=True)


FEW = ("llama", "gemma3")
"""Decoders for what does not depend on their layers: with full attention alone, and with sliding windows."""
EVERYWHERE = {
    "test_logits_equal_the_plain_form",
    "test_generated_tokens_equal_the_plain_form",
    "test_plugin_off_is_bit_identical",
}
WHOLE_PROMPTS = ("no tail", "ffn")
"""What chunks need of other compressors is tested with them."""


def pytest_generate_tests(metafunc):
    """Llama with all settings, other families with some."""
    if "settings" not in metafunc.fixturenames:
        return
    cases = [("llama", name) for name in CONFIGS]
    cases += [(decoder, "short tail") for decoder in DECODERS if decoder != "llama"] + [("gemma3", "ffn")]
    if metafunc.definition.originalname not in EVERYWHERE:
        cases = [case for case in cases if case[0] in (*FEW, "llama-mha")]
    if "chunk" in metafunc.fixturenames:
        cases = [case for case in cases if case[0] in FEW and case[1] not in WHOLE_PROMPTS]
    if metafunc.definition.originalname == "test_no_token_moves_what_comes_before_it":
        cases = [case for case in cases if case[1] != "ffn"]  # groups of the FFN do see their own tokens
    values = [pytest.param(decoder, CONFIGS[name], id=f"{decoder}-{name}") for decoder, name in cases]
    metafunc.parametrize(("decoder", "settings"), values)


def kv_heads(name: str) -> int:
    return (SHAPE | DECODERS[name])["num_key_value_heads"]


def config_for(settings: dict, groups: int) -> VariatorConfig:
    """The settings, their ratios for two heads repeated for models with more."""
    settings = {"sites": ("kv",), "compressor": "select"} | settings
    ratios = settings.pop("ratios", None)
    if ratios is not None:
        settings["k_per_head"] = tuple((row * groups)[:groups] for row in ratios)
    return VariatorConfig(**settings)


def choose(plugin, seed: int = 3) -> None:
    """Random scores, as far apart as the ratios are felt."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in sorted(plugin.selects):
            for parameter, std in (
                (plugin.selects[layer].score.weight, 1.0),
                (plugin.selects[layer].score.bias, 0.3),
            ):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)


def make(name: str, settings: dict = MAIN, dtype: torch.dtype = torch.float64, **overrides) -> VariatorModel:
    """A tiny decoder whose heads choose by random scores."""
    base = make_decoder(name, **overrides)
    model = VariatorModel(base, config_for(settings, base.config.num_key_value_heads))
    randomise(model.plugin())
    choose(model.plugin())
    return model.to(dtype)


def rule(model: VariatorModel, plugin_name: str | None = None) -> plain.Select:
    """What the plain form needs to know of a plugin."""
    return plain.of_plugin(model.plugin(plugin_name), LAYERS, model.base.config.num_key_value_heads)


@torch.no_grad()
def expected(model: VariatorModel, ids: torch.Tensor, prompt: int) -> plain.Read:
    """The plain form of one prompt and its continuation."""
    select, head = rule(model), model.plugin().config.dense_head
    return plain.read(model.base, ids, [Segment(prompt, select, head), Segment(ids.shape[1] - prompt)])


def close(actual: torch.Tensor, wanted: torch.Tensor, atol: float = EXACT) -> None:
    torch.testing.assert_close(actual, wanted, atol=atol, rtol=0)


def first(model: VariatorModel, tokens: int) -> Segment:
    """The prompt that begins a sequence."""
    return Segment(tokens, rule(model), model.plugin().config.dense_head)


@torch.no_grad()
def check_steps(
    model: VariatorModel,
    out,
    ids: torch.Tensor,
    segments: list[Segment],
    row: int = 0,
    *,
    greedy: bool = True,
) -> plain.Read:
    """What was generated after `ids` has the plain form's logits, and is what it would generate."""
    new = out.sequences[row, -len(out.logits) :]
    read = plain.read(model.base, torch.cat((ids, new[None]), 1), [*segments, Segment(len(new))])
    wanted = read.logits[-len(new) - 1 : -1]
    assert not greedy or torch.equal(wanted.argmax(-1), new)
    close(torch.stack(out.logits)[:, row].double(), wanted, STEP)
    return read


def slides(model: VariatorModel, layer: int) -> bool:
    kinds = getattr(model.base.config, "layer_types", None)
    return kinds is not None and kinds[layer] == "sliding_attention"


def held(model: VariatorModel, report=None) -> list[float]:
    """Entries per head of each layer that sees all of its past."""
    report = report or model.kv_cache_report()
    return [layer.entries for i, layer in enumerate(report.layers) if not slides(model, i)]


def wanted_entries(model: VariatorModel, read: plain.Read, unread: int = 0) -> list[float]:
    """The same, of the plain form; `unread` last tokens have not been read by the cache."""
    counts = [read.entries(i) for i in range(LAYERS) if not slides(model, i)]
    return [sum(layer) / len(layer) - unread for layer in counts]


# The whole computation against the plain form.


@torch.no_grad()
def test_logits_equal_the_plain_form(decoder, settings):
    model = make(decoder, settings)
    (ids,) = prompts(47)
    (head, tail), block = model.plugin().config.ends, settings["block"]
    enough = head + 2 * block
    ragged = 33 if (33 - head) % block else 34
    for prompt in sorted({1, enough - 1, enough, enough + 1, head + tail + 3 * block, ragged, 47}):
        wanted = expected(model, ids, prompt)
        actual = model(ids, prompt_length=prompt, use_cache=True)
        close(actual.logits[0], wanted.logits)
        assert held(model) == pytest.approx(wanted_entries(model, wanted)), prompt
    with model.disable_plugin():
        dense = model(ids).logits[0]
    assert (dense - wanted.logits).abs().max() > 1e-2  # choices are felt


@pytest.mark.parametrize(
    ("name", "implementation"), [("dense layer", "eager"), ("ffn", "eager"), ("ffn", "flex_attention")]
)
@torch.no_grad()
def test_attention_implementations_of_the_model_change_nothing(name, implementation):
    """Layers that choose attend by themselves; the others take their softmax in fp32."""
    model = make("llama", CONFIGS[name], attn_implementation=implementation)
    (ids,) = prompts(47)
    for prompt in (34, 47):
        wanted = expected(model, ids, prompt).logits
        close(model(ids, prompt_length=prompt, use_cache=True).logits[0], wanted, STEP)
        close(model(ids, prompt_length=prompt, use_cache=False).logits[0], wanted, STEP)


@torch.no_grad()
def test_logits_equal_the_plain_form_in_single_precision(decoder, settings):
    model = make(decoder, settings, torch.float32)
    (ids,) = prompts(47)
    for prompt in (34, 47):
        actual = model(ids, prompt_length=prompt).logits[0]
        close(actual, expected(model, ids, prompt).logits, 1e-4)


@torch.no_grad()
def test_short_prompts_stay_dense(decoder):
    """With less than two blocks after the head, or all of it in the tail, nothing is chosen at all."""
    for settings, lengths in ((CONFIGS["dense layer"], (3, 12, 19)), (dict(MAIN, dense_tail=38), (20, 40))):
        model = make(decoder, settings)
        for n in lengths:
            (ids,) = prompts(n + 4)
            with model.disable_plugin():
                dense = model(ids).logits
            close(model(ids, prompt_length=n).logits, dense)
            logits = model(ids[:, :n], use_cache=True).logits
            close(logits, dense[:, :n])
            assert held(model) == [n] * len(held(model))


@torch.no_grad()
def test_of_equal_scores_the_earlier_token_is_kept(decoder):
    """A fresh plugin scores nothing: every block keeps its first tokens."""
    base = make_decoder(decoder)
    model = VariatorModel(base, config_for(MAIN, base.config.num_key_value_heads)).double()
    assert all(not layer.score.weight.any() for layer in model.plugin().selects.values())
    (ids,) = prompts(40)
    wanted = expected(model, ids, 31)
    # blocks begin at 2, 6, ..., 26, the last of them cut off at 28, where the tail begins
    halves, quarters = wanted.kept[0][:2]
    assert halves[:18] == [0, 1, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 28, 29, 30]
    assert quarters[:12] == [0, 1, 2, 6, 10, 14, 18, 22, 26, 28, 29, 30]
    close(model(ids, prompt_length=31).logits[0], wanted.logits)


@torch.no_grad()
def test_hidden_states_equal_the_plain_form(decoder, settings):
    model = make(decoder, settings)
    (ids,) = prompts(40)
    wanted = expected(model, ids, 33)
    states = model(ids, prompt_length=33, output_hidden_states=True).hidden_states
    for ours, theirs in zip(states, wanted.hidden, strict=True):
        close(ours[0], theirs)
    out = model.generate(ids, output_hidden_states=True, **FULL, **GREEDY)
    whole = expected(model, out.sequences, 40)
    for layer in range(LAYERS + 1):
        close(out.hidden_states[0][layer][0, -1], whole.hidden[layer][39])
        for step in range(1, 6):
            close(out.hidden_states[step][layer][0, 0], whole.hidden[layer][39 + step])


# Decoding is intact.


@pytest.mark.parametrize("length", [3, 18, 29, 45])
@torch.no_grad()
def test_generated_tokens_equal_the_plain_form(decoder, settings, length):
    model = make(decoder, settings)
    (ids,) = prompts(length)
    out = model.generate(ids, **FULL, **GREEDY)
    wanted = check_steps(model, out, ids, [first(model, length)])
    close(model(out.sequences, prompt_length=length).logits[0], wanted.logits)
    report = model.kv_cache_report(out.past_key_values)
    assert held(model, report) == pytest.approx(wanted_entries(model, wanted, unread=1))


@torch.no_grad()
def test_decoding_token_by_token_by_hand(decoder):
    """Forward passes over a cache, without generate."""
    model = make(decoder)
    (ids,) = prompts(50)
    wanted = expected(model, ids, 41)
    cache = model(ids[:, :41], use_cache=True).past_key_values
    for i in range(41, 50):
        out = model(ids[:, i : i + 1], past_key_values=cache)
        close(out.logits[0, 0], wanted.logits[i])
    assert cache.get_seq_length() == 50


@torch.no_grad()
def test_decoding_without_a_cache(decoder):
    model = make(decoder)
    (ids,) = prompts(30)
    assert torch.equal(model.generate(ids, use_cache=False, **GREEDY), model.generate(ids, **GREEDY))


# Padding never changes a result.


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_never_changes_a_result(decoder, settings, side):
    model = make(decoder, settings)
    rows = prompts(1, 18, 19, 30, 41)
    batch = pad(rows, side)
    out = model.generate(**batch, **FULL, **GREEDY)
    logits = model(**batch).logits
    for i, row in enumerate(rows):
        check_steps(model, out, row, [first(model, row.shape[1])], i)
        # pads on the left shift the positions, whose angles are fp32
        wanted = expected(model, row, row.shape[1]).logits
        close(logits[i, batch["attention_mask"][i].bool()], wanted, STEP if side == "left" else EXACT)
        assert torch.equal(model.generate(row, **GREEDY)[0, -6:], out.sequences[i, -6:])


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_prompt_length_may_differ_by_row(decoder, settings, side):
    model = make(decoder, settings)
    rows, lengths = prompts(40, 40, 31, 25, 40), torch.tensor([40, 27, 24, 4, 36])
    batch = pad(rows, side)
    together = model(**batch, prompt_length=lengths).logits
    for i, row in enumerate(rows):
        wanted = expected(model, row, int(lengths[i])).logits
        close(together[i, batch["attention_mask"][i].bool()], wanted, STEP if side == "left" else EXACT)


# Chunks.


@pytest.mark.parametrize("chunk", [7, 30, 100])
@torch.no_grad()
def test_chunked_equals_unchunked(decoder, settings, chunk):
    check_chunks(make(decoder, settings), chunk)


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_a_prompt_read_token_by_token(decoder):
    check_chunks(make(decoder), 1)


def check_chunks(model: VariatorModel, chunk: int) -> None:
    (ids,) = prompts(61)
    out = model.generate(ids, prefill_chunk_size=chunk, **FULL, **GREEDY)
    check_steps(model, out, ids, [first(model, 61)])
    wanted = wanted_entries(model, expected(model, ids, 61))
    assert held(model) == pytest.approx([count + 5 for count in wanted])
    context = model.compress(ids, prefill_chunk_size=chunk)
    assert held(model, model.kv_cache_report(context)) == pytest.approx(wanted)
    question = prompts(5, seed=8)[0]
    out = model.generate(question, context=context, **FULL, **GREEDY)
    check_steps(model, out, torch.cat((ids, question), 1), [first(model, 61), Segment(5)])


@pytest.mark.parametrize("chunk", [5, 40])
@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_chunked_batch_of_ragged_rows(decoder, chunk):
    model = make(decoder)
    rows = prompts(61, 1, 23, 44, 9)
    for side in ("left", "right"):
        out = model.generate(**pad(rows, side), prefill_chunk_size=chunk, **FULL, **GREEDY)
        for i, row in enumerate(rows):
            check_steps(model, out, row, [first(model, row.shape[1])], i)


@torch.no_grad()
def test_chunked_with_ffn_groups(decoder):
    model = make(decoder, CONFIGS["ffn"])
    (ids,) = prompts(61)
    wanted = model.generate(ids, **FULL, **GREEDY)
    for chunk in (13, 30, 100):
        out = model.generate(ids, prefill_chunk_size=chunk, **FULL, **GREEDY)
        assert torch.equal(out.sequences, wanted.sequences)
        close(torch.stack(out.logits), torch.stack(wanted.logits), STEP)


# Nothing flows backwards.


def no_token_moves_what_comes_before_it(model: VariatorModel, n: int, prompt: int, rows: int) -> None:
    """Change each token in turn, in batches of `rows`; all batches have one shape, as rounding may depend on it."""
    (ids,) = prompts(n)
    before = model(ids.repeat(rows, 1), prompt_length=prompt).logits[0]
    for start in range(0, n, rows):
        places = torch.arange(start, start + rows).clamp(max=n - 1)
        changed = ids.repeat(rows, 1)
        changed[torch.arange(rows), places] = (ids[0, places] - 2) % 90 + 3
        after = model(changed, prompt_length=prompt).logits
        for row, j in enumerate(places.tolist()):
            close(after[row, :j], before[:j], 1e-10)
            assert (after[row, j] - before[j]).abs().max() > 1e-6, j


@pytest.mark.parametrize("prompt", [60, 49])
@torch.no_grad()
def test_no_token_moves_what_comes_before_it(decoder, settings, prompt):
    no_token_moves_what_comes_before_it(make(decoder, settings), 60, prompt, rows=60)


@pytest.mark.slow
@pytest.mark.parametrize("tail", [1, 64, 150])
@torch.no_grad()
def test_no_token_of_a_long_prompt_moves_what_comes_before_it(tail):
    settings = dict(block=64, dense_head=4, dense_tail=tail, ratios=((16, 2), (8, 64), (1, 32)))
    no_token_moves_what_comes_before_it(make("llama", settings), 300, 300, rows=50)


# The cache holds the chosen entries, in real memory.


def by_hand(n: int, ratio: int, block: int, head: int, tail: int) -> int:
    """Entries of one head after a prompt of `n` tokens."""
    inner = n - head - tail
    if n - head < 2 * block or inner <= 0:
        return n
    return head + inner // block * (block // ratio) + -(-(inner % block) // ratio) + tail


def real_bytes(held_by) -> int:
    """Bytes of all keys and values (4D floating-point tensors) within reach of an object, each storage once."""
    found, seen, left = {}, set(), [held_by]
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            if item.dim() == 4 and item.is_floating_point():
                found[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            left += item.values()
        elif isinstance(item, (list, tuple, set)):
            left += item
        elif type(item).__module__.startswith(("llm_variator.", "transformers.cache_utils")):
            left += [*getattr(item, "__dict__", {}).values()]
            left += [
                getattr(item, name) for name in getattr(type(item), "__slots__", ()) if hasattr(item, name)
            ]
    return sum(found.values())


def check_memory(
    cache, report, counts: list[dict[int, tuple[int, int]]], itemsize: int, rows: int = 1
) -> None:
    """`counts`: of each layer ratio -> (heads, entries of each); head_dim is 8."""
    entry = 2 * 8 * itemsize * rows
    for layer, told, classes in zip(cache.layers, report.layers, counts, strict=True):
        heads = sum(number for number, _ in classes.values())
        total = sum(number * entries for number, entries in classes.values())
        assert told.entries == pytest.approx(total / heads)
        assert told.bytes == total * entry == real_bytes(layer)
        assert told.dense_entries == cache.get_seq_length()
        assert told.dense_bytes == cache.get_seq_length() * heads * entry
        if max(classes) > 1:
            found = {part.ratio: (part.heads, part.entries, part.bytes) for part in told.classes}
            assert found == {k: (number, n, number * n * entry) for k, (number, n) in classes.items()}
            assert len(told.classes) == len(classes)
    assert report.bytes == sum(layer.bytes for layer in report.layers)


@pytest.mark.parametrize("tail", [0, 1, 4, 11])
@pytest.mark.parametrize("head", [0, 3])
@torch.no_grad()
def test_cache_holds_exactly_the_entries(head, tail):
    block, ratios = 4, ((2, 2, 4, 1), (4, 4, 4, 4), (1, 1, 1, 1))
    settings = dict(block=block, dense_head=head, dense_tail=tail, ratios=ratios)
    model = make("llama-mha", settings, torch.float32)
    for n in [*range(1, head + tail + 3 * block + 3), 77]:
        (ids,) = prompts(n)
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
        counts = [{k: (row.count(k), by_hand(n, k, block, head, tail)) for k in set(row)} for row in ratios]
        assert cache.get_seq_length() == n
        report = model.kv_cache_report()
        assert model.kv_cache_report(cache) == report
        check_memory(cache, report, counts, itemsize=4)


@torch.no_grad()
def test_cache_of_a_batch_after_generation():
    model = make("llama")
    rows = torch.cat(prompts(39, 39, 39))
    out = model.generate(rows, **FULL, **GREEDY)
    counts = [{k: (row.count(k), by_hand(39, k, 4, 2, 3) + 5) for k in set(row)} for row in MAIN["ratios"]]
    check_memory(out.past_key_values, model.kv_cache_report(), counts, itemsize=8, rows=3)


@torch.no_grad()
def test_the_report_of_a_ragged_batch_counts_its_longest_row():
    model = make("llama")
    model(**pad(prompts(12, 39, 25), "left"), use_cache=True)
    wanted = [sum(by_hand(39, k, 4, 2, 3) for k in row) / 2 for row in MAIN["ratios"]]
    assert held(model) == pytest.approx(wanted)


@torch.no_grad()
def test_sliding_layers_keep_their_window():
    model = make("gemma3")
    cache = model(prompts(45)[0], use_cache=True).past_key_values
    assert 1 not in model.plugin().selects
    assert cache.layers[1].keys.shape[-2] == 7
    assert model.kv_cache_report().layers[1].entries == 7


# Several turns: every prompt is reduced in its turn, what earlier ones have left stays as it is. With a mask of ones,
# as without one generate takes a generated pad token for padding.


@torch.no_grad()
def test_a_second_turn_over_one_cache(decoder, settings):
    model = make(decoder, settings)
    select, head = rule(model), model.plugin().config.dense_head
    first, second, third = prompts(30, 37, 21)
    cache = DynamicCache(config=model.config)
    turn = model.generate(first, past_key_values=cache, **GREEDY)
    ids = torch.cat((turn, second), dim=1)
    # the last generated token of a turn has not been read: it is the next prompt's head
    turns = [Segment(30, select, head), Segment(5), Segment(38, select, 1)]
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **FULL, **GREEDY)
    check_steps(model, out, ids, turns)
    turns.append(Segment(5))
    read = plain.read(model.base, out.sequences[:, :-1], turns)
    assert held(model, model.kv_cache_report(cache)) == pytest.approx(wanted_entries(model, read))

    ids = torch.cat((out.sequences, third), dim=1)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **FULL, **GREEDY)
    check_steps(model, out, ids, [*turns, Segment(22, select, 1)])


@torch.no_grad()
def test_a_second_turn_teacher_forced(decoder, settings):
    model = make(decoder, settings)
    select, head = rule(model), model.plugin().config.dense_head
    (ids,) = prompts(80)
    cache = model(ids[:, :35], prompt_length=30, use_cache=True).past_key_values
    logits = model(ids[:, 35:], prompt_length=38, past_key_values=cache).logits[0]
    wanted = plain.read(
        model.base, ids, [Segment(30, select, head), Segment(5), Segment(38, select, 0), Segment(7)]
    )
    close(logits, wanted.logits[35:])
    assert held(model, model.kv_cache_report(cache)) == pytest.approx(wanted_entries(model, wanted))


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_two_turns_of_a_padded_batch(decoder):
    model = make(decoder)
    rows, more = prompts(12, 36), prompts(25, 25, seed=4)
    batch, cache = pad(rows, "left"), DynamicCache(config=model.config)
    turn = model.generate(**batch, past_key_values=cache, **GREEDY)
    ids = torch.cat((turn, torch.cat(more)), dim=1)
    mask = torch.cat((batch["attention_mask"], torch.ones(2, 6 + 25, dtype=torch.long)), dim=1)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, **FULL, **GREEDY)
    for i, row in enumerate(rows):
        alone = torch.cat((row, turn[i : i + 1, -6:], more[i]), dim=1)
        turns = [Segment(row.shape[1], rule(model), 2), Segment(5), Segment(26, rule(model), 1)]
        check_steps(model, out, alone, turns, i)


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_contexts(decoder, chunk):
    """compress, extend, questions and their answers: each is a segment of its own."""
    model = make(decoder)
    document, more, question, again = prompts(41, 26, 19, 17)
    context = model.compress(document, prefill_chunk_size=chunk).extend(more, prefill_chunk_size=chunk)
    parts = [Segment(41, rule(model), 2), Segment(26, rule(model)), Segment(19, rule(model))]
    read = plain.read(model.base, torch.cat((document, more), 1), parts[:2])
    assert held(model, model.kv_cache_report(context)) == pytest.approx(wanted_entries(model, read))
    ids = torch.cat((document, more, question), dim=1)
    for _ in range(2):  # shared, not changed
        out, after = model.generate(
            question, context=context, return_context=True, prefill_chunk_size=chunk, **FULL, **GREEDY
        )
        check_steps(model, out, ids, parts)
        assert torch.equal(out.sequences[:, :-6], question)
    ids = torch.cat((ids, out.sequences[:, -6:], again), dim=1)
    parts += [Segment(5), Segment(18, rule(model), 1)]
    out = model.generate(again, context=after, prefill_chunk_size=chunk, **FULL, **GREEDY)
    check_steps(model, out, ids, parts)


@pytest.mark.parametrize("chunk", [None, 13])
@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_many_questions_after_one_context(decoder, chunk):
    model = make(decoder)
    document, questions = prompts(41)[0], prompts(19, 3, 26, seed=5)
    context = model.compress(document)
    for side in ("left", "right"):
        batch = pad(questions, side)
        out = model.generate(**batch, context=context, prefill_chunk_size=chunk, **FULL, **GREEDY)
        for i, question in enumerate(questions):
            parts = [Segment(41, rule(model), 2), Segment(question.shape[1], rule(model))]
            check_steps(model, out, torch.cat((document, question), 1), parts, i)


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_a_batch_of_contexts(decoder):
    model = make(decoder)
    documents, questions = prompts(41, 8, 27), prompts(19, 4, 13, seed=5)
    contexts = model.compress([row[0].tolist() for row in documents])
    out = model.generate([row[0].tolist() for row in questions], context=contexts, **FULL, **GREEDY)
    for i, (document, question) in enumerate(zip(documents, questions, strict=True)):
        parts = [Segment(document.shape[1], rule(model), 2), Segment(question.shape[1], rule(model))]
        check_steps(model, out, torch.cat((document, question), 1), parts, i)


# Plugins that change.


def add(model: VariatorModel, name: str, settings: dict) -> None:
    plugin = model.add_plugin(name, config_for(settings, model.base.config.num_key_value_heads))
    choose(plugin, seed=7)
    plugin.double()


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_a_plugin_may_change_between_turns(decoder):
    model = make(decoder)
    add(model, "other", dict(block=8, dense_head=3, dense_tail=2, ratios=((4, 1), (8, 8), (1, 2))))
    add(model, "same classes", dict(MAIN, block=8))
    add(model, "swapped", dict(MAIN, ratios=((4, 2), (1, 1), (2, 2))))
    first, second, third = prompts(30, 37, 25)
    cache = DynamicCache(config=model.config)
    turn = model.generate(first, past_key_values=cache, **GREEDY)
    ids = torch.cat((turn, second), dim=1)
    mine = rule(model, "default")
    for name in ("other", "same classes", "swapped", None):
        select = None if name is None else rule(model, name)
        branch = copy.deepcopy(cache)
        turns = [Segment(30, mine, 2), Segment(5), Segment(38, select, 1)]
        with model.use_plugin(name):
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), past_key_values=branch, **FULL, **GREEDY
            )
        check_steps(model, out, ids, turns)
        read = plain.read(model.base, out.sequences[:, :-1], [*turns, Segment(5)])
        assert held(model, model.kv_cache_report(branch)) == pytest.approx(wanted_entries(model, read)), name
        # and back to the first
        again = torch.cat((out.sequences, third), dim=1)
        out = model.generate(
            again, attention_mask=torch.ones_like(again), past_key_values=branch, **FULL, **GREEDY
        )
        check_steps(model, out, again, [*turns, Segment(5), Segment(26, mine, 1)])


@torch.no_grad()
def test_going_on_without_a_plugin(decoder, settings):
    """What it left stays; all that follows is dense, in one pass and token by token."""
    model = make(decoder, settings)
    (ids,) = prompts(50)
    turns = [Segment(38, rule(model), model.plugin().config.dense_head), Segment(12)]
    wanted = plain.read(model.base, ids, turns).logits[38:]
    cache = model(ids[:, :38], use_cache=True).past_key_values
    with model.disable_plugin():
        one, many = copy.deepcopy(cache), copy.deepcopy(cache)
        close(model(ids[:, 38:], past_key_values=one).logits[0], wanted)
        steps = [model(ids[:, i : i + 1], past_key_values=many).logits[0, 0] for i in range(38, 50)]
    close(torch.stack(steps), wanted)


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_a_dense_turn_before_the_first_reduced_one(decoder):
    model = make(decoder)
    (ids,) = prompts(60)
    with model.disable_plugin():
        context = model.compress(ids[:, :20])
    out = model.generate(ids[:, 20:], context=context, **FULL, **GREEDY)
    check_steps(model, out, ids, [Segment(20), Segment(40, rule(model))])


@pytest.mark.parametrize("other", ["merging first", "merging second"])
def test_merged_and_chosen_turns(other):
    """A plugin that merges and one that chooses over one cache: refused, or each turn's entries are its own."""
    model = make("llama")
    model.add_plugin("merged", VariatorConfig(k=2, sites=("kv",), dense_head=2, dense_tail=2)).double()
    names = ("merged", "default") if other == "merging first" else ("default", "merged")
    first, second = prompts(30, 37)
    cache = DynamicCache(config=model.config)
    with model.use_plugin(names[0]):
        turn = model.generate(first, past_key_values=cache, **GREEDY)
    before = held(model, model.kv_cache_report(cache))
    try:
        with model.use_plugin(names[1]):
            ids = torch.cat((turn, second), dim=1)
            model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)
    except VariatorError:
        return
    counts = {
        "merged": [1 + (38 - 1 - 2) // 2 + (38 - 1) - (38 - 1 - 2) // 2 * 2] * LAYERS,
        "default": [sum(by_hand(38, k, 4, 1, 3) for k in row) / 2 for row in MAIN["ratios"]],
    }
    after = held(model, model.kv_cache_report(cache))
    assert [b - a for a, b in zip(before, after, strict=True)] == [n + 5 for n in counts[names[1]]]


# Other ways to generate.


def score_of(model: VariatorModel, sequence: torch.Tensor, prompt: int) -> float:
    """Log-probability of what was generated, by the plain form."""
    logits = expected(model, sequence[None], prompt).logits[prompt - 1 : -1].log_softmax(-1)
    return float(logits.gather(-1, sequence[prompt:, None]).sum())


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_beams_have_the_scores_of_the_plain_form(decoder):
    model = make(decoder)
    (ids,) = prompts(33)
    for chunk in (None, 8):
        out = model.generate(
            ids,
            num_beams=3,
            num_return_sequences=3,
            length_penalty=0.0,
            output_scores=True,
            prefill_chunk_size=chunk,
            **FULL,
            **GREEDY,
        )
        wanted = [score_of(model, sequence, 33) for sequence in out.sequences]
        assert out.sequences_scores.tolist() == pytest.approx(wanted, abs=1e-4)  # kept in fp32
        assert wanted == sorted(wanted, reverse=True)
        best = score_of(model, model.generate(ids, **GREEDY)[0], 33)
        assert wanted[0] >= best - 1e-6


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_beams_of_a_padded_batch_and_after_a_context(decoder):
    model = make(decoder)
    rows = prompts(12, 33, 25)
    out = model.generate(**pad(rows, "left"), num_beams=3, **GREEDY)
    for i, row in enumerate(rows):
        assert torch.equal(out[i, -6:], model.generate(row, num_beams=3, **GREEDY)[0, -6:])
    document, question = prompts(41, 19)
    options = dict(num_beams=3, num_return_sequences=2, length_penalty=0.0, output_scores=True)
    found = model.generate(question, context=model.compress(document), **options, **FULL, **GREEDY)
    ids, parts = document, [Segment(41, rule(model), 2), Segment(19, rule(model)), Segment(6)]
    for sequence, told in zip(found.sequences, found.sequences_scores, strict=True):
        logits = (
            plain.read(model.base, torch.cat((ids, sequence[None]), 1), parts).logits[-7:-1].log_softmax(-1)
        )
        assert float(told) == pytest.approx(float(logits.gather(-1, sequence[-6:, None]).sum()), abs=1e-4)


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_each_sampled_sequence_goes_on_from_the_same_prompt(decoder):
    model = make(decoder)
    rows = prompts(33, 21)
    options = dict(do_sample=True, max_new_tokens=6, num_return_sequences=4, **FULL)
    torch.manual_seed(3)
    out = model.generate(**pad(rows, "left"), **options)
    assert len({tuple(row) for row in out.sequences.tolist()}) > 4
    for i in range(8):
        row = rows[i // 4]
        check_steps(model, out, row, [first(model, row.shape[1])], i, greedy=False)
    torch.manual_seed(3)
    assert torch.equal(model.generate(**pad(rows, "left"), **options).sequences, out.sequences)


def test_streaming_yields_the_generated_text():
    model, tokenizer = make("llama"), byte_tokenizer()
    (ids,) = prompts(33)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(target=model.generate, kwargs=dict(input_ids=ids, streamer=streamer, **GREEDY))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(plain.greedy(model.base, ids, [first(model, 33)], 6)[0])


@pytest.mark.parametrize(
    "options",
    [
        dict(repetition_penalty=1.5),
        dict(no_repeat_ngram_size=1),
        dict(num_beams=1, num_return_sequences=1),
        dict(do_sample=True, temperature=1e-4),
    ],
)
@torch.no_grad()
def test_settings_of_generate_work_on_the_same_logits(options):
    model = make("llama")
    (ids,) = prompts(33)
    out = model.generate(ids, **FULL, **(GREEDY | options))
    check_steps(model, out, ids, [first(model, 33)], greedy=False)


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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(cache_implementation="static"), "leave it out"),
        (dict(cache_implementation="paged"), "leave it out"),
        (dict(guidance_scale=2.0), "leave it out"),
        (dict(output_attentions=True, return_dict_in_generate=True), "leave out output_attentions"),
    ],
)
def test_what_generate_refuses(options, message):
    with pytest.raises(VariatorError, match=message):
        make("llama").generate(prompts(40)[0], **options, **GREEDY)


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
