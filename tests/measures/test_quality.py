"""What is measured of a condition, against the library's own metric, full forward passes and hand arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import VOCAB, make_variator
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from llm_variator import VariatorConfig
from llm_variator.bench.contexts.setting import dense_prefill
from llm_variator.engine.cache.report import KVCacheReport, LayerReport
from llm_variator.engine.groups import split
from llm_variator.evaluate.table import measure_prefill
from llm_variator.measures.compare import compare
from llm_variator.measures.conditions import Dense, NoContext, Prompt, WithPlugin
from llm_variator.measures.metrics import continuation_cross_entropy, reference_conditions
from llm_variator.measures.quality import (
    Question,
    agreement,
    answer,
    continue_windows,
    difference,
    difference_per_token,
    mean_per_token,
    ratio_to,
    time_reading,
)
from llm_variator.sources.models import byte_tokenizer

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


def test_bytes_are_those_of_one_row(model, plugin, windows):
    column = 2 * model.config.num_key_value_heads * model.base.model.layers[0].self_attn.head_dim * 4  # fp32
    for condition in (plugin, Dense()):
        for batch_size in (1, 2):
            found = measure(model, condition, windows, batch_size=batch_size)
            assert found.bytes == found.entries * column


def test_heads_of_unlike_size_count_by_their_mean():
    """A report may hold means over heads; what is counted is what it says, not the shape of some tensor."""
    layer = DynamicLayer()
    layer.update(torch.zeros(2, 3, 5, 4), torch.zeros(2, 3, 5, 4))
    cache = Cache(layers=[layer, DynamicLayer()])
    prompt = Prompt(cache, torch.zeros(2, VOCAB), 5)
    assert (prompt.entries(), prompt.bytes()) == (5, 2 * 3 * 5 * 4 * 4)
    with pytest.MonkeyPatch.context() as patch:
        reports = (LayerReport(2.5, 120, 5, 480), LayerReport(1.25, 60, 5, 480))  # type: ignore[arg-type]
        patch.setattr(KVCacheReport, "of", lambda cache: KVCacheReport(reports))
        assert (prompt.entries(), prompt.bytes()) == (3.75, 90)


def test_batches_change_nothing(model, plugin, windows):
    one, three = (measure(model, plugin, windows, batch_size=size) for size in (1, 3))
    assert one.nats == pytest.approx(three.nats, abs=1e-5)
    assert one.greedy == three.greedy


def test_answers_stop(model, plugin, windows):
    prompts = [windows[0, :CONTEXT].tolist(), windows[1, :12].tolist()]
    questions = [Question(prompt, [], [5, 6]) for prompt in prompts]
    free = answer(model, plugin, questions, tokens=6, stop=frozenset({-1}))
    assert [len(tokens) for tokens in free.tokens] == [6, 6]
    assert free.entries == [3 * split(n, 2, 1, 4).entries for n in (CONTEXT, 12)]
    assert free.bytes[0] / free.bytes[1] == free.entries[0] / free.entries[1]
    end = free.tokens[0][2]
    stopped = answer(model, plugin, questions[:1], tokens=6, stop=frozenset({end}))
    assert stopped.tokens == [free.tokens[0][: free.tokens[0].index(end) + 1]]


def by_hand(model, question: Question) -> list[float]:
    """Nats of every gold token: one full teacher-forced pass for each, and a logarithm of a sum written out."""
    nats = []
    for place, token in enumerate(question.gold):
        ids = [*question.prompt, *question.after, *question.gold[:place]]
        logits = model(torch.tensor([ids]), prompt_length=len(question.prompt)).logits[0, -1]
        nats.append(math.log(sum(math.exp(value) for value in logits.tolist())) - logits[token].item())
    return nats


@pytest.mark.parametrize("hidden", [False, True])
def test_gold_answers_are_scored_token_by_token(model, plugin, windows, hidden):
    ids = windows[0].tolist()
    cut = 14 if hidden else CONTEXT
    question = Question(ids[:cut], ids[cut:CONTEXT], ids[CONTEXT : CONTEXT + 3])
    found = answer(model, plugin, [question], tokens=4, stop=frozenset({-1}))
    with torch.no_grad():
        expected = by_hand(model, question)
        assert found.nats[0] == pytest.approx(expected, abs=1e-5)
        with model.disable_plugin():
            dense = by_hand(model, question)
            one = model(torch.tensor([ids[: CONTEXT + 3]])).logits[0, CONTEXT - 1 : -1].log_softmax(-1)
        right = [-one[place, token].item() for place, token in enumerate(question.gold)]
        assert dense == pytest.approx(right, abs=1e-5)
        assert expected != pytest.approx(dense, abs=1e-3)
        # what is scored leaves no trace in the answer
        greedy = []
        for _ in range(4):
            text = torch.tensor([question.prompt + question.after + greedy])
            greedy.append(int(model(text, prompt_length=cut).logits[0, -1].argmax()))
    assert found.tokens == [greedy]
    assert found.entries == [3 * split(cut, 2, 1, 4).entries]


def test_a_question_after_the_prompt_is_dense(model, plugin, windows):
    """Where the prompt is so short that all of it is dense, seen and hidden agree; else they do not."""
    ids = windows[1].tolist()

    def nats(condition, cut):
        question = Question(ids[:cut], ids[cut:CONTEXT], ids[CONTEXT : CONTEXT + 2])
        return answer(model, condition, [question], tokens=1, stop=frozenset()).nats[0]

    assert nats(Dense(), 10) == pytest.approx(nats(Dense(), CONTEXT), abs=1e-5)
    assert nats(plugin, 10) != pytest.approx(nats(plugin, CONTEXT), abs=1e-4)


def test_difference_per_token_by_hand():
    ours, dense = [[1.0, 2.0], [4.0]], [[0.5, 1.5], [1.0]]  # differences 1 over two tokens, 3 over one
    mean, error = difference_per_token(ours, dense)
    assert mean == pytest.approx(4 / 3)
    assert mean == pytest.approx(mean_per_token(ours) - mean_per_token(dense))
    # what is left of each answer: 1 - 2 * 4/3 and 3 - 4/3
    assert error == pytest.approx((2 * ((5 / 3) ** 2 + (5 / 3) ** 2)) ** 0.5 / 3)
    one = [[value] for value in (3.0, 5.0, 4.0)], [[value] for value in (1.0, 2.0, 3.0)]
    assert difference_per_token(*one) == pytest.approx(difference([3.0, 5.0, 4.0], [1.0, 2.0, 3.0]))
    assert difference_per_token([[3.0, 1.0]], [[1.0, 1.0]]) == (1.0, None)


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


@pytest.mark.parametrize("way", ["reading", "generating", "table", "contexts"])
def test_logits_of_all_that_is_timed_are_made_of_rows_of_their_own(way):
    """Not of a view of the prompt, which costs the dense model seconds in bf16 on a CPU."""
    model = make_variator("llama", VariatorConfig(k=2, sites=("ffn",)), vocab_size=259)
    ids = torch.randint(3, 250, (1, 30), generator=torch.Generator().manual_seed(0))
    shared = []

    def see(head, args, output):
        rows = args[0]
        shared.append(rows.untyped_storage().nbytes() > rows.numel() * rows.element_size())

    handle = model.base.get_output_embeddings().register_forward_hook(see)
    match way:
        case "reading":
            time_reading(model, [Dense(), WithPlugin("k2", "default", model.plugins["default"])], ids, 1)
        case "generating":
            compare(model, byte_tokenizer(), ids, max_new_tokens=1, repetitions=1)
            shared = shared[: 2 * 2]  # the timed ones, each with its warm-up
        case "table":
            measure_prefill(model, {"none": None, "k2": "default"}, ids, 1)
        case "contexts":
            dense_prefill(model, ids, 1)
    handle.remove()
    assert shared
    assert not any(shared)
    model(ids, logits_to_keep=1)
    assert not model.base.get_output_embeddings()._forward_pre_hooks, "what was timed is left as it was"


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
