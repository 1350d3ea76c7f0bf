"""Dropped tokens and skipped layers against plain forms of the same, and their arithmetic against torch's count."""

from __future__ import annotations

import pytest
import torch
from conftest import make_decoder, make_variator, prompts
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from llm_variator import VariatorConfig, VariatorError, VariatorModel
from llm_variator.evaluate.alternatives import Drop, LateSkip, parse
from llm_variator.measures.conditions import Dense, NoContext, WithPlugin, follow, greedy
from llm_variator.measures.operations import Stack

HEAD, TAIL, N, T = 2, 5, 31, 6
FULL = ["llama", "llama-mha", "mistral", "qwen2", "qwen3"]  # no sliding windows


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two prompts and what follows them."""
    rows = torch.cat(prompts(N + T, N + T, seed=seed))
    return rows[:, :N], rows[:, N:]


@torch.no_grad()
def logits_of(condition, model, ids, more) -> torch.Tensor:
    """(rows, 1 + t, vocabulary): after the prompt, and after each token that follows."""
    prompt = condition.read(model, ids)
    return torch.cat((prompt.logits[:, None], follow(model, prompt, more)), dim=1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize("first", [1, 2])
def test_late_skip_is_the_dense_model_with_hidden_states_held(name, first, implementation):
    model = VariatorModel(make_decoder(name, attn_implementation=implementation))
    ids, more = pair()
    ours = logits_of(LateSkip(first, HEAD, TAIL), model, ids, more)
    held = {}

    def hold(block, args, output):
        """Every token passes every layer, and those between head and tail come out as they entered layer `first`."""
        output = output.clone()
        output[:, HEAD : N - TAIL] = held["states"]
        return output

    blocks = model.base.model.layers
    handles = [
        blocks[first].register_forward_pre_hook(
            lambda block, args: held.update(states=args[0][:, HEAD : N - TAIL])
        )
    ]
    handles += [block.register_forward_hook(hold) for block in blocks[first:]]
    with torch.no_grad():
        whole = model.base(torch.cat((ids, more), dim=1), use_cache=False).logits[:, N - 1 :]
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(ours, whole, atol=1e-4, rtol=1e-4)
    away = (ours - logits_of(Dense(), model, ids, more)).abs().max()
    # in the last layer the prompt is needed for its keys and values only: skipping the rest changes nothing
    assert away < 1e-4 if first == 2 else away > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", FULL)
def test_drop_reads_some_tokens_at_their_positions(name):
    model = VariatorModel(make_decoder(name))
    ids, more = pair()
    kept = [0, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, *range(26, 31)]  # head 2, every second, tail 5
    assert Drop(2, HEAD, TAIL).columns(N).tolist() == kept
    cache = DynamicCache()
    steps = []
    whole = torch.cat((ids, more), dim=1)
    for column in [*kept, *range(N, N + T)]:
        out = model.base(
            whole[:, column : column + 1], past_key_values=cache, position_ids=torch.tensor([[column]])
        )
        steps.append(out.logits)
    plain = torch.cat(steps, dim=1)[:, len(kept) - 1 :]
    torch.testing.assert_close(logits_of(Drop(2, HEAD, TAIL), model, ids, more), plain, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", [*FULL, "gemma3"])
def test_plugin_dense_and_no_context_are_the_models_own_forward(name):
    model = make_variator(
        name, VariatorConfig(k=3, sites=("ffn", "kv"), r=4, dense_head=HEAD, dense_tail=TAIL)
    )
    ids, more = pair()
    whole = torch.cat((ids, more), dim=1)
    plugin = WithPlugin("mine", "default", model.plugins["default"])
    expected = model(whole, prompt_length=N).logits[:, N - 1 :]
    torch.testing.assert_close(logits_of(plugin, model, ids, more), expected, atol=1e-4, rtol=1e-4)
    with model.disable_plugin():
        dense, bare = model(whole).logits[:, N - 1 :], model(whole[:, N - 1 :]).logits
    torch.testing.assert_close(logits_of(Dense(), model, ids, more), dense, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits_of(NoContext(), model, ids, more), bare, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_greedy_is_generate():
    model = make_variator("llama", VariatorConfig(k=2, sites=("ffn", "kv"), r=4, dense_tail=TAIL))
    ids, _ = pair()
    plugin = WithPlugin("mine", "default", model.plugins["default"])
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=7, do_sample=False)
    found = greedy(model, plugin.read(model, ids), 7)
    assert found.tolist() == expected[:, N:].tolist()
    stop = int(found[0, 2])
    first = found[0].tolist().index(stop)
    stopped = greedy(model, plugin.read(model, ids[:1]), 7, frozenset({stop}))
    assert stopped[0].tolist() == found[0, : first + 1].tolist()


@pytest.mark.parametrize("name", FULL)
@pytest.mark.parametrize(
    "condition", [LateSkip(1, HEAD, TAIL), LateSkip(2, 0, 0), Drop(3, HEAD, TAIL), NoContext()]
)
def test_arithmetic_equals_what_torch_counts(name, condition):
    model = VariatorModel(make_decoder(name, attn_implementation="eager"))
    (ids,) = prompts(N)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        prompt = condition.read(model, ids)
    cost = condition.cost(Stack.of(model.config), N, causal=False)
    # some releases of transformers compute the angles of RoPE with a small product
    assert cost.total <= counter.get_total_flops() <= 1.01 * cost.total
    assert cost.cache_entries == prompt.entries()


def test_causal_scores_of_a_late_skip_by_hand():
    stack = Stack.of(make_decoder("llama").config)
    whole, causal = (LateSkip(2, 1, 2).cost(stack, 6, causal=causal) for causal in (False, True))
    early = 2 * (6 * 7 // 2)  # two layers see the triangle
    late = 1 + 5 + 6  # one head token, and the fifth and sixth token
    assert causal.scores == 4 * stack.attention_width * (early + late)
    assert whole.scores == 4 * stack.attention_width * (2 * 36 + 3 * 6)
    assert causal.ffn == 2 * stack.ffn_weights * (2 * 6 + 3)


def test_a_short_prompt_is_dense():
    model = VariatorModel(make_decoder("llama"))
    (ids,) = prompts(HEAD + TAIL)
    for condition in (LateSkip(1, HEAD, TAIL), Drop(2, HEAD, TAIL)):
        with torch.no_grad():
            same = torch.equal(condition.read(model, ids).logits, Dense().read(model, ids).logits)
        assert same
        stack = Stack.of(model.config)
        assert condition.cost(stack, HEAD + TAIL) == Dense().cost(stack, HEAD + TAIL)


def test_hooks_are_gone_afterwards():
    model = VariatorModel(make_decoder("llama"))
    ids, more = pair()
    before = logits_of(Dense(), model, ids, more)
    logits_of(LateSkip(1, HEAD, TAIL), model, ids, more)
    assert torch.equal(before, logits_of(Dense(), model, ids, more))


def test_names():
    config = make_decoder("llama").config
    assert parse("drop:4", config, 1, 2) == Drop(4, 1, 2)
    assert parse("late-skip", config, 1, 2) == LateSkip(1, 1, 2)
    assert [parse(text, config, 1, 2).label for text in ("drop", "late-skip:2")] == ["drop:2", "late-skip:2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prune:2", "known are drop:K"),
        ("drop:x", "unknown alternative"),
        ("drop:²", "unknown alternative"),
        ("drop:1", "at least 2"),
        ("late-skip:0", "from 1 to 2"),
        ("late-skip:3", "from 1 to 2"),
    ],
)
def test_wrong_names(text, message):
    with pytest.raises(VariatorError, match=message):
        parse(text, make_decoder("llama").config, 0, 1)


def test_sliding_windows_are_refused():
    model = VariatorModel(make_decoder("gemma3"))
    with pytest.raises(VariatorError, match="sliding window"):
        LateSkip(1, HEAD, TAIL).read(model, prompts(N)[0])
