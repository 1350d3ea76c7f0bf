"""Kept keys and the ways to generate: beams, samples, streams, and what is refused."""

from __future__ import annotations

from threading import Thread

import pytest
import reference_select as plain
import torch
from conftest import pad, prompts
from reference_select import Segment
from selecting import FEW, FULL, GREEDY, check_steps, expected, first, make, rule
from transformers import TextIteratorStreamer

from llm_variator import VariatorError, VariatorModel
from llm_variator.sources.models import byte_tokenizer


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
