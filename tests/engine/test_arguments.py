"""Other forms of what a wrapped model is given, and calls from inside a call: as the plain way, or refused."""

from __future__ import annotations

import pytest
import reference
import torch
from conftest import make_variator, pad, prompts
from peft import LoraConfig, get_peft_model
from selecting import make
from transformers import DynamicCache, GenerationConfig, LogitsProcessor

from llm_variator import VariatorConfig, VariatorError
from llm_variator.engine.cache import is_compressed

FFN = VariatorConfig(k=2, sites=("ffn",), r=5)
MERGED = VariatorConfig(k=3, sites=("ffn", "kv"), r=5, dense_head=2, dense_tail=2)
ATTENTION = VariatorConfig(k=2, sites=("attention",), r=5)
GREEDY = dict(do_sample=False, max_new_tokens=6)
FULL = dict(return_dict_in_generate=True, output_logits=True)


def variator(config: VariatorConfig | str, decoder: str = "llama"):
    return make(decoder, dtype=torch.float32) if config == "select" else make_variator(decoder, config)


# --- padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_tokenizers_lists_are_its_tensors(side):
    model = variator(MERGED)
    batch = pad(prompts(9, 25, 16), side)
    lists = {name: value.tolist() for name, value in batch.items()}
    expected = model.generate(**batch, **GREEDY)[:, -6:]
    assert torch.equal(model.generate(**lists, **GREEDY)[:, -6:], expected)
    (question,) = prompts(4, seed=2)
    contexts = [model.compress(batch), model.compress(lists)]
    assert torch.equal(contexts[0].input_ids * contexts[0].attention_mask, contexts[1].input_ids)
    answers = [model.generate(question, context=context, **GREEDY) for context in contexts]
    assert torch.equal(answers[0], answers[1])
    asked = [model.generate(**given, context=model.compress(question), **GREEDY) for given in (batch, lists)]
    assert torch.equal(asked[0][:, -6:], asked[1][:, -6:])
    lists["attention_mask"][0] = lists["attention_mask"][0][1:]
    with pytest.raises(VariatorError, match=r"attention_mask of \[24, 25, 25\] entries does not fit rows of"):
        model.generate(**lists, **GREEDY)


@pytest.mark.parametrize("config", [MERGED, FFN])
def test_padding_is_found_however_it_is_given(config):
    model = variator(config)
    model.base.generation_config.pad_token_id = 0
    rows = prompts(9, 25, 16)
    expected = model.generate(**pad(rows, "left"), **GREEDY)[:, -6:]
    right, left = pad(rows, "right"), pad(rows, "left")
    positions = (right["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert torch.equal(model.generate(**right, position_ids=positions, **GREEDY)[:, -6:], expected)
    for chunk in ({}, {"prefill_chunk_size": 8}):
        assert torch.equal(model.generate(left["input_ids"], **chunk, **GREEDY)[:, -6:], expected)


@pytest.mark.parametrize("config", [MERGED, ATTENTION, "select"], ids=["merged", "attention", "select"])
@torch.no_grad()
def test_what_a_mask_leaves_out_of_a_cache_is_not_seen(config):
    """The first row ended before the second, as in two turns of `generate` over one cache."""
    model = variator(config)
    rows, (said, more) = prompts(12, 26), (torch.cat(prompts(n, n, seed=n)) for n in (3, 15))

    def read(*parts: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        cache, mask = DynamicCache(config=model.config), torch.empty(len(parts[0][0]), 0, dtype=torch.long)
        for ids, own in parts:
            mask = torch.cat((mask, own), dim=1)
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            logits = model(
                ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).logits
        return logits

    def seen(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return ids, torch.ones_like(ids)

    batch = pad(rows, "left")
    answer = [(said[:, i : i + 1], torch.tensor([[int(i == 0)], [1]])) for i in range(3)]
    together = read((batch["input_ids"], batch["attention_mask"]), *answer, seen(more))
    for row, count in ((0, 1), (1, 3)):
        own = slice(row, row + 1)
        alone = read(seen(rows[row]), *(seen(said[own, i : i + 1]) for i in range(count)), seen(more[own]))
        torch.testing.assert_close(together[own], alone, atol=2e-4, rtol=0)


@torch.no_grad()
def test_rows_that_ended_by_the_models_own_configuration():
    model = variator(VariatorConfig(k=3, sites=("kv",), dense_head=2, dense_tail=3))
    documents, (question,) = torch.cat(prompts(30, 30)), prompts(2, seed=3)
    first = model.generate(question, context=model.compress(documents), **GREEDY)
    assert int(first[0, 4]) not in first[1]
    model.base.generation_config.eos_token_id, model.base.generation_config.pad_token_id = int(first[0, 4]), 0
    context = model.compress(documents)
    short = GenerationConfig(**GREEDY)
    _, after = model.generate(question, context=context, return_context=True, generation_config=short)
    assert after.attention_mask[0, -3:].tolist() == [0, 0, 0]
    with pytest.raises(VariatorError, match="leave out stop_strings and stopping_criteria"):
        model.generate(question, context=context, return_context=True, stopping_criteria=[lambda *_: False])


@torch.no_grad()
def test_rows_that_are_filled_up_are_compressed():
    model = variator(VariatorConfig(k=2, sites=("kv",), dense_head=0, dense_tail=0))
    ids, (token,) = torch.cat(prompts(20, 20)), prompts(1, seed=4)
    lengths = torch.tensor([0, 15])
    cache = model(ids, prompt_length=lengths, use_cache=True).past_key_values
    assert {layer.entries for layer in cache.layers} == {20}
    assert is_compressed(cache)
    with pytest.raises(VariatorError, match="pass it to the VariatorModel"):
        model.base(token.expand(2, -1), past_key_values=cache)
    alone = model(ids[1:], prompt_length=15, use_cache=True).past_key_values
    with model.disable_plugin():
        together = model(token.expand(2, -1), past_key_values=cache).logits[1:]
        torch.testing.assert_close(together, model(token, past_key_values=alone).logits, atol=1e-5, rtol=0)


# --- caches


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("decoder", ["llama", "qwen2", "qwen3", "gemma3"])
def test_static_cache_computes_what_a_growing_one_does(decoder, padded):
    model = variator(FFN, decoder)
    batch = pad(prompts(30, 17), "left") if padded else {"input_ids": prompts(30)[0]}
    options = FULL | GREEDY | dict(max_new_tokens=20)
    expected = model.generate(**batch, **options)
    static = model.generate(**batch, cache_implementation="static", **options)
    torch.testing.assert_close(torch.stack(static.logits), torch.stack(expected.logits), atol=1e-4, rtol=0)


def test_the_last_token_of_a_dense_turn_stays_dense():
    model = variator(MERGED)
    first, second = prompts(20, 16)
    for given in (DynamicCache(config=model.config), None):
        with model.disable_plugin():
            turn = model.generate(first, past_key_values=given, return_dict_in_generate=True, **GREEDY)
        cache = turn.past_key_values
        model.generate(torch.cat((turn.sequences, second), dim=1), past_key_values=cache, **GREEDY)
        assert len(reference.entries(17, 17, 3, 0, 2)) != len(reference.entries(17, 17, 3, 1, 2))
        new = len(reference.entries(17, 17, 3, 1, 2))
        assert cache.layers[0].keys.shape[-2] == 25 + new + 5


# --- calls from inside a call, and adapters put on later


@torch.no_grad()
def test_a_processor_may_ask_the_model_without_its_plugin():
    model = variator(MERGED)
    (ids,), (other,) = prompts(20), prompts(9, seed=3)
    with model.disable_plugin():
        dense, inner = model(ids).logits, model.generate(other, **GREEDY)
    expected = model.generate(ids, **GREEDY)
    asked = []

    class Ask(LogitsProcessor):
        def __call__(self, so_far: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            with model.disable_plugin():
                asked.append((model(so_far[:, :20]).logits, model.generate(other, **GREEDY)))
            return scores

    assert torch.equal(model.generate(ids, logits_processor=[Ask()], **GREEDY), expected)
    assert len(asked) == 6
    assert all(torch.equal(logits, dense) and torch.equal(answer, inner) for logits, answer in asked)


def test_training_freezes_an_adapter_that_was_put_on_later():
    model = variator(MERGED)
    lora = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model.base = get_peft_model(model.base, lora)
    assert any(parameter.requires_grad for parameter in model.base.parameters())
    model.train()
    assert not any(parameter.requires_grad for parameter in model.base.parameters())
    assert all(parameter.requires_grad for parameter in model.plugin().parameters())
