"""What people do to caches of kept keys beyond reading and answering: right, or refused in one line."""

from __future__ import annotations

import pytest
import torch
from conftest import make_decoder, prompts
from peft import LoraConfig, inject_adapter_in_model
from selecting import CONFIGS, GREEDY, MAIN, add, close, make

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.cache.naming import cache_of
from llm_variator.train.__main__ import main

AGES = MAIN | {"decode_block": 4}
ONE = dict(max_new_tokens=1, do_sample=False, output_logits=True, return_dict_in_generate=True)


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("first", [None, "merges", "other", "default"])
def test_questions_of_one_token_beside_longer_ones(first, chunk):
    """Of a question of one token nothing is read ahead: its row holds what the context's plugin left, or none did."""
    model = make("llama")
    add(model, "other", dict(block=8, dense_head=2, dense_tail=3, k=8))
    merges = VariatorConfig(sites=("kv",), k=2, compressor="mean", dense_head=2, dense_tail=3)
    model.add_plugin("merges", merges).double()
    document, question = prompts(60, 20, seed=5)
    with model.use_plugin(first):
        context = model.compress(document)
    questions = [question[0].tolist(), question[0, :1].tolist()]
    alone = [model.generate([one], context=context, **ONE).logits[0][0] for one in questions]
    together = model.generate(questions, context=context, prefill_chunk_size=chunk, **ONE).logits[0]
    for row, own in zip(together, alone, strict=True):
        close(row, own, 1e-5)


def test_a_merged_context_beside_a_question_of_one_token():
    """The same where a plugin that merges reads on after a dense context."""
    config = VariatorConfig(sites=("kv",), k=2, compressor="mean", dense_head=1, dense_tail=2)
    model = VariatorModel(make_decoder("llama"), config).double()
    document, question = prompts(30, 20, seed=5)
    with model.disable_plugin():
        context = model.compress(document)
    for questions in ([question[0, :1].tolist(), question[0].tolist()], [question[0].tolist(), [5]]):
        alone = [model.generate([one], context=context, **ONE).logits[0][0] for one in questions]
        together = model.generate(questions, context=context, prefill_chunk_size=4, **ONE).logits[0]
        for row, own in zip(together, alone, strict=True):
            close(row, own, 1e-5)


@pytest.mark.parametrize("where", [["q_proj"], ["q_proj", "v_proj"], ["k_proj"], ["v_proj"]])
def test_gradients_of_some_projections(where):
    """LoRA on queries alone asks for gradients that keys do not need: no buffer is written again under them."""
    model = make("llama")
    config = LoraConfig(r=2, target_modules=where, init_lora_weights=False)
    inject_adapter_in_model(config, model.base)
    model.double()
    (ids,) = prompts(60)

    def loss() -> torch.Tensor:  # transformers' own is in fp32
        logits = model(ids, prompt_length=40).logits[0, 39:-1]
        return torch.nn.functional.cross_entropy(logits, ids[0, 40:])

    trained = [parameter for name, parameter in model.base.named_parameters() if "lora_" in name]
    loss().backward()
    assert all(parameter.grad is not None for parameter in trained)
    # against a difference quotient along one direction; norms compute in fp32
    direction = [parameter.grad.sign() for parameter in trained]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(trained, direction, strict=True))
    losses = []
    for side in (1, -1):
        with torch.no_grad():
            for parameter, way in zip(trained, direction, strict=True):
                parameter += side * 1e-4 * way
            losses.append(float(loss()))
            for parameter, way in zip(trained, direction, strict=True):
                parameter -= side * 1e-4 * way
    assert (losses[0] - losses[1]) / 2e-4 == pytest.approx(slope, rel=2e-3)


@torch.no_grad()
def test_autocast_gives_its_own_dtype():
    model = make("llama", dtype=torch.float32)
    (ids,) = prompts(50)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids).logits
    close(found.float(), model(ids).logits, 0.5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 5])
def test_an_unwrapped_model_does_not_read_such_a_cache(tokens):
    model = make("llama")
    ids, more = prompts(40, tokens)
    cache = cache_of(model(ids))
    with pytest.raises(VariatorError, match="only the wrapped model reads it"):
        model.unload()(more, past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("plugin", ["default", None])
def test_attention_weights_are_refused_at_every_step(plugin):
    model = make("llama", attn_implementation="eager")
    ids, more = prompts(40, 1)
    cache = cache_of(model(ids))
    with model.use_plugin(plugin), pytest.raises(VariatorError, match="output_attentions"):
        model(more, past_key_values=cache, output_attentions=True)


@torch.no_grad()
def test_what_is_no_cache_is_named():
    model = make("llama")
    (ids,) = prompts(40)
    for wrong in ((), ((torch.zeros(1), torch.zeros(1)),)):
        with pytest.raises(VariatorError, match="DynamicCache"):
            model(ids, past_key_values=wrong)


def test_a_decoder_that_looks_ahead():
    base = make_decoder("gemma3", use_bidirectional_attention=True)
    with pytest.raises(VariatorError, match="use_bidirectional_attention"):
        VariatorModel(base, VariatorConfig(k=2))


@torch.no_grad()
@pytest.mark.parametrize("guess", ["prompt_lookup_num_tokens", "assistant_model"])
def test_guesses_and_ageing(guess):
    model = make("llama", AGES)
    value = 3 if guess == "prompt_lookup_num_tokens" else make_decoder("llama").double()
    with pytest.raises(VariatorError, match="decode_block"):
        model.generate(prompts(40)[0], **GREEDY, **{guess: value})


@torch.no_grad()
def test_cropping_tokens_that_wait_to_age():
    """Within the window like never read; into the dense head refused, for how full that is is known to nobody then."""
    model = make("llama", AGES)
    ids, wrong, more = prompts(30, 2, 6)
    cache, plain = cache_of(model(ids)), cache_of(model(ids))
    model(wrong, past_key_values=cache, prompt_length=0)
    cache.crop(-2)
    found = model(more, past_key_values=cache, prompt_length=0).logits
    close(found, model(more, past_key_values=plain, prompt_length=0).logits)
    short = cache_of(model(ids[:, :1]))
    model(wrong, past_key_values=short, prompt_length=0)
    with pytest.raises(VariatorError, match="dense head"):
        short.crop(-2)


@torch.no_grad()
def test_rows_that_end_apart_while_tokens_age():
    """A block that a row ends in keeps other tokens in every head: which of them are hidden, one mask cannot say."""
    model = make("llama", CONFIGS["one ratio"] | {"decode_block": 4})
    model.base.generation_config.eos_token_id = 2
    ids, steps = prompts(24)[0].repeat(2, 1), 40

    def forced(ends: int):
        def scores(sequences: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            place = sequences.shape[1] - ids.shape[1] - 3
            wanted = torch.full_like(scores, float("-inf"))
            wanted[:, 5 + place % 7] = 0
            if place == ends:
                wanted[0] = float("-inf")
                wanted[0, 2] = 0
            return wanted

        return scores

    context = model.compress(ids[:1])
    options = dict(max_new_tokens=steps, do_sample=False, pad_token_id=0, return_context=True)
    with pytest.raises(VariatorError, match="one by one"):
        model.generate(ids[:, :3], context=context, logits_processor=[forced(7)], **options)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--keep", "1"], "--keep 1 keeps everything"),
        (["--keep", "0.01"], "too little"),
        (["--layers", "0", "--keep", "0.3"], "too little"),
        (["--k-per-head", "[[1, 1, 1], [1, 1, 1]]"], "leave all dense"),
        (["--k-per-head", "[[4, 1], [1, 4]]"], "KV heads"),
    ],
)
def test_what_cannot_be_is_refused_before_the_fit(flags, complaint, tmp_path):
    with pytest.raises(VariatorError, match=complaint):
        main([*_fit(tmp_path), *flags])
    assert not (tmp_path / "out").exists()


def test_one_ratio_for_all_heads(tmp_path):
    main([*_fit(tmp_path), "--k", "4"])
    config = VariatorConfig.from_json(tmp_path / "out" / "variator_config.json")
    assert {k for row in config.k_per_head for k in row} == {4}


def _fit(folder) -> list[str]:
    line = (
        "--model smollm2-135m --random-init --num-layers 2 --sites kv --compressor kv=select --fit-samples 1 "
    )
    line += f"--fit-tokens 96 --calibrate-tokens 128 --block 8 --dense-tail 8 --device cpu --output {folder / 'out'}"
    return line.split()
