"""Contexts: what goes on from them equals a conversation over one cache; they are shared, never changed."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from conftest import make_decoder, make_variator, pad, prompts, randomise
from transformers import DynamicCache

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.contexts import CompressedContext
from llm_variator.sources.models import byte_tokenizer

MIXED = VariatorConfig(k={"ffn": 4, "kv": 3}, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=3)
GREEDY = dict(do_sample=False, max_new_tokens=5)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def turn(model, ids, cache=None, **options):
    """One turn as Hugging Face's generate does it: all ids so far, over one cache."""
    return model.generate(ids, past_key_values=cache, **GREEDY, **options)


def snapshot(context) -> list:
    return [copy.deepcopy(layer) for layer in context.cache.layers]


def unchanged(context, before) -> bool:
    return all(
        torch.equal(now.keys, was.keys) and torch.equal(now.values, was.values)
        for now, was in zip(context.cache.layers, before, strict=True)
    )


def test_questions_equal_a_second_turn(decoder):
    model = make_variator(decoder, MIXED)
    document, question = prompts(50, 9)
    context = model.compress(document)
    before = snapshot(context)
    for _ in range(2):
        out = model.generate(question, context=context, **GREEDY)
        cache = model(document, use_cache=True).past_key_values
        whole = turn(model, torch.cat((document, question), dim=1), cache)
        assert torch.equal(out, whole[:, 50:])
    assert unchanged(context, before)
    held = len(reference.entries(50, 50, 3, 2, 3))
    slides = [model._architecture.slides(model.base, i) for i in range(3)]
    assert context.entries == tuple(7 if slide else held for slide in slides)


def test_many_questions_in_one_batch(decoder):
    """Ragged, right- and left-padded, chunked or not: each row answers as it does alone."""
    model = make_variator(decoder, MIXED)
    context = model.compress(prompts(50)[0])
    questions = prompts(9, 20, 3, 1, seed=5)
    alone = [model.generate(row, context=context, **GREEDY)[0, -5:] for row in questions]
    for side in ("left", "right"):
        for chunk in (None, 13):
            batch = pad(questions, side)
            out = model.generate(**batch, context=context, prefill_chunk_size=chunk, **GREEDY)
            assert out.shape == (4, 25)
            assert torch.equal(out[:, -5:], torch.stack(alone))
            assert torch.equal(out[1, :20], questions[1][0])


def test_a_batch_of_contexts(decoder):
    model = make_variator(decoder, MIXED)
    documents, questions = prompts(50, 21, 1, 36), prompts(9, 4, 4, 12, seed=5)
    for chunk in (None, 13)[decoder != "gemma3" :]:
        contexts = model.compress([row[0].tolist() for row in documents], prefill_chunk_size=chunk)
        out = model.generate([row[0].tolist() for row in questions], context=contexts, **GREEDY)
        same = model.generate(questions[0], context=contexts, **GREEDY)
        for i, document in enumerate(documents):
            alone = model.compress(document)
            assert torch.equal(out[i, -5:], model.generate(questions[i], context=alone, **GREEDY)[0, -5:])
            assert torch.equal(same[i, -5:], model.generate(questions[0], context=alone, **GREEDY)[0, -5:])


@pytest.mark.parametrize("options", [dict(num_beams=3), dict(num_beams=3, num_return_sequences=2)])
def test_beams_after_a_context(decoder, options):
    model = make_variator(decoder, MIXED)
    document, question = prompts(40, 9)
    out = model.generate(question, context=model.compress(document), **options, **GREEDY)
    cache = model(document, use_cache=True).past_key_values
    cache.batch_repeat_interleave(3)
    whole = turn(model, torch.cat((document, question), dim=1), cache, **options)
    assert torch.equal(out, whole[:, 40:])


def test_extending_reads_the_new_segment_only(decoder):
    model = make_variator(decoder, MIXED)
    document, more, question = prompts(50, 31, 9)
    context = model.compress(document)
    before, widths = snapshot(context), []
    handle = model.base.model.embed_tokens.register_forward_hook(lambda m, a, o: widths.append(o.shape[1]))
    longer = context.extend(more)
    chunked = context.extend(more, prefill_chunk_size=12)
    handle.remove()
    assert widths == [31, 12, 12, 7]
    assert unchanged(context, before)
    cache = model(document, use_cache=True).past_key_values
    model(more, past_key_values=cache)
    whole = turn(model, torch.cat((document, more, question), dim=1), cache)
    for extended in (longer, chunked):
        assert extended.tokens == 81
        assert torch.equal(model.generate(question, context=extended, **GREEDY), whole[:, 81:])


def test_ragged_extensions(decoder):
    model = make_variator(decoder, MIXED)
    context = model.compress(prompts(30)[0])
    more, question = prompts(20, 7, 13, seed=4), prompts(6, seed=7)[0]
    for chunk in (None, 13):
        together = context.extend([row[0].tolist() for row in more], prefill_chunk_size=chunk)
        out = model.generate(question, context=together, **GREEDY)
        for i, row in enumerate(more):
            alone = model.generate(question, context=context.extend(row), **GREEDY)
            assert torch.equal(out[i, -5:], alone[0, -5:])


def test_several_turns(decoder):
    """Each turn's context goes on from the answer before it, whose last token no pass has read yet."""
    model = make_variator(decoder, MIXED)
    document, *questions = prompts(40, 9, 14, 5)
    context = model.compress(document)
    cache, whole = model(document, use_cache=True).past_key_values, document
    for question in questions:
        answer, context = model.generate(question, context=context, return_context=True, **GREEDY)
        whole = turn(model, torch.cat((whole, question), dim=1), cache)
        assert torch.equal(answer, whole[:, -answer.shape[1] :])
        assert torch.equal(context.input_ids, whole)


def test_rows_that_ended_early_go_on_as_they_do_alone():
    model = make_variator("llama", VariatorConfig(k=3, sites=("kv",), r=5, dense_head=2, dense_tail=3))
    documents, question = prompts(30, 30), prompts(2, seed=3)[0]
    contexts = [model.compress(row) for row in (*documents, torch.cat(documents))]
    first = model.generate(question, context=contexts[2], **GREEDY)
    options = dict(eos_token_id=int(first[0, 4]), pad_token_id=0, **GREEDY)  # row 0 ends after three tokens
    assert int(first[0, 4]) not in first[1]
    after = [model.generate(question, context=c, return_context=True, **options)[1] for c in contexts]
    assert after[2].attention_mask[0, -2:].tolist() == [0, 0]
    logits = []
    for context in after:
        out = model.generate(
            question, context=context, output_logits=True, return_dict_in_generate=True, **GREEDY
        )
        logits.append(torch.stack(out.logits))
    torch.testing.assert_close(logits[2][:, 1], logits[1][:, 0], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits[2][:, 0], logits[0][:, 0], atol=1e-4, rtol=0)


def test_threads_share_one_context():
    model = make_variator("llama", MIXED)
    context = model.compress(prompts(60)[0])
    questions = prompts(*range(3, 11), seed=2)
    expected = [model.generate(row, context=context, **GREEDY) for row in questions]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda row: model.generate(row, context=context, **GREEDY), questions))
    assert all(torch.equal(a, b) for a, b in zip(together, expected, strict=True))


def test_forks_hold_one_copy_of_the_context():
    model = make_variator("llama", MIXED)
    context = model.compress(prompts(60)[0])
    (question,) = prompts(4, seed=2)
    storage = context.cache.layers[0].keys.untyped_storage().data_ptr()
    forks = [
        model.generate(question.repeat(rows, 1), context=context, return_context=True, **GREEDY)[1]
        for rows in (1, 3)
    ]
    forks.append(forks[0].extend(prompts(20)[0]))
    for fork in forks:
        store = fork.cache.layers[0].store
        assert store.parts[0][0].untyped_storage().data_ptr() == storage
        own = fork.cache.layers[0].entries - context.cache.layers[0].entries
        assert sum(keys.shape[2] for keys, _ in store.parts[1:]) + store.keys.shape[2] == own
        assert store.keys.shape[0] == fork.rows
        report = fork.report()
        shared = sum(2 * keys.nbytes for layer in fork.cache.layers for keys, _ in layer.store.parts)
        assert report.shared_bytes == shared
        assert report.dense_bytes == 3 * 2 * fork.rows * 2 * 8 * 4 * fork.cache.get_seq_length()


def test_a_context_may_be_dense_and_questions_may_use_another_plugin():
    model = make_variator("llama", MIXED)
    document, question = prompts(40, 20)
    with model.disable_plugin():
        dense = model.compress(document)
        expected = model.base.generate(torch.cat((document, question), dim=1), **GREEDY)
        assert torch.equal(model.generate(question, context=dense, **GREEDY), expected[:, 40:])
        assert dense.entries == (40, 40, 40)
        assert dense.extend(question).entries == (60, 60, 60)
    compressed = model.compress(document)
    with model.disable_plugin():
        model.generate(question, context=compressed, **GREEDY)
        assert model.kv_cache_report().layers[0].entries == compressed.entries[0] + 20 + 4
        assert compressed.extend(question).entries[0] < compressed.entries[0] + 20  # by its own plugin


def test_text_and_messages():
    model = make_variator("llama", MIXED, vocab_size=259)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    text = model.compress("A document of some length.", tokenizer=tokenizer)
    ids = model.compress(tokenizer("A document of some length.").input_ids)
    assert torch.equal(text.input_ids, ids.input_ids)
    out = model.generate(" And a question?", context=text, **GREEDY)
    same = model.generate(tokenizer(" And a question?", return_tensors="pt"), context=ids, **GREEDY)
    assert torch.equal(out, same)

    system, asked = [{"role": "system", "content": "A document."}], [{"role": "user", "content": "Why?"}]
    context = model.compress(system, tokenizer=tokenizer)
    answer, after = model.generate(asked, context=context, return_context=True, **GREEDY)
    assert tokenizer.decode(answer[0, :-5]) == "<user>Why?</s><assistant>"
    said = tokenizer.decode(answer[0, -5:], skip_special_tokens=True)
    assert after.messages == [[*system, *asked, {"role": "assistant", "content": said}]]
    answer, _ = model.generate(asked, context=after, return_context=True, **GREEDY)
    assert tokenizer.decode(answer[0, :-5]) == "</s><user>Why?</s><assistant>"
    assert model.compress([system, system], tokenizer=tokenizer).rows == 2


def test_lone_surrogates_are_replaced(tmp_path):
    model = make_variator("llama", MIXED, vocab_size=259)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    text = model.compress("A caf\ud83d x of some length.", tokenizer=tokenizer)
    assert tokenizer.decode(text.input_ids[0]) == "A caf\ufffd x of some length."
    model.generate(" caf\udce9?", context=text, **GREEDY)

    system, asked = [{"role": "system", "content": "caf\ud83d"}], [{"role": "user", "content": "\udce9"}]
    context = model.compress(system, tokenizer=tokenizer)
    answer, after = model.generate(asked, context=context, return_context=True, **GREEDY)
    assert tokenizer.decode(answer[0, :-5]) == "<user>\ufffd</s><assistant>"
    model.generate(asked, context=after, **GREEDY)
    context.save(tmp_path / "saved")
    again = CompressedContext.load(tmp_path / "saved", model, tokenizer=tokenizer)
    assert again.messages == [system]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c: m.compress("text"), "need a tokenizer"),
        (lambda m, c: m.compress([]), "prompt is empty"),
        (lambda m, c: m.compress(3.5), "expected token ids"),
        (lambda m, c: m.compress([[1, 2], []]), "prompt is empty"),
        (
            lambda m, c: c.extend(torch.ones(3, 4, dtype=torch.long)),
            "context has 2 rows and what comes after",
        ),
        (
            lambda m, c: m.generate([4], context=c, past_key_values=DynamicCache()),
            "either a context or a cache",
        ),
        (lambda m, c: m.generate(prompts(4)[0], return_context=True), "needs a context"),
        (lambda m, c: m.generate([4], context=c, num_beams=2, return_context=True), "not work with beams"),
        (lambda m, c: m.generate(context=c), "prompt is empty"),
        (lambda m, c: make_variator("llama", MIXED).generate([4], context=c), "another VariatorModel"),
    ],
)
def test_bad_calls_get_one_clear_error(call, message):
    model = make_variator("llama", MIXED)
    context = model.compress(torch.cat(prompts(20, 20)))
    with pytest.raises(VariatorError, match=message):
        call(model, context)
    model.generate([4, 5, 6], context=context, **GREEDY)


def test_encoders_have_no_contexts():
    with pytest.raises(VariatorError, match="compress is for decoders"):
        make_variator("bert", VariatorConfig(k=2)).compress([4, 5])


def test_a_plugin_of_groups_of_one_is_dense(decoder):
    base = make_decoder(decoder)
    document, question = prompts(40, 9)
    expected = base.generate(torch.cat((document, question), dim=1), **GREEDY)
    model = VariatorModel(
        base, VariatorConfig(k=1, sites=("ffn", "kv"), compressor="mean", decompressor="copy")
    )
    randomise(model.plugin())
    out = model.generate(question, context=model.compress(document, prefill_chunk_size=7), **GREEDY)
    assert torch.equal(out, expected[:, 40:])


def test_a_model_made_in_inference_mode_has_contexts_too():
    document, question = prompts(50, 9)
    expected = make_variator("llama", MIXED)
    with torch.inference_mode():
        model = make_variator("llama", MIXED)
        answer = model.generate(question, context=model.compress(document), **GREEDY)
    assert torch.equal(answer, expected.generate(question, context=expected.compress(document), **GREEDY))
