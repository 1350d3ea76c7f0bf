"""Embeddings in place of ids: the same tokens wherever ids may stand, for every family of decoders."""

from __future__ import annotations

import pytest
import torch
from conftest import make_decoder, make_variator, pad, prompts, randomise
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache

from llm_variator import CompressedContext, KVPool, VariatorConfig, VariatorError, VariatorModel

CONFIG = VariatorConfig(k={"ffn": 2, "kv": 3}, sites=("ffn", "kv"), r=5, dense_head=1, dense_tail=2)
GREEDY = dict(max_new_tokens=5, do_sample=False)
WAYS = {
    "greedy": {},
    "beams": dict(num_beams=3),
    "several beams": dict(num_beams=3, num_return_sequences=2),
    "in chunks": dict(prefill_chunk_size=7),
    "beams in chunks": dict(num_beams=3, prefill_chunk_size=7),
}
SIDES = ("left", "right")


def embedded(model, batch) -> dict[str, torch.Tensor]:
    """The same batch with embeddings instead of ids; other ones where there is padding."""
    vectors = model.base.get_input_embeddings()(batch["input_ids"])
    vectors[batch["attention_mask"] == 0] = 3.0
    return {"inputs_embeds": vectors, "attention_mask": batch["attention_mask"]}


def alone(row) -> dict[str, torch.Tensor]:
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}


@pytest.mark.parametrize("side", SIDES)
def test_generate(decoder, side):
    model = make_variator(decoder, CONFIG)
    batch = pad(prompts(40, 17, 9, 1), side)
    vectors, width = embedded(model, batch), batch["input_ids"].shape[1]
    for options in WAYS.values():
        expected = model.generate(**batch, **options, **GREEDY)
        assert torch.equal(model.generate(**vectors, **options, **GREEDY), expected[:, width:])
        both = model.generate(**vectors, input_ids=batch["input_ids"], **options, **GREEDY)
        assert torch.equal(both, expected)
    several = dict(max_new_tokens=5, do_sample=True, num_return_sequences=3)
    torch.manual_seed(0)
    expected = model.generate(**batch, **several)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**vectors, **several), expected[:, width:])


@pytest.mark.parametrize("side", SIDES)
def test_contexts(decoder, side):
    model = make_variator(decoder, CONFIG)
    documents, questions = pad(prompts(40, 17, 9, 1), side), pad(prompts(9, 4, 4, 12, seed=5), side)
    asked = embedded(model, questions)
    for chunk in (None, 7):
        of_ids = model.compress(documents, prefill_chunk_size=chunk)
        of_vectors = model.compress(**embedded(model, documents), prefill_chunk_size=chunk)
        assert of_vectors.entries == of_ids.entries
        for options in WAYS.values():
            expected = model.generate(**questions, context=of_ids, **options, **GREEDY)
            assert torch.equal(model.generate(**questions, context=of_vectors, **options, **GREEDY), expected)
            for context in (of_ids, of_vectors):
                answers = model.generate(**asked, context=context, **options, **GREEDY)
                assert torch.equal(answers, expected[:, 12:])


@pytest.mark.parametrize("chunk", [None, 5])
def test_several_turns_and_extensions(decoder, chunk):
    model = make_variator(decoder, CONFIG)
    document, questions = prompts(30)[0], pad(prompts(9, 4, 12, seed=5), "left")
    more, last = prompts(13, 8, seed=9)
    options = dict(prefill_chunk_size=chunk, **GREEDY)
    vectors = embedded(model, alone(document))
    _, before = model.generate(**questions, context=model.compress(document), return_context=True, **options)
    _, mixed = model.generate(**questions, context=model.compress(**vectors), return_context=True, **options)
    _, after = model.generate(
        **embedded(model, questions), context=model.compress(vectors), return_context=True, **options
    )
    assert (mixed.input_ids == -1).sum(1).tolist() == [30] * 3
    assert torch.equal(mixed.input_ids[mixed.input_ids != -1], before.input_ids[mixed.input_ids != -1])
    expected = model.generate(last, context=before, **options)
    longer = model.generate(last, context=before.extend(more, prefill_chunk_size=chunk), **options)
    for context in (before, mixed, after):
        if context is not before:
            assert torch.equal(model.generate(last, context=context, **options), expected)
        answers = model.generate(**embedded(model, alone(last)), context=context, **options)
        assert torch.equal(answers, expected[:, 8:])
        for extended in (
            context.extend(more, prefill_chunk_size=chunk),
            context.extend(**embedded(model, alone(more)), prefill_chunk_size=chunk),
        ):
            assert torch.equal(model.generate(last, context=extended, **options), longer)


def test_contexts_kept_elsewhere(tmp_path):
    """In files, in a pool, in 4 bits, forked: embeddings are read once, like ids."""
    model = make_variator("llama", CONFIG)
    document, question = prompts(40, 7)
    vectors = embedded(model, alone(document))
    expected = model.generate(question, context=model.compress(document), **GREEDY)
    context = model.compress(**vectors)
    context.save(tmp_path / "context.safetensors")
    pool = KVPool(blocks=200, block_size=4)
    for same in (
        CompressedContext.load(tmp_path / "context.safetensors", model),
        model.compress(**vectors, pool=pool),
        context.fork(),
    ):
        assert torch.equal(model.generate(question, context=same, **GREEDY), expected)
    rounded = model.compress(document).quantised(8)
    expected = model.generate(question, context=rounded, **GREEDY)
    assert torch.equal(model.generate(question, context=context.quantised(8), **GREEDY), expected)


def test_turns_over_a_cache(decoder):
    model = make_variator(decoder, CONFIG)
    document, question = prompts(30, 8, seed=3)
    whole = alone(torch.cat((document, question), dim=1))
    cache = DynamicCache(config=model.base.config)
    model(document, past_key_values=cache)
    expected = model.generate(**whole, past_key_values=cache, **GREEDY)
    for chunk in (None, 4):
        cache = DynamicCache(config=model.base.config)
        model(inputs_embeds=embedded(model, alone(document))["inputs_embeds"], past_key_values=cache)
        out = model.generate(
            **embedded(model, whole), past_key_values=cache, prefill_chunk_size=chunk, **GREEDY
        )
        assert torch.equal(out, expected[:, 38:])


@pytest.mark.parametrize("side", SIDES)
def test_prompt_lengths(decoder, side):
    model = make_variator(decoder, CONFIG)
    batch, lengths = pad(prompts(40, 17, 9, 1), side), torch.tensor([30, 10, 5, 1])
    logits = model(**batch, prompt_length=lengths).logits
    out = model(**embedded(model, batch), prompt_length=lengths).logits
    valid = batch["attention_mask"].bool()
    assert torch.equal(out[valid], logits[valid])


def test_an_encoders_input():
    model = make_variator("t5", VariatorConfig(k=2, sites=("ffn", "attention"), r=5))
    for side in SIDES:
        batch = pad(prompts(20, 9), side)
        expected = model.generate(**batch, **GREEDY)
        assert torch.equal(model.generate(**embedded(model, batch), **GREEDY), expected)


def test_a_base_with_lora_on_its_embedding():
    lora = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"], init_lora_weights=False)
    model = VariatorModel(get_peft_model(make_decoder("llama"), lora), CONFIG)
    randomise(model.plugin())
    document, question = prompts(30, 8)
    context = model.compress(document)
    expected = model.generate(question, context=context, **GREEDY)
    same = model.compress(**embedded(model, alone(document)))
    assert torch.equal(model.generate(question, context=same, **GREEDY), expected)


CALLS = {
    "another width": (
        lambda m, e: m.generate(inputs_embeds=e[..., :7]),
        r"\(rows, tokens, 32\); got .* \(2, 9, 7\)",
    ),
    "ids by that name": (
        lambda m, e: m.generate(inputs_embeds=torch.ones(1, 9, dtype=torch.long)),
        "floating point",
    ),
    "embeddings as ids": (lambda m, e: m.generate(e), "give embeddings as inputs_embeds"),
    "another number format": (
        lambda m, e: m.generate(inputs_embeds=e.double()),
        r"convert them with .to\(torch.float32",
    ),
    "two prompts": (lambda m, e: m.generate(prompts(8)[0], inputs_embeds=e), "two prompts: leave one out"),
    "two documents": (lambda m, e: m.compress([4, 5], inputs_embeds=e), "two prompts: leave one out"),
    "another mask": (
        lambda m, e: m.compress(inputs_embeds=e, attention_mask=torch.ones(2, 8)),
        "does not fit",
    ),
    "an empty row": (
        lambda m, e: m.generate(inputs_embeds=e, attention_mask=torch.tensor([[1] * 9, [0] * 9])),
        "prompt is empty",
    ),
    "no token": (lambda m, e: m.compress(inputs_embeds=e[:, :0]), "prompt is empty"),
    "without a cache": (
        lambda m, e: m.generate(inputs_embeds=e, prefill_chunk_size=4, use_cache=False),
        "needs a cache",
    ),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_is_refused_in_one_line(call):
    model = make_variator("llama", CONFIG)
    vectors = model.base.get_input_embeddings()(torch.cat(prompts(9, 9)))
    attempt, message = CALLS[call]
    with pytest.raises(VariatorError, match=message) as caught:
        attempt(model, vectors)
    assert "\n" not in str(caught.value)
