"""What is measured of a condition, against the library's own metric, full forward passes and hand arithmetic."""

from __future__ import annotations

import pytest
import torch
from conftest import VOCAB, make_variator

from llm_variator import VariatorConfig
from llm_variator.engine.groups import split
from llm_variator.measures.conditions import Dense, NoContext, WithPlugin
from llm_variator.measures.metrics import continuation_cross_entropy, reference_conditions
from llm_variator.measures.quality import (
    agreement,
    answer,
    continue_windows,
    difference,
    ratio_to,
    time_reading,
)

CONTEXT, LENGTH, GENERATE = 20, 27, 5


@pytest.fixture(scope="module")
def model():
    return make_variator("llama", VariatorConfig(k=2, sites=("ffn", "kv"), r=4, dense_head=1, dense_tail=4))


@pytest.fixture(scope="module")
def plugin(model):
    return WithPlugin("mine", "default", model.plugins["default"])


@pytest.fixture(scope="module")
def windows():
    return torch.randint(3, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(5), dtype=torch.int32)


def measure(model, condition, windows, dense=None, batch_size=2):
    return continue_windows(
        model, condition, windows, CONTEXT, generate=GENERATE, batch_size=batch_size, dense=dense
    )


def test_nats_are_the_metrics(model, plugin, windows):
    references = reference_conditions(model, windows, CONTEXT)
    for condition, expected in (
        (plugin, continuation_cross_entropy(model, windows, CONTEXT)),
        (Dense(), references["dense"]),
        (NoContext(), references["no_context"]),
    ):
        nats = measure(model, condition, windows).nats
        assert len(nats) == 3
        assert sum(nats) / 3 == pytest.approx(expected, abs=1e-5)


def test_greedy_tokens_and_choices_are_those_of_full_passes(model, plugin, windows):
    dense = measure(model, Dense(), windows)
    ours = measure(model, plugin, windows, dense.greedy)
    prompts = windows[:, :CONTEXT].long()
    one = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=GENERATE, do_sample=False
    )
    assert ours.greedy == one[:, CONTEXT:].tolist()
    with model.disable_plugin():
        one = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=GENERATE, do_sample=False
        )
    assert dense.greedy == one[:, CONTEXT:].tolist()
    with torch.no_grad():
        chosen = model(one, prompt_length=CONTEXT).logits[:, CONTEXT - 1 : -1].argmax(-1)
    assert ours.same_choice == (chosen == one[:, CONTEXT:]).double().mean(1).tolist()
    assert dense.same_choice == [1.0] * 3
    assert ours.greedy != dense.greedy


def test_entries_are_counted_in_the_cache(model, plugin, windows):
    assert measure(model, plugin, windows).entries == 3 * split(CONTEXT, 2, 1, 4).entries
    assert measure(model, Dense(), windows).entries == 3 * CONTEXT
    assert measure(model, NoContext(), windows).entries == 3


def test_batches_change_nothing(model, plugin, windows):
    one, three = (measure(model, plugin, windows, batch_size=size) for size in (1, 3))
    assert one.nats == pytest.approx(three.nats, abs=1e-5)
    assert one.greedy == three.greedy


def test_answers_stop(model, plugin, windows):
    questions = [windows[0, :CONTEXT].tolist(), windows[1, :12].tolist()]
    free = answer(model, plugin, questions, tokens=6, stop=frozenset({-1}))
    assert [len(tokens) for tokens in free.tokens] == [6, 6]
    assert free.entries == [3 * split(n, 2, 1, 4).entries for n in (CONTEXT, 12)]
    end = free.tokens[0][2]
    stopped = answer(model, plugin, questions[:1], tokens=6, stop=frozenset({end}))
    assert stopped.tokens == [free.tokens[0][: free.tokens[0].index(end) + 1]]


def test_conditions_take_turns(model, plugin, windows):
    order = []

    class Spy:
        def __init__(self, label):
            self.label = label

        def read(self, model, ids):
            order.append(self.label)
            return Dense().read(model, ids)

    ticks = iter(range(100))
    seconds = time_reading(model, [Spy("a"), Spy("b")], windows[:1, :8], 2, clock=lambda: float(next(ticks)))
    assert order == ["a", "b"] * 3
    assert seconds == {"a": [1.0, 1.0], "b": [1.0, 1.0]}


def test_ratio_is_of_rounds():
    assert ratio_to([1.0, 2.0, 10.0], [0.5, 1.5, 20.0]) == 0.75  # 0.5, 0.75, 2
    assert ratio_to([1.0, 4.0], [1.0, 2.0]) == 0.75


def test_agreement_by_hand():
    assert agreement([[1, 2, 3], [4, 5, 6]], [[1, 9, 3], [9, 5, 6]]) == pytest.approx(4 / 6)


def test_difference_by_hand():
    mean, error = difference([3.0, 5.0, 4.0], [1.0, 2.0, 3.0])  # 2, 3, 1: deviation 1
    assert mean == 2.0
    assert error == pytest.approx(1 / 3**0.5)
    assert difference([3.0], [1.0]) == (2.0, None)
