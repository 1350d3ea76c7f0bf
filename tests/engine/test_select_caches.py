"""Caches of kept keys that transformers packs or crops: quantised caches, assisted and prompt-lookup decoding."""

from __future__ import annotations

import pytest
import torch
from conftest import DECODERS, make_decoder, pad, prompts
from selecting import CONFIGS, FEW, FULL, GREEDY, MAIN, add, check_steps, close, expected, first, make
from transformers import Cache, DynamicCache
from transformers.cache_utils import QuantizedLayer

from llm_variator import KVPool, VariatorConfig, VariatorError
from llm_variator.engine.cache import SelectedLayer
from llm_variator.engine.cache.quantised import Quantised
from llm_variator.engine.cache.stores import whole
from llm_variator.engine.session import Session

LONG = dict(do_sample=False, max_new_tokens=30)


class Lossless(QuantizedLayer):
    """A backend for transformers' quantised cache that rounds nothing: all that may differ is the bookkeeping."""

    def __init__(self) -> None:
        super().__init__(nbits=8, residual_length=4)

    def _quantize(self, tensor, axis):
        return tensor.clone()

    def _dequantize(self, tensor):
        return tensor


class Eight(Lossless):
    """One with 8 bits."""

    def _quantize(self, tensor, axis):
        return Quantised.of(tensor, 8)

    def _dequantize(self, tensor):
        return tensor.dense()


def packed(kind: type[QuantizedLayer] = Lossless) -> Cache:
    return Cache(layers=[kind() for _ in range(3)])


# transformers' quantised caches.


@pytest.mark.parametrize("name", ["short tail", "dense layer", "one ratio", "some layers", "ffn"])
@torch.no_grad()
def test_a_quantised_cache_is_as_good_as_its_backend(name):
    model = make("llama", CONFIGS[name])
    cache, plain = packed(), DynamicCache(config=model.config)
    ids, more = prompts(45, 27)
    for _ in range(2):
        found, wanted = (
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                past_key_values=held,
                **FULL,
                **dict(GREEDY, max_new_tokens=13),
            )
            for held in (cache, plain)
        )
        assert torch.equal(found.sequences, wanted.sequences)
        close(torch.stack(found.logits), torch.stack(wanted.logits), 1e-6)
        counts = [model.kv_cache_report(held).layers for held in (cache, plain)]
        assert [layer.entries for layer in counts[0]] == [layer.entries for layer in counts[1]]
        ids = torch.cat((wanted.sequences, more), dim=1)


@torch.no_grad()
def test_a_quantised_cache_of_a_padded_batch_and_of_beams():
    model = make("llama")
    batch = pad(prompts(45, 12, 30), "left")
    for options in ({}, dict(num_beams=3)):
        if options and not hasattr(Lossless(), "_pending_beam_idx"):
            with pytest.raises(VariatorError, match="does not reorder what its QuantizedCache has packed"):
                model.generate(**batch, past_key_values=packed(), **options, **LONG)
            continue
        wanted = model.generate(**batch, **options, **LONG)
        assert torch.equal(model.generate(**batch, past_key_values=packed(), **options, **LONG), wanted)


@torch.no_grad()
def test_a_quantised_cache_holds_kept_entries_in_few_bits():
    model = make("llama")
    cache, plain = packed(Eight), DynamicCache(config=model.config)
    (ids,) = prompts(45)
    for held in (cache, plain):
        model(ids, past_key_values=held)
    for mine, theirs in zip(cache.layers, plain.layers, strict=True):
        assert isinstance(mine, SelectedLayer)
        for one, other in zip(mine.classes, theirs.classes, strict=True):
            assert one.heads == other.heads
            for found, wanted in zip(whole(one.store), whole(other.store), strict=True):
                assert torch.equal(found, Quantised.of(wanted, 8).dense())
    entries = sum(sum(layer.counts) for layer in plain.layers)
    assert model.kv_cache_report(cache).bytes == entries * 2 * 8
    step, exact = (model(ids[:, :1], past_key_values=held).logits for held in (cache, plain))
    assert 1e-6 < (step - exact).abs().max() < 0.2


@torch.no_grad()
def test_what_a_quantised_cache_refuses():
    model = make("llama")
    add(model, "swapped", dict(MAIN, ratios=((4, 2), (1, 1), (2, 2))))
    add(model, "one ratio", dict(MAIN, ratios=((2, 2),) * 3))
    ids, more = prompts(45, 27)
    with pytest.raises(VariatorError, match="prefill_chunk_size takes entries back"):
        model.generate(ids, cache_implementation="quantized", prefill_chunk_size=9, **GREEDY)
    with pytest.raises(VariatorError, match=r"prefill_chunk_size with compressor .* QuantizedCache"):
        model.generate(ids, past_key_values=packed(), prefill_chunk_size=9, **GREEDY)
    cache = packed()
    turn = model.generate(ids, past_key_values=cache, **GREEDY)
    with pytest.raises(VariatorError, match="cannot pick or repeat"):
        cache.batch_repeat_interleave(2)
    with pytest.raises(VariatorError, match="cropping does not work with transformers' QuantizedCache"):
        cache.crop(-2)
    ids = torch.cat((turn, more), dim=1)
    cache = packed()
    with model.use_plugin("one ratio"):
        model.generate(turn, past_key_values=cache, **GREEDY)
    with model.use_plugin("swapped"), pytest.raises(VariatorError, match="packs all heads together"):
        model.generate(torch.cat((ids, ids), 1), past_key_values=cache, **GREEDY)


# Cropping.


@pytest.mark.parametrize("decoder", ["llama", "qwen3"])
@torch.no_grad()
def test_generated_tokens_can_be_taken_back(decoder):
    model = make(decoder)
    (ids,) = prompts(55)
    wanted = expected(model, ids, 41)
    cache = model(ids[:, :47], prompt_length=41, use_cache=True).past_key_values
    assert cache.is_croppable
    counts = [layer.counts for layer in cache.layers]
    for back in (3, 1, 6):
        cache.crop(0)
        cache.crop(-back)
        assert cache.get_seq_length() == 47 - back
        assert [layer.counts for layer in cache.layers] == [tuple(n - back for n in own) for own in counts]
        for i in range(47 - back, 47):
            close(model(ids[:, i : i + 1], past_key_values=cache).logits[0, 0], wanted.logits[i])
    with pytest.raises(
        VariatorError, match="cannot be cropped into its prompt: 7 tokens are to go, 6 came after it"
    ):
        cache.crop(-7)
    cache.crop(44)  # what older versions call it with: the tokens to keep
    close(model(ids[:, 44:45], past_key_values=cache).logits[0, 0], wanted.logits[44])
    whole_prompt = model(ids[:, :41], use_cache=True).past_key_values
    with pytest.raises(VariatorError, match="0 came after it; read the prompt again"):
        whole_prompt.crop(-1)


@torch.no_grad()
def test_a_crop_that_failed_halfway_is_noticed():
    model = make("llama", dict(CONFIGS["some layers"], layers=(1, 2)))
    (ids,) = prompts(45)
    cache = model(ids[:, :41], use_cache=True).past_key_values
    with pytest.raises(VariatorError, match="cannot be cropped into its prompt"):
        cache.crop(-2)  # after the first layer, which is dense
    with pytest.raises(VariatorError, match="hold different numbers of tokens"):
        model(ids[:, 41:42], past_key_values=cache)


@torch.no_grad()
def test_forks_and_pools_are_cropped_by_themselves():
    model, pool = make("llama"), KVPool(500, 4)
    document, question = prompts(41, 19)
    for where in (None, pool):
        context = model.compress(document, pool=where)
        _, after = model.generate(question, context=context, return_context=True, **GREEDY)
        other = after.fork()
        before = [layer.counts for layer in after.cache.layers]
        other.cache.crop(-3)
        assert [layer.counts for layer in after.cache.layers] == before
        assert [layer.counts for layer in other.cache.layers] == [tuple(n - 3 for n in own) for own in before]
        for each in (context, after, other):
            each.free()
    assert pool.report().used == 0


# Guesses.


def repeating(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Prompts in which guesses are found."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 6, (1, n), generator=generator) for n in lengths]


@pytest.fixture
def passes(monkeypatch):
    """Widths of the passes that the plugin saw."""
    found, end = [], Session.end_pass

    def counted(self):
        found.append(1 if self.now is None or self.now.segment is None else self.now.segment.width)
        end(self)

    monkeypatch.setattr(Session, "end_pass", counted)
    return found


@pytest.mark.parametrize(
    ("decoder", "name"),
    [(decoder, "short tail") for decoder in DECODERS]
    + [
        (decoder, name)
        for decoder in FEW
        for name in ("long tail", "dense layer", "no tail", "some layers", "ffn")
    ],
)
@torch.no_grad()
def test_prompt_lookup_gives_what_greedy_decoding_gives(decoder, name, passes):
    model = make(decoder, CONFIGS[name])
    for ids in [*prompts(47), *repeating(3, 60, 33)]:
        wanted = model.generate(ids, **LONG)
        passes.clear()
        out = model.generate(ids, prompt_lookup_num_tokens=4, max_matching_ngram_size=2, **FULL, **LONG)
        assert torch.equal(out.sequences, wanted)
        if name != "ffn":
            check_steps(model, out, ids, [first(model, ids.shape[1])])
        assert any(width > 1 for width in passes[1:]) or ids.shape[1] == 47  # guesses were read
        assert out.past_key_values.get_seq_length() == ids.shape[1] + 29
        plain = model.generate(ids, **FULL, **LONG).past_key_values
        again = torch.cat((wanted, ids[:, :30]), dim=1)
        turns = [
            model.generate(again, attention_mask=torch.ones_like(again), past_key_values=held, **GREEDY)
            for held in (out.past_key_values, plain)
        ]
        assert torch.equal(*turns)


@pytest.mark.parametrize("decoder", FEW)
@torch.no_grad()
def test_an_assistant_gives_what_greedy_decoding_gives(decoder, passes):
    model, assistant = make(decoder), make_decoder(decoder).double()
    for ids in [*prompts(47), *repeating(60)]:
        wanted = model.generate(ids, **LONG)
        passes.clear()
        out = model.generate(ids, assistant_model=assistant, **FULL, **LONG)
        assert torch.equal(out.sequences, wanted)
        check_steps(model, out, ids, [first(model, ids.shape[1])])
        assert any(width > 1 for width in passes[1:])


@torch.no_grad()
def test_what_guesses_refuse():
    model = make("llama")
    (ids,) = prompts(40)
    guess = dict(prompt_lookup_num_tokens=3, **GREEDY)
    for call, message in (
        (lambda: model.generate(**pad(prompts(40, 30), "left"), **guess), "without padding"),
        (
            lambda: model.generate(ids, prefill_chunk_size=9, **guess),
            "leave out inputs_embeds and prefill_chunk_size",
        ),
        (
            lambda: model.generate(inputs_embeds=model.base.get_input_embeddings()(ids), **guess),
            "leave out inputs_embeds",
        ),
        (lambda: model.generate(ids, assistant_model=model, **GREEDY), "without plugins"),
        (lambda: model.generate(ids, assistant_model=model.base, **GREEDY), "without plugins"),
        (lambda: model.generate(ids, assistant_early_exit=1, **GREEDY), "assisted decoding"),
        (lambda: model.generate(ids, past_key_values=packed(), **guess), "cropping does not work"),
    ):
        with pytest.raises(VariatorError, match=message):
            call()
    for where in (None, KVPool(500, 4)):
        context = model.compress(ids, pool=where)
        with pytest.raises(VariatorError, match="cannot go on from a cache or a context"):
            model.generate(ids, context=context, **guess)
        assert where is None or where.report().references == where.report().used
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(VariatorError, match="cannot go on from a cache or a context"):
        model.generate(torch.cat((ids, ids), 1), past_key_values=cache, **guess)
    with pytest.raises(VariatorError, match="take one row without padding: generate row by row"):
        model.generate(ids.repeat(2, 1), **guess)
    model.add_plugin("merged", VariatorConfig(k=2, sites=("kv",))).double()
    with model.use_plugin("merged"), pytest.raises(VariatorError, match="prompt-lookup decoding"):
        model.generate(ids, **guess)
    assert torch.equal(model.generate(ids, **guess), model.generate(ids, **GREEDY))
