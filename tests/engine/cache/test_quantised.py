"""Fewer bits over fewer entries: exact bounds of the error, bytes by hand, and transformers' quantised caches."""

from __future__ import annotations

import pytest
import torch
from conftest import make_variator, prompts
from transformers import Cache, DynamicCache
from transformers.cache_utils import QuantizedLayer

from llm_variator import CompressedContext, VariatorConfig, VariatorError
from llm_variator.engine.cache.quantised import Quantised

CONFIG = VariatorConfig(k=4, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=3)
GREEDY = dict(do_sample=False, max_new_tokens=6)


class Eight(QuantizedLayer):
    """A backend for transformers' quantised cache."""

    def __init__(self) -> None:
        super().__init__(nbits=8, residual_length=4)

    def _quantize(self, tensor, axis):
        return Quantised.of(tensor, 8)

    def _dequantize(self, tensor):
        return tensor.dense()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_at_most_half_a_step(bits, dtype):
    tensor = (torch.randn(2, 3, 50, 8, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    tensor[0, 0, 0] = 0
    again = Quantised.of(tensor, bits).dense()
    assert again.dtype == dtype
    spread = tensor.float().amax(-1, keepdim=True) - tensor.float().amin(-1, keepdim=True)
    step = spread / (2**bits - 1)
    # fp16 scale and least value add a 2048th of the greatest value, the dtype its own rounding
    slack = tensor.abs().amax() * (2**-10 + torch.finfo(dtype).eps)
    assert bool(((again.float() - tensor.float()).abs() <= step / 2 + slack).all())
    four = Quantised.of(tensor, bits)
    assert four.shape == tensor.shape
    assert four.nbytes == 2 * 3 * 50 * (8 * bits // 8 + 4)
    assert torch.equal(four.map(lambda t: t[:, :, 7:9]).dense(), again[:, :, 7:9])


def test_a_quantised_context(decoder, tmp_path):
    """The same answers as from a context whose entries were rounded by hand; one thirtieth of the bytes on the way."""
    model = make_variator(decoder, CONFIG)
    context, questions = model.compress(prompts(70)[0]), prompts(9, 9, seed=3)
    for bits in (4, 8):
        small = context.quantised(bits)
        by_hand = context.fork()
        for layer in by_hand.cache.layers:
            if hasattr(layer, "store"):
                layer.store.parts = tuple(
                    tuple(Quantised.of(t, bits).dense() for t in part) for part in layer.store.parts
                )
        small.save(tmp_path / "small")
        for each in (small, CompressedContext.load(tmp_path / "small", model), small.fork()):
            assert each.report().layers[0] == small.report().layers[0]
            for options in (GREEDY, dict(num_beams=2, **GREEDY)):
                for question in (questions[0], torch.cat(questions)):
                    expected = model.generate(question, context=by_hand, **options)
                    assert torch.equal(model.generate(question, context=each, **options), expected)
        layer = small.report().layers[0]
        entries = 2 + 16 + 4
        heads = model.config.num_key_value_heads
        assert layer.entries == entries
        assert layer.bytes == 2 * heads * entries * (8 * bits // 8 + 4)  # head_dim 8: codes, and two fp16
        assert layer.dense_bytes == 2 * heads * 70 * 8 * 4
    extended = small.extend(questions[0])
    assert torch.equal(
        model.generate(questions[1], context=extended, **GREEDY),
        model.generate(questions[1], context=by_hand.extend(questions[0]), **GREEDY),
    )
    for bits in (3, 16):
        with pytest.raises(VariatorError, match="bits must be 4"):
            context.quantised(bits)


def test_four_bits_and_groups_of_four_take_a_sixteenth_and_the_scales():
    """Heads of 64 in fp16: a fourth of the entries, each vector 32 bytes of codes and 4 of scale instead of 128."""
    config = VariatorConfig(k=4, sites=("kv",), r=2, dense_head=0, dense_tail=0)
    model = make_variator("llama", config, head_dim=64, num_hidden_layers=1).to(torch.float16)
    report = model.compress(prompts(400)[0]).quantised(4).report()
    assert report.bytes / report.dense_bytes == pytest.approx((1 / 4) * (32 + 4) / 128)
    assert report.bytes / report.dense_bytes < 1 / 14


def test_ageing_cuts_quantised_entries():
    config = VariatorConfig(k=2, sites=("kv",), r=5, dense_tail=3, decode_block=4)
    model = make_variator("llama", config)
    context = model.compress(prompts(40)[0])
    small = context.quantised(8)
    out, after = model.generate(
        prompts(9)[0], context=small, return_context=True, do_sample=False, max_new_tokens=20
    )
    _, same = model.generate(
        prompts(9)[0], context=context, return_context=True, do_sample=False, max_new_tokens=20
    )
    assert out.shape == (1, 29)
    assert after.entries == same.entries


def test_transformers_quantised_cache_holds_compressed_entries():
    """The first turn is read before it is quantised; afterwards the store's own rounding is all that differs."""
    model = make_variator("llama", CONFIG)
    cache = Cache(layers=[Eight() for _ in range(3)])
    plain = DynamicCache(config=model.config)
    (ids,) = prompts(70)
    with torch.no_grad():
        for given in (cache, plain):
            model(ids, past_key_values=given)
    assert cache.layers[0].entries == plain.layers[0].entries == 2 + 16 + 4
    keys = plain.layers[0].keys
    assert torch.equal(
        cache.layers[0].store._dequantize(cache.layers[0].store._quantized_keys),
        Quantised.of(keys, 8).dense(),
    )
    report = model.kv_cache_report(cache)
    assert report.layers[0].bytes == 22 * 2 * 2 * 8
    whole = model.generate(torch.cat((ids, prompts(9)[0]), dim=1), past_key_values=cache, **GREEDY)
    assert whole.shape == (1, 85)
    assert cache.get_seq_length() == 70 + 9 + 5
    groups = (9 - 3) // 4
    assert cache.layers[0].entries == 22 + groups + (9 - 4 * groups) + 5


def test_ageing_refuses_what_cannot_be_taken_back():
    config = VariatorConfig(k=2, sites=("kv",), r=5, decode_block=2)
    model = make_variator("llama", config)
    cache = Cache(layers=[Eight() for _ in range(3)])
    with pytest.raises(VariatorError, match="decode_block does not work with transformers' QuantizedCache"):
        model.generate(prompts(30)[0], past_key_values=cache, **GREEDY)


def test_layers_that_are_moved_away_and_back():
    """What transformers' offloading does to a layer, without the device to move it from."""
    model = make_variator("llama", CONFIG)
    cache = model(prompts(70)[0], use_cache=True).past_key_values
    before = cache.layers[0].keys.clone()
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    assert torch.equal(cache.layers[0].keys, before)
    model(prompts(3)[0], past_key_values=cache)
