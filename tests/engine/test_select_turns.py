"""Several turns with kept keys: over one cache, over contexts, and with plugins that change in between."""

from __future__ import annotations

import copy

import pytest
import reference_select as plain
import torch
from conftest import pad, prompts
from reference_select import Segment
from selecting import (
    FEW,
    FULL,
    GREEDY,
    LAYERS,
    MAIN,
    add,
    by_hand,
    check_steps,
    close,
    every_setting,
    held,
    make,
    rule,
    wanted_entries,
)
from transformers import DynamicCache

from llm_variator import VariatorConfig, VariatorError

pytest_generate_tests = every_setting


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
