"""Every way of generating: strategies, batches, streams, several turns, and what is refused."""

from __future__ import annotations

import copy
from threading import Thread

import pytest
import reference
import torch
from conftest import VOCAB, make_decoder, make_variator, pad, prompts, randomise
from transformers import DynamicCache, TextIteratorStreamer

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.cache import CompressedLayer
from llm_variator.sources.models import byte_tokenizer

CONFIG = VariatorConfig(k=3, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=2)
CONFIGS = {
    "ffn": VariatorConfig(k=2, sites=("ffn",), r=5),
    "ffn+kv": CONFIG,
    "attention": VariatorConfig(k=2, sites=("attention",), r=5),
}
GREEDY = dict(do_sample=False, max_new_tokens=6)


@pytest.fixture(params=CONFIGS)
def model(request) -> VariatorModel:
    return make_variator("llama", CONFIGS[request.param])


def logprobs(model, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Log-probability of every generated token, teacher-forced."""
    logits = model(ids, prompt_length=prompt).logits[0, prompt - 1 : -1].log_softmax(-1)
    return logits.gather(-1, ids[0, prompt:, None])[:, 0]


def test_beam_search_finds_what_a_search_by_hand_finds(model):
    (ids,) = prompts(20)
    beams = [(0.0, ids)]
    for _ in range(4):
        grown = []
        for score, row in beams:
            logits = model(row, prompt_length=20).logits[0, -1].detach().log_softmax(-1)
            grown += [
                (score + float(logits[t]), torch.cat((row, torch.tensor([[t]])), 1)) for t in range(VOCAB)
            ]
        beams = sorted(grown, key=lambda beam: -beam[0])[:3]
    out = model.generate(
        input_ids=ids, num_beams=3, max_new_tokens=4, do_sample=False, num_return_sequences=3
    )
    assert torch.equal(out, torch.cat([row for _, row in beams]))


def test_beams_of_a_padded_batch_equal_those_of_its_rows(model):
    rows = prompts(9, 25, 16)
    together = model.generate(**pad(rows, "left"), num_beams=3, **GREEDY)
    for i, row in enumerate(rows):
        alone = model.generate(input_ids=row, num_beams=3, **GREEDY)
        assert torch.equal(together[i, -6:], alone[0, -6:])


def test_sampling_follows_the_seed_and_the_logits(model):
    (ids,) = prompts(20)
    torch.manual_seed(3)
    out = model.generate(input_ids=ids, do_sample=True, max_new_tokens=6, num_return_sequences=5)
    assert out.shape == (5, 26)
    torch.manual_seed(3)
    again = model.generate(input_ids=ids, do_sample=True, max_new_tokens=6, num_return_sequences=5)
    assert torch.equal(out, again)
    cold = model.generate(input_ids=ids, do_sample=True, temperature=1e-4, max_new_tokens=6)
    assert torch.equal(cold, model.generate(input_ids=ids, **GREEDY))


def test_streaming_yields_the_generated_text(model):
    tokenizer = byte_tokenizer()
    (ids,) = prompts(20)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    thread = Thread(target=model.generate, kwargs=dict(input_ids=ids, streamer=streamer, **GREEDY))
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text == tokenizer.decode(model.generate(input_ids=ids, **GREEDY)[0, 20:])


def test_decoding_without_a_cache(model):
    batch = pad(prompts(9, 25), "left")
    assert torch.equal(model.generate(**batch, use_cache=False, **GREEDY), model.generate(**batch, **GREEDY))


def test_positional_ids_and_missing_mask(model):
    (ids,) = prompts(20)
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_short_prompts_stay_dense():
    base = make_decoder("llama")
    expected = {n: base.generate(prompts(n)[0], **GREEDY) for n in (1, 2, 4, 6)}
    model = VariatorModel(base, CONFIG)
    randomise(model.plugin())
    for n, sequence in expected.items():  # head 2 + tail 2 leave room for a group of 3 from 7 tokens on
        assert torch.equal(model.generate(prompts(n)[0], **GREEDY), sequence)


# Several turns: each new segment is compressed in its turn, generated tokens stay dense.


def expected_entries(segments: list[tuple[int, int, bool]], k: int, head: int, tail: int) -> int:
    """(prompt tokens, generated tokens read, first) of each turn -> entries; plain counting."""
    total = 0
    for n, generated, first in segments:
        total += len(reference.entries(n, n, k, head if first else 1, tail)) + generated
    return total


def test_two_turns_equal_one_pass_over_all_of_it():
    """Turn 2 sees what turn 1 left: the same logits as plain masked attention over the entries of both."""
    model = make_variator("llama", CONFIG)
    (first, second) = prompts(20, 17)
    cache = DynamicCache(config=model.config)
    turn = model.generate(input_ids=first, past_key_values=cache, **GREEDY)
    assert cache.layers[0].keys.shape[-2] == expected_entries([(20, 5, True)], 3, 2, 2)
    whole = torch.cat((turn, second), dim=1)
    before = copy.deepcopy(cache)
    out = model.generate(
        input_ids=whole, past_key_values=cache, output_logits=True, return_dict_in_generate=True, **GREEDY
    )
    assert cache.layers[0].keys.shape[-2] == expected_entries([(20, 5, True), (18, 5, False)], 3, 2, 2)
    assert cache.get_seq_length() == 20 + 5 + 18 + 5

    # the same second turn in one teacher-forced pass over the first turn's cache
    new = out.sequences[:, 25:]
    forced = model(new, prompt_length=18, past_key_values=before).logits[:, 17:-1]
    torch.testing.assert_close(torch.stack(out.logits, 1), forced, atol=1e-4, rtol=0)
    # and the first turn's entries are what they were
    held = before.layers[0].keys.shape[-2]
    kept = expected_entries([(20, 5, True)], 3, 2, 2)
    assert held > kept
    assert torch.equal(before.layers[0].keys[:, :, :kept], cache.layers[0].keys[:, :, :kept])


def test_two_turns_of_a_padded_batch_equal_those_of_its_rows():
    model = make_variator("llama", CONFIG)
    rows, more = prompts(12, 26), prompts(15, 15, seed=4)
    batch, cache = pad(rows, "left"), DynamicCache(config=model.config)
    turn = model.generate(**batch, past_key_values=cache, **GREEDY)
    ids = torch.cat((turn, torch.cat(more)), dim=1)
    mask = torch.cat((batch["attention_mask"], torch.ones(2, 6 + 15, dtype=torch.long)), dim=1)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    for i, row in enumerate(rows):
        alone = DynamicCache(config=model.config)
        first = model.generate(input_ids=row, past_key_values=alone, **GREEDY)
        second = model.generate(input_ids=torch.cat((first, more[i]), 1), past_key_values=alone, **GREEDY)
        assert torch.equal(out[i, -6:], second[0, -6:]), i


def test_a_plugin_may_change_between_turns():
    model = make_variator("llama", CONFIG)
    model.add_plugin("k2", VariatorConfig(k=2, sites=("kv",)))
    (first, second) = prompts(20, 17)
    cache = DynamicCache(config=model.config)
    turn = model.generate(input_ids=first, past_key_values=cache, **GREEDY)
    held = cache.layers[0].keys.shape[-2]
    whole = torch.cat((turn, second), dim=1)
    for name, k in (("k2", 2), (None, None)):
        branch = copy.deepcopy(cache)
        with model.use_plugin(name):
            out = model.generate(input_ids=whole, past_key_values=branch, **GREEDY)
        new = len(reference.entries(18, 18, k, 1, 1))
        assert branch.layers[0].keys.shape[-2] == held + new + 5
        assert out.shape == (1, whole.shape[1] + 6)
    # a dense second turn, checked step by step against the same tokens in one pass
    with model.disable_plugin():
        one, many = copy.deepcopy(cache), copy.deepcopy(cache)
        together = model(whole[:, 25:], past_key_values=one).logits[0]
        steps = [
            model(whole[:, i : i + 1], past_key_values=many).logits[0, 0] for i in range(25, whole.shape[1])
        ]
    torch.testing.assert_close(torch.stack(steps), together, atol=1e-4, rtol=0)


def test_compressed_cache_goes_through_the_model():
    model = make_variator("llama", CONFIG)
    cache = model(prompts(20)[0], use_cache=True).past_key_values
    with pytest.raises(VariatorError, match="pass it to the VariatorModel"):
        model.base(prompts(1)[0], past_key_values=cache)


# What cannot work says so.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(prompt_lookup_num_tokens=3), "prompt-lookup decoding"),
        (dict(assistant_model="self"), "assisted decoding"),
        (dict(cache_implementation="static"), "cache_implementation='static'"),
    ],
)
def test_unsupported_generation_is_refused(options, message):
    model = make_variator("llama", CONFIG)
    if "assistant_model" in options:
        options = {"assistant_model": make_decoder("llama")}
    with pytest.raises(VariatorError, match=message):
        model.generate(prompts(20)[0], **options, **GREEDY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(torch.empty(1, 0, dtype=torch.long), **GREEDY), "prompt is empty"),
        (lambda m: m(torch.empty(1, 0, dtype=torch.long)), "prompt is empty"),
        (lambda m: m(**pad([prompts(4)[0], torch.empty(1, 0, dtype=torch.long)], "left")), "prompt is empty"),
        (lambda m: m(prompts(9)[0], prompt_length=10), "prompt_length 10 exceeds the 9 tokens"),
        (lambda m: m(prompts(9)[0], prompt_length=-1), "must not be negative"),
        (lambda m: m(prompts(9)[0], prompt_length=torch.tensor([3, 4])), "2 entries for 1 rows"),
        (lambda m: m(prompts(9)[0], attention_mask=torch.ones(1, 1, 9, 9)), "2D tensor"),
        (lambda m: m.set_plugin("k9"), "no plugin named 'k9'; loaded: default"),
        (lambda m: m.use_plugin("k9").__enter__(), "no plugin named 'k9'"),
        (lambda m: m.add_plugin("default", CONFIG), "loaded already"),
        (lambda m: m.add_plugin("a.b", CONFIG), "without dots"),
        (lambda m: m.load_plugin("nowhere/at/all", "x"), "nowhere/at/all"),
        (lambda m: VariatorModel(m.base, CONFIG), "already has a VariatorModel"),
        (lambda m: VariatorModel(torch.nn.Linear(2, 2), CONFIG), "must be a loaded Hugging Face model"),
        (lambda m: m.kv_cache_report(), "no cache to report yet"),
        (lambda m: m.gradient_checkpointing_enable({"use_reentrant": True}), "use_reentrant=False"),
    ],
)
def test_bad_calls_get_one_clear_error(call, message):
    model = make_variator("llama", CONFIG)
    with pytest.raises(VariatorError, match=message):
        call(model)
    assert model.active_plugin == "default"
    model.generate(prompts(20)[0], **GREEDY)  # and the model still works


def test_static_caches_are_refused_for_compressed_keys_only():
    from transformers import StaticCache

    model = make_variator("llama", CONFIG)
    with pytest.raises(VariatorError, match="DynamicCache, got StaticCache"):
        model(prompts(20)[0], past_key_values=StaticCache(config=model.config, max_cache_len=64))


def test_cropping_is_refused():
    with pytest.raises(VariatorError, match="cannot be cropped"):
        CompressedLayer().crop(-1)


def test_unknown_architecture_names_the_supported_ones():
    from transformers import GPT2Config, GPT2LMHeadModel

    base = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=16))
    with pytest.raises(
        VariatorError, match=r"'gpt2' is not supported; supported are llama, mistral.*CONTRIBUTING"
    ):
        VariatorModel(base, CONFIG)


def test_sliding_layers_keep_their_attention_dense():
    """Gemma 3: only the full-attention layers compress K/V; every layer compresses its FFN."""
    model = make_variator("gemma3", CONFIG)
    assert [model.plugin().at("kv", i) is not None for i in range(3)] == [True, False, True]
    assert all(model.plugin().at("ffn", i) is not None for i in range(3))
    cache = model(prompts(20)[0], use_cache=True).past_key_values
    assert [layer.keys.shape[-2] for layer in cache.layers] == [10, 7, 10]
    sliding = make_decoder("mistral", sliding_window=16)
    with pytest.raises(VariatorError, match="sliding window"):
        VariatorModel(sliding, CONFIG)
    VariatorModel(sliding, VariatorConfig(k=2))
