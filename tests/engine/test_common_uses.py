"""What people do to a wrapped model that reads like nothing special, each beside the same thing done plainly."""

from __future__ import annotations

import gc

import pytest
import torch
from conftest import VOCAB, make_decoder, make_encoder, randomise
from peft import IA3Config, LoraConfig, VeraConfig, get_peft_model
from transformers import DynamicCache, GenerationConfig, StaticCache, Trainer, TrainingArguments

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.engine.cache import CompressedLayer, SelectedLayer
from llm_variator.engine.cache.naming import cache_of
from llm_variator.engine.cache.paging import KVPool

MERGES = dict(k=2, sites=("ffn", "kv"), r=4, dense_head=1, dense_tail=1)
KEEPS = dict(k=4, sites=("kv",), compressor="select", block=4, dense_head=2, dense_tail=2)
GREEDY = dict(do_sample=False, max_new_tokens=6)


def wrap(name: str = "llama", base=None, **config) -> VariatorModel:
    model = VariatorModel(make_decoder(name) if base is None else base, VariatorConfig(**config))
    randomise(model.plugin())
    return model.eval()


@pytest.fixture(params=["merges", "keeps"])
def model(request) -> VariatorModel:
    return wrap(**(MERGES if request.param == "merges" else KEEPS))


def ids(n: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (rows, n), generator=torch.Generator().manual_seed(seed))


def left_padded(rows: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The second of two rows with `count` tokens of padding before it in place of its first tokens."""
    mask = torch.ones_like(rows)
    mask[1, :count] = 0
    return rows.masked_fill(mask == 0, 0), mask


# --- masks


def test_one_token_behind_padding_that_was_read_densely(model):
    rows, mask = left_padded(ids(20, 2), 5)
    token = ids(1, 2, seed=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with model.disable_plugin():
        cache = model(rows, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
        alone = model(rows[1:, 5:], use_cache=True).past_key_values
    both = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
    after = positions[:, -1:] + 1
    ours = model(token, attention_mask=both, position_ids=after, past_key_values=cache).logits[1]
    torch.testing.assert_close(ours, model(token[1:], past_key_values=alone).logits[0])


def test_generate_goes_on_behind_padding_that_was_read_densely(model):
    rows, mask = left_padded(ids(20, 2), 5)
    with model.disable_plugin():
        turn = model.generate(rows, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
        alone = model.generate(rows[1:, 5:], return_dict_in_generate=True, **GREEDY)
    both = torch.cat((mask, torch.ones(2, 6, dtype=torch.long)), dim=1)
    more = dict(past_key_values=turn.past_key_values, attention_mask=both)
    ours = model.generate(turn.sequences, **more, **GREEDY)
    plain = model.generate(alone.sequences, past_key_values=alone.past_key_values, **GREEDY)
    assert torch.equal(ours[1, -6:], plain[0, -6:])


def test_one_row_pauses_for_a_step(model):
    rows, steps = ids(20, 2), ids(2, 2, seed=1)
    cache = model(rows, use_cache=True).past_key_values
    mask = torch.ones(2, 22, dtype=torch.long)
    mask[1, 20] = 0
    first = dict(attention_mask=mask[:, :21], position_ids=torch.tensor([[20], [19]]))
    model(steps[:, :1].masked_fill(mask[:, 20:21] == 0, 0), past_key_values=cache, **first)
    second = dict(attention_mask=mask, position_ids=torch.tensor([[21], [20]]))
    ours = model(steps[:, 1:], past_key_values=cache, **second).logits[1]
    alone = model(rows[1:], use_cache=True).past_key_values
    torch.testing.assert_close(ours, model(steps[1:, 1:], past_key_values=alone).logits[0])


def test_mask_of_a_loop_that_generates_is_looked_at_once(model, monkeypatch):
    rows, mask = left_padded(ids(20, 2), 5)
    calls = []
    kind = CompressedLayer if model.plugin().selects == {} else SelectedLayer
    monkeypatch.setattr(kind, "hide", lambda layer, seen: calls.append(seen))
    cache = model(rows, attention_mask=mask, use_cache=True).past_key_values
    for step in range(3):
        mask = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
        more = dict(attention_mask=mask, position_ids=mask.sum(1, keepdim=True) - 1)
        model(ids(1, 2, seed=step), past_key_values=cache, **more)
    assert len(calls) == 3, "once in each of three layers"
    mask = mask.clone()
    mask[0, 12] = 0
    both = torch.cat((mask, torch.ones(2, 1, dtype=torch.long)), dim=1)
    model(ids(1, 2), attention_mask=both, past_key_values=cache)
    assert len(calls) == 6, "another mask"


@pytest.mark.parametrize("width", [1, 2])
def test_what_a_mask_hides_of_a_cache_is_hidden_whatever_is_read(width):
    model = wrap(k=1, sites=("ffn", "kv"), compressor="mean", decompressor="copy")
    rows, new = ids(20), ids(width, seed=1)
    mask = torch.ones(1, 20 + width, dtype=torch.long)
    mask[:, 3:8] = 0
    more = dict(attention_mask=mask, position_ids=torch.arange(20, 20 + width)[None])
    cache = model(rows, use_cache=True).past_key_values
    ours = model(new, past_key_values=cache, **more).logits
    dense = model.base(rows, use_cache=True).past_key_values
    torch.testing.assert_close(ours, model.base(new, past_key_values=dense, **more).logits)


def test_right_padded_second_turn(model):
    rows = ids(16, 2)
    turn = model.generate(rows, return_dict_in_generate=True, **GREEDY)
    question, mask = ids(6, 2, seed=1), torch.ones(2, 28, dtype=torch.long)
    mask[1, -2:] = 0
    whole = torch.cat((turn.sequences, question), dim=1).masked_fill(mask == 0, 0)
    ours = model.generate(whole, attention_mask=mask, past_key_values=turn.past_key_values, **GREEDY)
    alone = model.generate(rows[1:], return_dict_in_generate=True, **GREEDY)
    single = torch.cat((alone.sequences, question[1:, :4]), dim=1)
    plain = model.generate(single, past_key_values=alone.past_key_values, **GREEDY)
    assert torch.equal(ours[1, -6:], plain[0, -6:])


def test_static_cache_of_a_model_that_slides_all_through():
    model = wrap(base=make_decoder("mistral", sliding_window=8), k=2, sites=("ffn",), r=4)
    rows, mask = left_padded(ids(24, 2), 5)
    static = dict(cache_implementation="static", output_logits=True, return_dict_in_generate=True)
    ours = model.generate(rows, attention_mask=mask, **static, **GREEDY)
    plain = model.generate(rows[1:, 5:], output_logits=True, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(ours.sequences[1, 24:], plain.sequences[0, 19:])
    torch.testing.assert_close(ours.logits[0][1], plain.logits[0][0])


@pytest.mark.parametrize("window", [None, 8])
def test_second_turn_in_a_static_cache(window):
    model = wrap(base=make_decoder("mistral", sliding_window=window), k=2, sites=("ffn",), r=4)
    rows, mask = left_padded(ids(24, 2), 5)
    both = torch.cat((mask, torch.ones(2, 16, dtype=torch.long)), dim=1)
    found = []
    for cache in (StaticCache(config=model.base.config, max_cache_len=64), None):
        turn = model.generate(
            rows, attention_mask=mask, past_key_values=cache, return_dict_in_generate=True, **GREEDY
        )
        whole = torch.cat((turn.sequences, ids(10, 2, seed=1)), dim=1)
        found.append(model.generate(whole, attention_mask=both, past_key_values=cache_of(turn), **GREEDY))
    assert torch.equal(*found)


# --- caches


def test_mask_hides_in_a_cache_that_was_emptied_too():
    model = wrap(**MERGES)
    rows, mask = ids(24), torch.ones(1, 25, dtype=torch.long)
    mask[:, 9:14] = 0

    def read(cache):
        model(rows, past_key_values=cache, use_cache=True)
        more = dict(attention_mask=mask, position_ids=torch.tensor([[24]]))
        return model(ids(1, seed=1), past_key_values=cache, **more).logits

    cache = DynamicCache(config=model.base.config)
    first = read(cache)
    cache.reset()
    torch.testing.assert_close(read(cache), first)


def test_mask_over_tokens_of_which_heads_keep_different_ones_is_refused():
    model = wrap(**KEEPS)
    cache = model(ids(24), use_cache=True).past_key_values
    mask = torch.ones(1, 25, dtype=torch.long)
    mask[:, 9:14] = 0
    with pytest.raises(VariatorError, match="read the prompt with that mask"):
        model(ids(1, seed=1), attention_mask=mask, past_key_values=cache)


def test_prompt_reused_by_cropping_what_was_answered():
    model = wrap(**KEEPS)
    rows, question = ids(24), ids(9, seed=1)
    fresh = model(rows, use_cache=True).past_key_values
    cache = model.generate(rows, return_dict_in_generate=True, **GREEDY).past_key_values
    cache.crop(24 - cache.get_seq_length())
    ours = model(question, past_key_values=cache).logits
    torch.testing.assert_close(ours, model(question, past_key_values=fresh).logits)


def test_turn_after_an_answer_that_was_interrupted(model):
    class StopError(Exception):
        pass

    def interrupt(input_ids, scores):
        if input_ids.shape[1] == 23:
            raise StopError
        return scores

    rows, question = ids(20), ids(9, seed=1)
    cache = DynamicCache(config=model.base.config)
    with pytest.raises(StopError):
        model.generate(rows, past_key_values=cache, logits_processor=[interrupt], **GREEDY)
    whole = model.generate(rows, return_dict_in_generate=True, do_sample=False, max_new_tokens=4)
    read = torch.cat((whole.sequences[:, cache.get_seq_length() : 24], question), dim=1)
    ours = model(read, past_key_values=cache).logits
    torch.testing.assert_close(ours, model(read, past_key_values=whole.past_key_values).logits)


def test_base_called_with_a_new_cache_inside_generate_is_refused(model):
    def reads(input_ids, scores):
        model.base(input_ids=input_ids, past_key_values=DynamicCache())
        return scores

    with pytest.raises(VariatorError, match="inside generate something else reads a prompt"):
        model.generate(ids(20), logits_processor=[reads], **GREEDY)


def test_going_on_without_the_cache_is_refused(model):
    turn = model.generate(ids(20), return_dict_in_generate=True, **GREEDY)
    whole = torch.cat((turn.sequences, ids(5, seed=1)), dim=1)
    with pytest.raises(VariatorError, match="needs it: give use_cache=True"):
        model.generate(whole, past_key_values=turn.past_key_values, use_cache=False, **GREEDY)
    context = model.compress(ids(20))
    for block in (model.use_plugin("default"), model.disable_plugin()):
        with block, pytest.raises(VariatorError, match="needs it: give use_cache=True"):
            model.generate(ids(5, seed=1), context=context, use_cache=False, **GREEDY)


def test_pool_first_used_in_inference_mode():
    model = wrap(**MERGES)
    pool = KVPool(64, block_size=4)
    with torch.inference_mode():
        context = model.compress(ids(20), pool=pool)
    plain = model.generate(ids(5, seed=1), context=model.compress(ids(20)), **GREEDY)
    assert torch.equal(model.generate(ids(5, seed=1), context=context, **GREEDY), plain)


def test_tokens_that_age_under_autocast():
    model = wrap(**KEEPS, decode_block=4)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(ids(24), do_sample=False, max_new_tokens=16, min_new_tokens=16).shape[1] == 40


# --- settings


def test_generation_config_is_the_bases(model):
    model.generation_config = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert model.generate(ids(20)).shape[1] == 23
    assert model.base.generation_config is model.generation_config


def test_generation_config_by_position(model):
    config = GenerationConfig(max_new_tokens=3, do_sample=False)
    assert torch.equal(model.generate(ids(20), config), model.generate(ids(20), generation_config=config))
    with pytest.raises(TypeError, match="at most 11 arguments by position"):
        model.generate(*[None] * 12)


def test_one_row_of_ids_without_its_dimension(model):
    assert torch.equal(model.generate(ids(20)[0], **GREEDY), model.generate(ids(20), **GREEDY))


def test_cache_that_older_checkpoints_ask_for(model):
    plain = model.generate(ids(20), **GREEDY)
    model.generation_config.cache_implementation = "hybrid"
    assert torch.equal(model.generate(ids(20), **GREEDY), plain)


def test_blocks_of_generators_end_in_any_order(model):
    def holding(name):
        with model.use_plugin(name):
            yield
        yield

    model.add_plugin("other", VariatorConfig(**MERGES))
    model.set_plugin(None)
    one, two = holding("default"), holding("other")
    next(one), next(two)
    next(one)
    assert model.active_plugin == "other"
    next(two)
    assert model.active_plugin is None


def test_plugin_deleted_in_a_block_that_holds_it(model):
    model.set_plugin(None)
    with model.use_plugin("default"):
        model.delete_plugin("default")
        with pytest.raises(VariatorError, match="no plugin named 'default'"):
            model(ids(20))


def test_stack_of_a_wrapped_model_is_not_wrapped_again(model):
    plain = model.generate(ids(20), **GREEDY)
    with pytest.raises(VariatorError, match="already has a VariatorModel"):
        VariatorModel(model.base.model)
    assert torch.equal(model.generate(ids(20), **GREEDY), plain)


def test_unloaded_twice(model):
    model.unload()
    with pytest.raises(VariatorError, match="has been unloaded already"):
        model.unload()


@pytest.mark.parametrize("in_a_cycle", [False, True])
@pytest.mark.parametrize("config", [MERGES, KEEPS])
def test_dropped_without_unload(config, in_a_cycle):
    base = make_decoder("llama")
    dropped = wrap(base=base, **config)
    dropped(ids(20))
    if in_a_cycle:
        dropped.myself = [dropped]
    del dropped
    gc.collect()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in base.modules())
    again = wrap(base=base, **config)
    assert torch.equal(again(ids(20)).logits, wrap(**config)(ids(20)).logits)


def test_copies_for_data_parallel_would_be_dense(model):
    with pytest.raises(VariatorError, match="one process per GPU"):
        model._replicate_for_data_parallel()  # what nn.DataParallel calls


def test_plain_base_may_generate_anything(model):
    with model.disable_plugin():
        assert model.generate(ids(20), custom_generate=lambda *args, **kwargs: (1, 2), **GREEDY) == (1, 2)


# --- Hugging Face's Trainer


def trainer(model, folder, **options) -> Trainer:
    return Trainer(model, TrainingArguments(str(folder), use_cpu=True, report_to="none", **options))


def test_label_smoothing_shifts_the_labels(tmp_path):
    model = wrap(k=1, sites=("ffn",), compressor="mean", decompressor="copy")
    batch = {"input_ids": ids(20, 2), "labels": ids(20, 2)}
    ours = trainer(model, tmp_path, label_smoothing_factor=0.1).compute_loss(model, dict(batch))
    dense = make_decoder("llama").eval()
    plain = trainer(dense, tmp_path, label_smoothing_factor=0.1).compute_loss(dense, dict(batch))
    torch.testing.assert_close(ours, plain)
    assert repr(model).startswith("VariatorModel(")


def test_columns_of_a_decoder_and_of_answers_reach_the_model(tmp_path):
    model = VariatorModel(make_encoder("t5"), VariatorConfig(k=2, r=4))
    kept = trainer(model, tmp_path)
    kept._set_signature_columns_if_needed()
    wanted = {"input_ids", "attention_mask", "labels", "decoder_input_ids", "decoder_attention_mask"}
    assert wanted | {"start_positions", "end_positions"} <= set(kept._signature_columns)
    given = dict(input_ids=ids(12), decoder_input_ids=ids(4), labels=ids(4, seed=1))
    other = given | {"decoder_input_ids": ids(4, seed=2)}
    assert model(**given).loss != model(**other).loss


# --- turns of several plugins, and prompts that a cache holds


def test_a_dense_turn_before_anything_ages_keeps_its_keys():
    """Keys of the first layer depend on tokens and places alone: none of the dense turn's may be written over."""
    config = dict(k=2, sites=("kv",), compressor="mean", decompressor="copy", dense_head=0, dense_tail=2)
    model = VariatorModel(make_decoder("llama"), VariatorConfig(**config, decode_block=4)).eval()
    tokens = ids(17)
    with torch.no_grad():
        with model.disable_plugin():
            keys = model(tokens, use_cache=True).past_key_values.layers[0].keys[0]
        cache = model(tokens[:, :3], prompt_length=0, use_cache=True).past_key_values
        with model.disable_plugin():
            model(tokens[:, 3:9], past_key_values=cache, use_cache=True)
        for place in range(9, 17):
            model(tokens[:, place : place + 1], past_key_values=cache, use_cache=True)
    held = cache.layers[0].keys[0] if hasattr(cache.layers[0], "keys") else cache.layers[0].store.keys[0]
    torch.testing.assert_close(held[:, :9], keys[:, :9])


def test_a_cache_that_holds_the_whole_prompt_is_not_read_over(model):
    prompt = ids(20)
    cache = cache_of(model(prompt, use_cache=True))
    for given in (prompt, ids(5, seed=1)):
        with pytest.raises(
            VariatorError, match=r"holds 20 tokens and (20|5) are given: give the whole sequence"
        ):
            model.generate(given, past_key_values=cache, **GREEDY)


def test_what_a_tokenizer_gives_needs_no_stars(model):
    from llm_variator.sources.models import byte_tokenizer

    tokenizer = byte_tokenizer()
    wide = wrap(base=make_decoder("llama", vocab_size=len(tokenizer)), **MERGES)
    given = tokenizer("a prompt of some length", return_tensors="pt")
    expected = wide.generate(**given, **GREEDY)
    assert torch.equal(wide.generate(given, **GREEDY), expected)
    assert torch.equal(wide.generate("a prompt of some length", tokenizer=tokenizer, **GREEDY), expected)


def test_padding_between_a_context_and_a_question_is_no_repeated_token(model):
    context = model.compress(ids(20))
    long, short = ids(9, seed=1)[0].tolist(), ids(4, seed=2)[0].tolist()
    options = dict(
        GREEDY, max_new_tokens=1, repetition_penalty=5.0, output_scores=True, return_dict_in_generate=True
    )
    both = model.generate([long, short], context=context, **options).scores[0]
    alone = model.generate([short], context=context, **options).scores[0]
    torch.testing.assert_close(both[1], alone[0])


# --- what a call says beside its prompt


def test_several_answers_that_end_by_themselves_are_no_context(model):
    context, ends = model.compress(ids(20)), lambda seen, scores: torch.tensor([True, False, False])
    options = dict(GREEDY, do_sample=True, num_return_sequences=3, stopping_criteria=[ends])
    with pytest.raises(
        VariatorError, match="leave out stop_strings and stopping_criteria, or ask for one answer"
    ):
        model.generate(ids(4, seed=1), context=context, return_context=True, **options)
    assert model.generate(ids(4, seed=1), context=context, **options).shape[0] == 3


def test_none_unsets_what_a_configuration_says(model):
    context, question = model.compress(ids(20)), ids(4, seed=1)
    free = model.generate(question, context=context, **GREEDY)
    model.generation_config.eos_token_id = int(free[0, -5])  # the second token of the answer
    options = dict(GREEDY, context=context, return_context=True, pad_token_id=0)
    answer, after = model.generate(question, eos_token_id=None, **options)
    assert torch.equal(answer, free)
    assert after.attention_mask.all()
    ended, _ = model.generate(question, **options)
    assert ended.shape[1] < free.shape[1]
    model.generation_config.cache_implementation = "static"
    with pytest.raises(VariatorError, match="leave it out"):
        model.generate(ids(20), **GREEDY)
    model.generation_config.eos_token_id = None
    assert model.generate(ids(20), cache_implementation=None, **GREEDY).shape == (1, 26)


@pytest.mark.parametrize("place", ["call", "given configuration", "the model's configuration"])
@pytest.mark.parametrize("kind", ["dynamic", "offloaded", "quantized"])
def test_kind_of_cache_where_the_library_makes_it(model, kind, place):
    context, options = model.compress(ids(20)), dict(GREEDY)
    expected = model.generate(ids(20), **GREEDY), model.generate(ids(4, seed=1), context=context, **GREEDY)
    if place == "call":
        options["cache_implementation"] = kind
    elif place == "given configuration":
        options = dict(generation_config=GenerationConfig(cache_implementation=kind, **GREEDY))
    else:
        model.generation_config.cache_implementation = kind
    for calls, prompt in ((dict(prefill_chunk_size=8), ids(20)), (dict(context=context), ids(4, seed=1))):
        if kind == "dynamic":
            assert torch.equal(model.generate(prompt, **calls, **options), expected["context" in calls])
            continue
        with pytest.raises(VariatorError, match=r"cache_implementation|quantise a context"):
            model.generate(prompt, **calls, **options)


def test_chunks_that_only_the_model_s_configuration_asks_for(model):
    expected = model.generate(ids(20), **GREEDY)
    model.generation_config.prefill_chunk_size = 8
    assert torch.equal(model.generate(ids(20), **GREEDY), expected)
    given = GenerationConfig(prefill_chunk_size=6, **GREEDY)
    assert torch.equal(model.generate(ids(20), generation_config=given), expected)
    assert (given.prefill_chunk_size, model.generation_config.prefill_chunk_size) == (6, 8)


def test_positions_of_a_prompt_that_is_read_in_parts(model):
    rows, mask = left_padded(ids(20, 2), 5)
    counted = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    chunked = dict(GREEDY, attention_mask=mask, prefill_chunk_size=8)
    expected = model.generate(rows, attention_mask=mask, **GREEDY)
    assert torch.equal(model.generate(rows, position_ids=counted, **chunked), expected)
    with pytest.raises(VariatorError, match="leave out position_ids or prefill_chunk_size"):
        model.generate(rows, position_ids=counted * 9, **chunked)


def test_adapters_by_row_are_of_one_pass(model):
    base = get_peft_model(make_decoder("llama"), LoraConfig(target_modules=["q_proj"]))
    wrapped = wrap(base=base, **MERGES)
    context = wrapped.compress(ids(20))
    for more in (dict(prefill_chunk_size=8), dict(context=context)):
        with pytest.raises(VariatorError, match="adapter_names choose adapters for one pass"):
            wrapped.generate(ids(20), adapter_names=["default"], **more, **GREEDY)
    one = wrapped.generate(ids(20), adapter_names=["default"], **GREEDY)
    assert torch.equal(one, wrapped.generate(ids(20), **GREEDY))


@pytest.mark.parametrize("kind", ["lora", "ia3", "vera", "modules to save"])
def test_context_notices_adapters_of_every_kind(kind):
    config = {
        "lora": LoraConfig(target_modules=["q_proj"]),
        "ia3": IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "vera": VeraConfig(target_modules=["q_proj"], r=2),
        "modules to save": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
    }[kind]
    base = get_peft_model(make_decoder("llama"), config)
    base.add_adapter("b", config)
    wrapped = wrap(base=base, **MERGES)
    context = wrapped.compress(ids(20))
    with base.disable_adapter(), pytest.raises(VariatorError, match="other adapters"):
        wrapped.generate(ids(4, seed=1), context=context, **GREEDY)
    wrapped.generate(ids(4, seed=1), context=context, **GREEDY)
    base.set_adapter("b")
    with pytest.raises(VariatorError, match="other adapters"):
        wrapped.generate(ids(4, seed=1), context=context, **GREEDY)


@pytest.mark.parametrize("kind", ["tokens", "embeddings", "modules to save"])
def test_embeddings_with_an_adapter(kind):
    config = {
        "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[3, 4]),
        "embeddings": LoraConfig(target_modules=["embed_tokens"]),
        "modules to save": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    }[kind]
    plain, wrapped = wrap(**MERGES), wrap(base=get_peft_model(make_decoder("llama"), config), **MERGES)
    assert torch.equal(wrapped.generate(ids(20), **GREEDY), plain.generate(ids(20), **GREEDY))
    context = wrapped.compress(ids(20))
    with pytest.raises(VariatorError, match=f"0 to {VOCAB - 1}; got {VOCAB}"):
        wrapped.generate(torch.tensor([[VOCAB]]), context=context, **GREEDY)


def test_default_device_of_torch_is_not_where_a_model_lies(model):
    rows, mask = left_padded(ids(20, 2), 5)
    lists = [rows[0].tolist(), rows[1, 5:].tolist()]

    def answers():
        both = model.generate(rows, attention_mask=mask, **GREEDY)
        question = model.generate(lists, context=model.compress(rows[:1]), **GREEDY)
        return both, question, model.generate(lists, **GREEDY)[:, -6:]

    expected = answers()
    torch.set_default_device("meta")
    try:
        found = answers()
    finally:
        torch.set_default_device(None)
    assert all(map(torch.equal, found, expected))
