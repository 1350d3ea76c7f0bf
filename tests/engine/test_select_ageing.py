"""Decode-time compression with the compressor "select", against its plain form (tests/reference_ageing_select.py)."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import reference_ageing_select as plain
import selecting
import torch
from conftest import make_decoder, pad, prompts
from reference_select import Segment
from selecting import FEW, FULL, LAYERS, STEP, choose, close, config_for, first, held, make, rule, slides
from transformers import DynamicCache

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.cache import SelectedLayer

CONFIGS = {
    "short tail": dict(selecting.CONFIGS["short tail"], decode_block=4),
    "long tail": dict(selecting.CONFIGS["long tail"], decode_block=8),
    "dense layer": dict(selecting.CONFIGS["dense layer"], decode_block=8),
    "no tail": dict(block=4, dense_head=1, dense_tail=0, decode_block=12, ratios=((1, 4), (4, 2), (2, 4))),
    "ffn": dict(selecting.CONFIGS["ffn"], decode_block=4),
}
MAIN = CONFIGS["short tail"]
ANSWER = dict(do_sample=False, max_new_tokens=24)


def pytest_generate_tests(metafunc):
    """Llama with all settings, other families with one."""
    if "settings" not in metafunc.fixturenames:
        return
    cases = [("llama", name) for name in CONFIGS]
    cases += [(name, "short tail") for name in ("llama-mha", "mistral", "qwen2", "qwen3", "gemma3")]
    values = [pytest.param(decoder, CONFIGS[name], id=f"{decoder}-{name}") for decoder, name in cases]
    metafunc.parametrize(("decoder", "settings"), values)


def kept(model: VariatorModel, read) -> list[float]:
    """Entries per head that the plain form has, of each layer that sees all of its past."""
    counts = [read.entries(i) for i in range(LAYERS) if not slides(model, i)]
    return [sum(layer) / len(layer) for layer in counts]


def positions(cache) -> list[list[list[int]]]:
    """Of every layer that chooses, and each head, where the entries of the first row stand, fillers left out."""
    found = []
    for layer in cache.layers:
        if isinstance(layer, SelectedLayer):
            own = {}
            for one in layer.classes:
                own |= dict(zip(one.heads, layer.columns(one)[0].tolist(), strict=True))
            found.append([[c for c in own[head] if c >= 0] for head in sorted(own)])
    return found


def chosen(model: VariatorModel, read) -> list[list[list[int]]]:
    """The same of the plain form."""
    return [read.kept[i] for i in sorted(model.plugin().selects)]


@torch.no_grad()
def check(model: VariatorModel, out, ids: torch.Tensor, segments: list[Segment], row: int = 0):
    """What was generated after `ids` is what the plain form generates, with its logits."""
    new = out.sequences[row, -len(out.logits) :]
    read = plain.read(model, torch.cat((ids, new[None]), 1), [*segments, Segment(len(new))])
    wanted = read.logits[-len(new) - 1 : -1]
    close(torch.stack(out.logits)[:, row].double(), wanted, STEP)
    assert torch.equal(wanted.argmax(-1), new)
    return read


@pytest.mark.parametrize("length", [1, 7, 34])
@torch.no_grad()
def test_generated_tokens_equal_the_plain_form(decoder, settings, length):
    model = make(decoder, settings)
    (ids,) = prompts(length)
    out = model.generate(ids, **FULL, **ANSWER)
    check(model, out, ids, [first(model, length)])
    read = plain.read(model, out.sequences[:, :-1], [first(model, length), Segment(23)])
    assert positions(out.past_key_values) == chosen(model, read)
    assert held(model, model.kv_cache_report(out.past_key_values)) == pytest.approx(kept(model, read))


@pytest.mark.parametrize("length", [0, 1, 7, 34])
@torch.no_grad()
def test_teacher_forcing_equals_the_plain_form(decoder, settings, length):
    """However the continuation is cut into passes, with a cache and without."""
    model = make(decoder, settings)
    (ids,) = prompts(64)
    parts = [first(model, length), Segment(64 - length)]
    read = plain.read(model, ids, [part for part in parts if part.tokens])
    for use_cache in (False, True):
        out = model(ids, prompt_length=length, use_cache=use_cache)
        close(out.logits[0], read.logits)
    assert positions(out.past_key_values) == chosen(model, read)
    close(model(ids, prompt_length=length, logits_to_keep=13).logits[0], read.logits[-13:])
    for cut in (3, 11):
        cache = DynamicCache(config=model.config)
        logits = [model(ids[:, : length + 1], prompt_length=length, past_key_values=cache).logits[0]]
        for start in range(length + 1, 64, cut):
            part = ids[:, start : start + cut]
            logits.append(model(part, prompt_length=0, past_key_values=cache).logits[0])
        close(torch.cat(logits), read.logits)
        assert positions(cache) == chosen(model, read)


@torch.no_grad()
def test_single_precision():
    model = make("llama", dtype=torch.float32, settings=MAIN)
    (ids,) = prompts(34)
    out = model.generate(ids, **FULL, do_sample=False, max_new_tokens=60)
    forced = model(out.sequences, prompt_length=34).logits[0, 33:-1]
    close(torch.stack(out.logits)[:, 0], forced, 1e-4)
    read = plain.read(model, out.sequences, [first(model, 34), Segment(60)])
    close(forced, read.logits[33:-1], 1e-4)


@pytest.mark.parametrize(
    ("block", "tail", "step"), [(16, 16, 16), (16, 5, 32), (64, 64, 64), (64, 1, 64), (8, 20, 8)]
)
@torch.no_grad()
def test_a_long_answer_holds_a_share_and_a_window(block, tail, step):
    settings = dict(block=block, dense_head=4, dense_tail=tail, decode_block=step, ratios=((4, 8), (2, 8)))
    model = make("llama", settings, torch.float32, num_hidden_layers=2, max_position_embeddings=1024)
    cache = model(prompts(150)[0], use_cache=True).past_key_values
    near, begin = max(tail, block), 150 - tail
    inner = begin - 4
    for token in range(420):
        model(prompts(1, seed=token)[0], past_key_values=cache, logits_to_keep=1)
        window = tail + token + 1
        gone = max(0, (window - 1 - near) // step) * step
        assert window - gone <= near + step
        for layer, ratios in zip(cache.layers, settings["ratios"], strict=True):
            for count, k in zip(layer.counts, ratios, strict=True):
                old = inner // block * (block // k) + -(-(inner % block) // k)
                assert count == 4 + old + gone // k + window - gone
                assert count <= 4 + near + step + (layer.tokens - 4 - near - step) / k + 2
            assert all(one.store.keys.shape[-2] == one.entries for one in layer.classes)
            assert layer.window.scores.shape[-1] <= near + step
    report = model.kv_cache_report(cache)
    assert report.layers[0].index_bytes > sum(one.columns.nbytes for one in cache.layers[0].classes)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["short tail", "long tail"])
@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_padding_never_changes_a_result(decoder, name, side):
    """Rows age by their own tokens, whatever stands beside them."""
    model = make(decoder, CONFIGS[name])
    rows = prompts(1, 8, 19, 30, 41)
    batch = pad(rows, side)
    out = model.generate(**batch, **FULL, **ANSWER)
    for i, row in enumerate(rows):
        check(model, out, row, [first(model, row.shape[1])], i)
    lengths = torch.tensor([0, 3, 19, 12, 33])
    logits = model(**batch, prompt_length=lengths).logits
    cached = model(**batch, prompt_length=lengths, use_cache=True).logits
    for i, row in enumerate(rows):
        n = int(lengths[i])
        parts = [first(model, n), Segment(row.shape[1] - n)]
        wanted = plain.read(model, row, [part for part in parts if part.tokens]).logits
        for found in (logits, cached):
            close(found[i, batch["attention_mask"][i].bool()], wanted, STEP)


@pytest.mark.parametrize("chunk", [1, 7, 30])
@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_chunks(decoder, chunk):
    model = make(decoder, MAIN)
    rows = prompts(61, 1, 9, 10, 44)
    for row in rows[:4]:
        out = model.generate(row, prefill_chunk_size=chunk, **FULL, **ANSWER)
        read = check(model, out, row, [first(model, row.shape[1])])
        assert positions(out.past_key_values)[0][0][:5] == read.kept[0][0][:5]
    for side in ("left", "right"):
        out = model.generate(**pad(rows, side), prefill_chunk_size=chunk, **FULL, **ANSWER)
        for i, row in enumerate(rows):
            check(model, out, row, [first(model, row.shape[1])], i)


def turns(model: VariatorModel, spoken: list[tuple[int, int]]) -> list[Segment]:
    """Segments of a conversation, (question, answer); the last token of an answer is read with the next question."""
    found, unread = [], 0
    for question, answer in spoken:
        head = model.plugin().config.dense_head if not found else unread
        found.append(Segment(question + unread, rule(model), head))
        unread = 1
        found.append(Segment(answer - 1))
    return [segment for segment in found if segment.tokens]


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_turns_over_a_cache_and_over_contexts(decoder):
    """Long questions end the window, short ones join it."""
    model = make(decoder, MAIN)
    spoken, questions = [(33, 17), (4, 9), (25, 30), (3, 1), (8, 20)], prompts(33, 4, 25, 3, 8)
    cache, whole = DynamicCache(config=model.config), torch.empty(1, 0, dtype=torch.long)
    context = chunked = None
    for turn, (question, (_, answer)) in enumerate(zip(questions, spoken, strict=True), 1):
        whole = torch.cat((whole, question), 1)
        options = dict(do_sample=False, max_new_tokens=answer)
        mask = torch.ones_like(whole)
        out = model.generate(whole, attention_mask=mask, past_key_values=cache, **FULL, **options)
        segments = turns(model, [*spoken[: turn - 1], (spoken[turn - 1][0], 1)])
        check(model, out, whole, segments)
        whole = out.sequences
        read = plain.read(model, whole[:, :-1], turns(model, spoken[:turn]))
        assert positions(cache) == chosen(model, read)
        if context is None:  # a context's document is no question: its answer comes after another segment
            context, chunked = model.compress(question), model.compress(question, prefill_chunk_size=7)
            continue
        options |= dict(return_context=True)
        same, context = model.generate(question, context=context, **options)
        again, chunked = model.generate(question, context=chunked, prefill_chunk_size=5, **options)
        assert torch.equal(same, again)
        assert positions(context.cache) == positions(chunked.cache)


@pytest.mark.parametrize("decoder", ["llama", "qwen3"])
@torch.no_grad()
def test_turns_of_a_batch(decoder):
    """Rows close their windows, and age, at different tokens."""
    model = make(decoder, MAIN)
    documents, asked, more = prompts(33, 12, 5), prompts(25, 4, 9, seed=1), prompts(6, 30, 3, seed=2)
    context = model.compress([row[0].tolist() for row in documents])
    ids = [row[0].tolist() for row in asked]
    answers, context = model.generate(ids, context=context, return_context=True, **ANSWER)
    out = model.generate([row[0].tolist() for row in more], context=context, **FULL, **ANSWER)
    for i, row in enumerate(documents):
        whole = torch.cat((row, asked[i], answers[i : i + 1, -24:], more[i]), dim=1)
        segments = [first(model, row.shape[1]), Segment(asked[i].shape[1], rule(model)), Segment(23)]
        check(model, out, whole, [*segments, Segment(more[i].shape[1] + 1, rule(model), 1)], i)


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_answers_to_one_context_age_apart(decoder):
    model = make(decoder, MAIN)
    document, questions = prompts(33)[0], prompts(9, 4, 25, seed=3)
    context = model.compress(document)
    before = context.entries
    together = model.generate([row[0].tolist() for row in questions], context=context, **ANSWER)
    for i, question in enumerate(questions):
        alone, after = model.generate(question, context=context, return_context=True, **FULL, **ANSWER)
        check(
            model,
            alone,
            torch.cat((document, question), 1),
            [first(model, 33), Segment(question.shape[1], rule(model))],
        )
        assert torch.equal(together[i, -24:], alone.sequences[0, -24:])
        fork = after.fork()
        more, again = (model.generate(prompts(6, seed=8)[0], context=c, **ANSWER) for c in (after, fork))
        assert torch.equal(more, again)
    assert context.entries == before


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_beams_and_samples(decoder):
    """Each has the scores of its own tokens."""
    model = make(decoder, MAIN)
    ids, short = prompts(33, 7)
    out = model.generate(
        **pad([ids, short], "left"),
        num_beams=3,
        max_new_tokens=20,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for i, row in enumerate((ids, short)):
        sequence = torch.cat((row[0], out.sequences[i, -20:]))[None]
        logits = plain.read(model, sequence, [first(model, row.shape[1]), Segment(20)]).logits
        told = logits[-21:-1].log_softmax(-1).gather(-1, sequence[0, -20:, None]).sum() / 20
        assert float(told) == pytest.approx(float(out.sequences_scores[i]), abs=1e-5)
    torch.manual_seed(3)
    out = model.generate(ids, do_sample=True, max_new_tokens=20, num_return_sequences=3, **FULL)
    for i in range(3):
        new = out.sequences[i, 33:]
        read = plain.read(model, torch.cat((ids[0], new))[None], [first(model, 33), Segment(20)])
        close(torch.stack(out.logits)[:, i].double(), read.logits[32:-1], STEP)


@torch.no_grad()
def test_no_token_moves_what_comes_before_it():
    model = make("llama", MAIN)
    (ids,) = prompts(60)
    before = model(ids.repeat(60, 1), prompt_length=20).logits[0]
    changed = ids.repeat(60, 1)
    each = torch.arange(60)
    changed[each, each] = (ids[0] - 2) % 90 + 3
    after = model(changed, prompt_length=20).logits
    for j in range(60):
        close(after[j, :j], before[:j], 1e-10)
        assert (after[j, j] - before[j]).abs().max() > 1e-6, j


@torch.no_grad()
def test_off_changes_nothing():
    model, other = make("llama", MAIN), make("llama", dict(MAIN, decode_block=None))
    (ids,) = prompts(34)
    out = other.generate(ids, **FULL, **ANSWER)
    assert all(layer.window is None and not any(layer.aged) for layer in out.past_key_values.layers)
    aged = model.generate(ids, **FULL, **ANSWER)
    close(torch.stack(aged.logits)[:5], torch.stack(out.logits)[:5], STEP)
    assert (aged.logits[-1] - out.logits[-1]).abs().max() > 1e-3


@pytest.mark.parametrize("between", [None, "merged", "intact", "other", "renewed"])
@torch.no_grad()
def test_another_plugin_in_between_ends_the_window(between):
    """What it has read, and what waited, stays dense; the next tokens open a window of their own."""
    model = make("llama", MAIN)
    model.add_plugin("merged", VariatorConfig(k=2, sites=("kv",), dense_head=2, dense_tail=2))
    for name, change in (
        ("intact", dict(decode_block=None)),
        ("other", dict(decode_block=8)),
        ("renewed", {}),
    ):
        settings = MAIN | change
        choose(model.add_plugin(name, config_for(settings, 2)), seed=7)
    model.double()
    (ids,) = prompts(90)
    cache = model(ids[:, :34], use_cache=True).past_key_values
    for i in range(34, 41):
        model(ids[:, i : i + 1], past_key_values=cache)
    assert cache.layers[0].window.lengths == (6,)
    before = positions(cache)
    with model.use_plugin(between):
        model(ids[:, 41:42], past_key_values=cache)
    window = cache.layers[0].window
    assert window is None if between in (None, "merged", "intact") else window.lengths == (1,)
    for i in range(42, 90):
        model(ids[:, i : i + 1], past_key_values=cache)
    after = positions(cache)
    for layer, (old, new) in enumerate(zip(before, after, strict=True)):
        for head, k in enumerate(MAIN["ratios"][layer]):
            assert [c for c in new[head] if c < 41] == old[head]
            aged = [c for c in new[head] if c > 41]
            assert len(aged) == 40 // k + 8


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@torch.no_grad()
def test_copies_of_a_cache_go_on(copied):
    model = make("llama", MAIN)
    ids, more = prompts(34, 20)
    cache = model(ids, use_cache=True).past_key_values
    for i in range(9):
        model(more[:, i : i + 1], past_key_values=cache)
    other = copied(cache)
    for i in range(9, 20):
        logits = [model(more[:, i : i + 1], past_key_values=one).logits for one in (cache, other)]
        assert torch.equal(*logits)
    assert positions(cache) == positions(other)


@torch.no_grad()
def test_rows_that_end_early_in_a_turn():
    """What stands behind their end is forgotten; the rest still waits where nothing was reduced since."""
    model = make("llama", MAIN)
    rows = prompts(33, 30)
    context = model.compress([row[0].tolist() for row in rows])
    free = model.generate([[5, 6, 7], [8, 9, 10]], context=context, do_sample=False, max_new_tokens=5)
    end = int(free[1, -3])
    _, after = model.generate(
        [[5, 6, 7], [8, 9, 10]],
        context=context,
        return_context=True,
        do_sample=False,
        max_new_tokens=5,
        eos_token_id=end,
        pad_token_id=0,
    )
    lengths = after.cache.layers[0].window.lengths
    assert lengths[1] < lengths[0]
    again = model.generate([[5, 6, 7, 8], [8, 9, 10]], context=after, **ANSWER)
    assert again.shape[1] == 4 + 24


@torch.no_grad()
def test_the_proof_notices_tokens_that_do_not_age(monkeypatch):
    model = make("llama", MAIN)
    (ids,) = prompts(34)
    cache = model(ids, use_cache=True).past_key_values
    monkeypatch.setattr(SelectedLayer, "age", lambda self, old: None)
    with pytest.raises(VariatorError, match="tokens that are to age"):
        model(ids[:, :12], prompt_length=0, past_key_values=cache)
    monkeypatch.setattr(SelectedLayer, "remember", lambda self, rule, scores: None)
    with pytest.raises(VariatorError, match="forgot which of its tokens"):
        model(ids, use_cache=True)


def test_gradients_pass_and_scores_are_trained_without():
    model = make("llama", MAIN)
    (ids,) = prompts(60)
    with pytest.raises(VariatorError, match="train without decode_block"):
        model(ids, prompt_length=30).logits.sum().backward()
    model(ids, prompt_length=56).logits.square().mean().backward()
    assert model.plugin().selects[0].score.weight.grad.abs().max() > 0
    for parameter in model.plugin().parameters():
        parameter.requires_grad_(False)
    embedded = model.base.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded, prompt_length=30).logits.square().mean().backward()
    assert (embedded.grad.abs().amax(-1) > 0).all()


def test_what_is_refused(tmp_path):
    with pytest.raises(VariatorError, match=r"decode_block must be a multiple of block \(4\), got 6"):
        config_for(MAIN | dict(decode_block=6), 2)
    with pytest.raises(VariatorError, match="decode_block must be an integer >= 1"):
        config_for(MAIN | dict(decode_block=0), 2)
    model = make("llama", dict(MAIN, decode_block=None))
    model.save_pretrained(tmp_path)
    other = VariatorModel(make_decoder("llama"))
    with pytest.raises(VariatorError, match="multiple of block"):
        other.load_plugin(tmp_path, "ages", decode_block=3)
    assert not other.plugins
    other.load_plugin(tmp_path, "ages", decode_block=8)
    assert other.plugins["ages"] == dataclasses.replace(model.plugin().config, decode_block=8)
    merging = VariatorConfig(k=2, sites=("kv",), decode_block=4)
    model.add_plugin("merging", merging).double()
    cache = model(prompts(34)[0], use_cache=True).past_key_values
    with model.use_plugin("merging"), pytest.raises(VariatorError, match="cannot merge tokens"):
        model(prompts(1)[0], past_key_values=cache)
