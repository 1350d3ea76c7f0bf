"""The compressor "select" against its plain form (tests/reference_select.py), and what must hold of it."""

from __future__ import annotations

import pytest
import torch
from conftest import make_decoder, pad, prompts
from reference_select import Segment
from selecting import (
    CONFIGS,
    EXACT,
    FEW,
    FULL,
    GREEDY,
    LAYERS,
    MAIN,
    STEP,
    check_steps,
    close,
    config_for,
    every_setting,
    expected,
    first,
    held,
    make,
    wanted_entries,
)

from llm_variator import VariatorModel

pytest_generate_tests = every_setting


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
